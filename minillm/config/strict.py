"""Plain values in, checked settings out: what is missing takes its default, what is wrong is named in one line."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """What the user gave is wrong: one line that says what, where and how to mend it (exit code 2)."""


class DamagedFile(UserError):
    """A file is not what was once written (exit code 3)."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def check_types(config: Any, section: str = "") -> None:
    """Settings made in Python are held to what `from_dict` asks of a file: types, names of variants, finite numbers."""
    for name, hint in typing.get_type_hints(type(config)).items():
        _convert(hint, getattr(config, name), section + name)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` laid on top, section by section."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            value = merge(merged[key], value)
        merged[key] = value
    return merged


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass of settings as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """Builds a dataclass of settings from plain JSON values; what is missing takes its default.

    Raises `UserError` that names the field for an unknown name, a value of the wrong type or a bad combination.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where.rstrip('.') or cls.__name__} must be a table of settings, not {_show(values)}")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1) if isinstance(name, str) else []
            shown = name if isinstance(name, str) and name.isprintable() and len(name) <= 40 else _show(name)
            raise UserError(f"unknown setting {where}{shown}" + (f"; did you mean {where}{near[0]}?" if near else ""))
    return cls(**{name: _convert(hints[name], value, where + name) for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint` asks, where JSON and TOML know fewer types than Python."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        return from_dict(hint, value, where + ".")
    options = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # int | None; Literal[…] | None makes the second
        if value is None and type(None) in options:
            return None
        return _convert(next(option for option in options if option is not type(None)), value, where)
    if typing.get_origin(hint) is Literal:
        require(value in options, f"{where} must be one of {', '.join(map(str, options))}, not {_show(value)}")
        return value
    if type(value) is int:
        require(abs(value) < 2**63, f"{where} must be below 2⁶³, not {_show(value)}")
        value = float(value) if hint is float else value
    require(type(value) is hint, f"{where} must be of type {hint.__name__}, not {_show(value)}")
    require(hint is not float or math.isfinite(value), f"{where} must be finite, not {value}")
    return value


def _show(value: Any) -> str:
    """A value in a few characters, however long it is; what may be nested without end is not looked into."""
    if isinstance(value, list | tuple | Mapping):
        return f"a {type(value).__name__}"
    if type(value) is int and abs(value) >= 2**63:
        return f"a number of {value.bit_length()} bits"
    text = repr(value[:40] if isinstance(value, str) else value)
    return text if len(text) <= 42 else text[:42] + "…"

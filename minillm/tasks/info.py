"""What a finetuned model has learned of its task, read back from config.json's `task.info`, value by value."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from minillm.config import DamagedFile

T = TypeVar("T")


def said(info: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """One value, a whole number for a float included. Raises `DamagedFile` for another type, or what is not finite."""
    value = info.get(name)
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        wanted = "finite number" if kind is float else kind.__name__
        raise DamagedFile(f"config.json is damaged: task.info.{name} is no {wanted}; restore it")
    return value


def listed(info: Mapping[str, Any], name: str, kind: type[T]) -> list[T]:
    """A list of values of one type. Raises `DamagedFile` for anything else."""
    values = info.get(name)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise DamagedFile(f"config.json is damaged: task.info.{name} is no list of {kind.__name__}; restore it")
    return values

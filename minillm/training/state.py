"""Training state as JSON and tensors: what pickle would be for, without code that runs when it is read.

dict with plain string keys   {…}
any other dict                {"$items": [[key, value], …]}     keys: strings, integers
tensor                        {"$tensor": its name in the safetensors file}
NaN, infinities               {"$float": "nan"}
list, tuple                   […]                               both come back as lists
None, bool, int, str, float   themselves; floats by their shortest exact decimal, so bit for bit
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_TAGS = ("$items", "$tensor", "$float")
_DTYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
}  # fmt: skip


def pack(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """`state`, any nest of dicts, lists and plain values, as JSON values and the tensors that they name.

    Raises TypeError that names the place of a leaf or key that could not come back as it was.
    """
    tensors: dict[str, Tensor] = {}
    return _pack(state, "state", tensors), tensors


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given, tuples as lists.

    Raises ValueError, TypeError or KeyError where `packed` makes no sense, RecursionError where it is too deep.
    """
    if isinstance(packed, list):
        return [unpack(value, tensors) for value in packed]
    if not isinstance(packed, dict):
        return packed
    if not any(tag in packed for tag in _TAGS):
        return {key: unpack(value, tensors) for key, value in packed.items()}
    ((tag, value),) = packed.items()
    if tag == "$tensor":
        return tensors[value]
    if tag == "$float":
        return float(value)
    return {key: unpack(inner, tensors) for key, inner in value}


def storable(name: str, tensor: Tensor) -> Tensor:
    """The tensor as safetensors takes it: on the CPU, detached, contiguous. TypeError with `name` where it cannot."""
    if tensor.layout != torch.strided or tensor.dtype not in _DTYPES or tensor.device.type == "meta":
        raise TypeError(f"{name} cannot be saved: a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}")
    return tensor.detach().to("cpu").contiguous()


def unshare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor storable and with memory of its own: tied ones are written once for each name."""
    ready, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = storable(name, tensor)
        memory = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return ready


def _pack(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = where
        while name in tensors:  # {"a": {"b": …}, "a.b": …} would both be state.a.b
            name += "'"
        tensors[name] = storable(where, value)
        return {"$tensor": name}
    if isinstance(value, dict):
        return _pack_dict(value, where, tensors)
    if isinstance(value, (list, tuple)):
        return [_pack(inner, f"{where}[{i}]", tensors) for i, inner in enumerate(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if value is None or type(value) in (bool, int, str):
        return value
    raise TypeError(f"{where} cannot be saved: a checkpoint holds no {type(value).__qualname__}")


def _pack_dict(value: dict, where: str, tensors: dict[str, Tensor]) -> Any:
    for key in value:
        if type(key) not in (str, int):
            raise TypeError(f"{where} cannot be saved: its key {key!r} is neither a string nor an integer")
    inner = {key: _pack(item, f"{where}.{key}", tensors) for key, item in value.items()}
    plain = all(type(key) is str and key not in _TAGS for key in inner)
    return inner if plain else {"$items": [[key, item] for key, item in inner.items()]}

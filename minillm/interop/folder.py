"""Reads a folder in Hugging Face's format: config.json, safetensors in one file or in shards. No code of it is run.

config.json                     what the model is
model.safetensors               its tensors, or
model.safetensors.index.json    {"weight_map": {tensor: file}} and the files that it names
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from minillm.config import DamagedFile, UserError
from minillm.tensors import load_tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def is_hf(folder: Path) -> bool:
    """Whether `folder` is a model in Hugging Face's format: its config.json names a model type or an architecture."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return (
        isinstance(config, dict) and "settings" not in config and ("model_type" in config or "architectures" in config)
    )


def refuse_adapter(folder: Path) -> None:
    """Raises `UserError` where `folder` holds what a method learned without the model that it goes into."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        run = folder.resolve().parent
        remedy = "merge it into its base with PEFT (merge_and_unload), save that, and give the folder"
        if (run / "checkpoints").is_dir():
            remedy = f"give the run that it is of, {folder.parent}"
        raise UserError(f"{folder} holds an adapter, which is no model by itself; {remedy}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `UserError` where the file is missing, `DamagedFile` where it is no JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; a folder in Hugging Face's format has one") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DamagedFile(f"{path} is damaged: it is not JSON") from None
    if not isinstance(value, dict):
        raise DamagedFile(f"{path} is damaged: it is not a JSON object")
    return value


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors by name, on the CPU, in the precision of the file.

    Raises `UserError` where there are none or a shard is missing, `DamagedFile` where a file is no safetensors file,
    or does not hold what the index says.
    """
    if (folder / WEIGHTS).is_file():
        return _load(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        remedy = (
            f"{pickled[0]} is a pickle, which can run code: save it as safetensors first" if pickled else "no weights"
        )
        raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}: {remedy}")
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise DamagedFile(f"{folder / INDEX} is damaged: its weight_map does not give a file for each tensor")
    return _load_shards(folder, places)


def _load_shards(folder: Path, places: Mapping[str, str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if PurePosixPath(name).name != name or "\0" in name:
            raise DamagedFile(f"{folder / INDEX} is refused: it names {name!r}, which leads out of the folder")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing, and {INDEX} lists it; fetch the folder anew")
        shard = _load(folder / name)
        if double := shard.keys() & tensors.keys():
            raise DamagedFile(f"{folder / name} is damaged: another shard holds {min(double)} too")
        tensors |= shard
    for name, place in places.items():
        if name not in tensors:
            raise DamagedFile(f"{folder / place} is damaged: it lacks {name}, which {INDEX} places there")
    return tensors


def _load(path: Path) -> dict[str, Tensor]:
    tensors = load_tensors(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype not in _FLOATS:
            raise UserError(f"{path}: {name} is quantized ({tensor.dtype}); give the model in fp32, bf16 or fp16")
    return tensors

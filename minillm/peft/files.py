"""What a method has learned, and nothing else, as files: adapter_model.safetensors and adapter_config.json.

LoRA, AdaLoRA, prefix and prompt are written as the PEFT library writes them (exchange.py); full, freeze and adapter,
which it does not have, under the names of our own parameters. The metadata of the safetensors file, which PEFT does
not read, holds the settings, the hash of the model that the method was trained on, and one of all that was written.
"""

import hashlib
import json
import os.path
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minillm.config import DamagedFile, UserError, from_dict
from minillm.finite import require_finite
from minillm.peft import exchange
from minillm.peft.config import MethodConfig
from minillm.peft.inject import Adapted, inject
from minillm.peft.places import Place, Rename
from minillm.tensors import check_header

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save(adapted: Adapted, folder: str | Path, *, rename: Rename = Place, base_model: str = "") -> Path:
    """Writes what moved into `folder`, over what an earlier call wrote there.

    Args:
        rename: names of the model that PEFT is to open it on; the same one is needed to load it. None given: our own.
        base_model: what adapter_config.json names as the model that it belongs to; of a folder the way to it from
            `folder`, so that both can be moved together.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base_model = _seen_from(folder, base_model)
    if exchange.is_exchangeable(adapted):
        tensors, values = exchange.write(adapted, rename)
        values["base_model_name_or_path"] = base_model
        own = {exchange.BEFORE + name: x for name, x in adapted.moved().items() if _is_extra(adapted, name)}
        tensors |= own
        if own:
            values["modules_to_save"] = list(adapted.extra)
    else:
        tensors, values = adapted.moved(), {"minillm_method": adapted.config.method, "base_model": base_model}
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    text = json.dumps(values, indent=2)
    about = {"method": asdict(adapted.config), "base": adapted.base, "extra": adapted.extra}
    about["sha256"] = _digest(tensors, text, about)
    save_file(tensors, folder / TENSORS, {"format": "pt", "minillm": json.dumps(about)})
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return folder


def load(model: nn.Module, folder: str | Path, *, rename: Rename = Place) -> Adapted:
    """Puts what `save`, or PEFT, wrote into `model`, a plain one, and leaves it ready to train on or to predict.

    Raises:
        UserError: no adapter there; one that was trained on another model; a method or layer that has no counterpart;
            a tensor that is not finite.
        DamagedFile: the files are not what was written.
    """
    folder = Path(folder)
    tensors, metadata, text = _read(folder)
    where = str(folder)
    try:
        values = json.loads(text)
        if metadata is None:
            config, extra = exchange.read_config(values), ()
        elif metadata.pop("sha256", None) == _digest(tensors, text, metadata):
            config, extra = from_dict(MethodConfig, metadata["method"], "method."), metadata["extra"]
        else:
            raise DamagedFile(f"{folder}: {TENSORS} or {CONFIG} is not what was written; copy both anew")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{folder / CONFIG} is damaged: {error!r}") from error
    require_finite(tensors, str(folder / TENSORS))
    native = "minillm_method" in values
    if (
        config.method == "adalora" and values["init_r"] != config.start_rank
    ):  # layers joined for PEFT have the ranks of all their parts
        config = replace(config, initial_rank=values["init_r"], alpha=float(values["lora_alpha"]))
    adapted = inject(model, config, extra=extra) if native else Adapted(model, config, extra)
    try:
        if metadata is not None:
            _check_base(adapted, metadata["base"], where)
        before = tuple(f"{exchange.BEFORE}{module}." for module in adapted.extra)
        own = {name: x for name, x in tensors.items() if native or (before and name.startswith(before))}
        if not native:
            learned = {name: x for name, x in tensors.items() if name not in own}
            exchange.read(adapted, learned, values, rename, where)
            adapted.start()
        own = {name.removeprefix(exchange.BEFORE): x for name, x in own.items()}
        into = {name: x for name, x in adapted.moved().items() if native or _is_extra(adapted, name)}
        _fill(into, own, where)
    except UserError:
        adapted.remove()  # the model stays as it was given
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, re.error) as error:
        adapted.remove()
        raise DamagedFile(f"{folder / CONFIG} is damaged: {error!r}") from error
    return adapted


def _seen_from(folder: Path, base_model: str) -> str:
    """A folder's path from `folder` on, where both lie below another one than the root; anything else as it is."""
    if not base_model or not Path(base_model).is_dir():
        return base_model
    base, here = str(Path(base_model).resolve()), str(folder.resolve())
    if Path(os.path.commonpath([base, here])) == Path(Path(base).anchor):
        return base_model
    way = Path(os.path.relpath(base, here)).as_posix()
    return way if way.startswith("..") else f"./{way}"  # a bare name would be one on the hub


def _is_extra(adapted: Adapted, name: str) -> bool:
    return any(name.startswith(f"{module}.") for module in adapted.extra)


def _check_base(adapted: Adapted, base: str, where: str) -> None:
    if adapted.base != base:
        raise UserError(
            f"{where} was trained on another model: its weights hash to {base[:12]}…, this one's to "
            f"{adapted.base[:12]}…; load it into the model that the finetuning began with"
        )


@torch.no_grad()
def _fill(into: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    if into.keys() != tensors.keys():
        name = sorted(into.keys() ^ tensors.keys())[0]
        side = "the model does not train" if name in tensors else "the files lack"
        raise UserError(f"{where} does not fit this model: {side} {name}")
    for name, tensor in tensors.items():
        if tensor.shape != into[name].shape:
            raise UserError(
                f"{where} does not fit this model: {name} is {tuple(tensor.shape)}, here {tuple(into[name].shape)}"
            )
    for name, tensor in tensors.items():
        into[name].copy_(tensor)


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None, str]:
    """Tensors, our metadata (None in files of others) and the text of adapter_config.json."""
    for name in (TENSORS, CONFIG):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no adapter: {name} is missing")
    try:
        check_header(folder / TENSORS)
        with safe_open(folder / TENSORS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            metadata = (file.metadata() or {}).get("minillm")
        text = (folder / CONFIG).read_text(encoding="utf-8")
        return tensors, None if metadata is None else json.loads(metadata), text
    except (SafetensorError, ValueError) as error:
        raise DamagedFile(f"{folder}: {TENSORS} or {CONFIG} is damaged: {error}") from error


def _digest(tensors: Mapping[str, Tensor], text: str, about: Mapping[str, Any]) -> str:
    """SHA-256 of everything that is written."""
    digest = hashlib.sha256(json.dumps([text, about], sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

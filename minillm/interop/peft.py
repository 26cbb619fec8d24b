"""A finetuned model as the PEFT library has it: the method's own files, and its base as a folder for Transformers.

    adapter_config.json  adapter_model.safetensors     what LoRA, AdaLoRA, prefix or a soft prompt learned
    base/                                              the model that it goes into, a task's trained head included

PeftModel.from_pretrained(<model of folder/base>, folder) must give the same logits before the folder takes its name.
The config names its base by the way from the adapter, so that the folder may be moved: PEFT's Auto classes, which count
from where they run, find it from inside the folder.
"""

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillm.config import UserError
from minillm.interop.export import NOTHING, Beside, Content, content_of, export, fresh_folder
from minillm.interop.families import FAMILIES, SPLIT, TRANSPOSED
from minillm.interop.verification import open_theirs, quiet, verify
from minillm.peft import exchange
from minillm.peft.files import CONFIG, TENSORS
from minillm.peft.inject import Adapted
from minillm.peft.places import Place

BASE = "base"


def places(content: Content) -> dict[str, Place]:
    """Where each of our layers stands in their model, from the table that its weights are written by."""
    family, config = FAMILIES[content.family], content.config
    found: dict[str, Place] = {}
    for row in family.rows({"encoder": config.layers, "decoder": config.decoder_layers or config.layers}):
        if row.theirs.endswith(".weight"):
            module = content.prefix + row.theirs.removesuffix(".weight")
            for part, name in enumerate(row.ours):
                transposed = row.how in (TRANSPOSED, SPLIT)
                found[name.removesuffix(".weight")] = Place(module, part, len(row.ours), transposed)
    return found


def export_adapter(adapted: Adapted, tokenizer: Any, out: str | Path, beside: Beside = NOTHING) -> list[str]:
    """`export` of a model with a method in it. Raises `UserError` too for a method that PEFT lacks, and where the
    library is not installed; then nothing stays behind."""
    method, head = adapted.config.method, beside.task is not None
    if not exchange.is_exchangeable(adapted) or (head and method in ("prefix", "prompt")):
        where = " for a task with a head" if head else ""
        raise UserError(
            f"method={method}{where} has no place in PEFT's format; lora and adalora have one, and prefix and prompt "
            "of a decoder that writes"
        )
    _require_peft()
    plain = copy.deepcopy(adapted)
    plain.remove()
    content = content_of(plain.model, beside)
    with fresh_folder(out) as folder:
        notes = export(plain.model, tokenizer, folder / BASE, beside)
        _write(folder, adapted, content)
        _verify(folder, adapted, beside.task, content)
    return notes


def _write(folder: Path, adapted: Adapted, content: Content) -> None:
    from safetensors.torch import save_file

    tensors, values = exchange.write(adapted, places(content).__getitem__)
    values["base_model_name_or_path"] = f"./{BASE}"  # a bare name would be one on the hub
    if content.head:
        values["task_type"] = None  # the head stands in the base; PEFT would train a copy of it
    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, folder / TENSORS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _verify(folder: Path, adapted: Adapted, task: Mapping[str, Any] | None, content: Content) -> None:
    """Raises `UserError` unless PEFT, on the exported base, computes what the model does."""
    model = copy.deepcopy(adapted.model).cpu().float().eval()
    room = content.config.context - sum(front.length for front in adapted.fronts.values())
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about names in Transformers that it still asks for
        import peft

        base = open_theirs(folder / BASE, content.architecture)
        opened = peft.PeftModel.from_pretrained(base, str(folder)).eval()
        verify(opened, model, task, content.architecture, context=room)


def _require_peft() -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import peft  # noqa: F401
    except ImportError:
        raise UserError('the export is opened with PEFT before it counts: pip install "minillm[hf]"') from None

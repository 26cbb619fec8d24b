"""`minillm export MODEL --format hf|peft --out DIR`: a model as a folder that Transformers opens without custom code.

The folder is opened again with Transformers, or PEFT, before it counts: outputs and token ids must be the model's.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from minillm.config import UserError
from minillm.interop.export import Beside, export
from minillm.interop.peft import BASE, export_adapter
from minillm.loading import Opened, open_model
from tokenizer.chat import JINJA_TEMPLATE


@dataclass(frozen=True)
class Args:
    model: tyro.conf.Positional[Path]
    """A run folder, a checkpoint folder, or a folder in Hugging Face's format."""
    out: Path
    """The folder to write; it must not hold anything."""
    format: Literal["hf", "peft"] = "hf"
    """hf: config.json, model.safetensors and the tokenizer's files with the chat template; LoRA and AdaLoRA are merged,
    a task's head goes along. peft: adapter_config.json and adapter_model.safetensors of lora, adalora, prefix or
    prompt, and the model that they go into under base/."""


def main(argv: list[str]) -> int:
    args = tyro.cli(Args, prog="minillm export", description=__doc__, args=argv)
    FORMATS[args.format](args)
    return 0


def _hf(args: Args) -> None:
    opened = open_model(args.model)
    if opened.adapted is not None and (opened.adapted.fronts or opened.adapted.grown):
        method = opened.adapted.config.method
        raise UserError(
            f"{args.model} was finetuned with method={method}, which no model of Transformers' has; "
            "full, freeze, lora and adalora can be exported"
        )
    _tell(export(opened.model, opened.tokenizer, args.out, beside(opened)))
    print(f"{args.out}: opened with Transformers, and its outputs and token ids are the model's")


def _peft(args: Args) -> None:
    opened = open_model(args.model, merge=False)
    if opened.adapted is None:
        raise UserError(f"{args.model} was not finetuned here, so there is no adapter in it; take --format hf")
    _tell(export_adapter(opened.adapted, opened.tokenizer, args.out, beside(opened)))
    print(f"{args.out}: opened with PEFT on {args.out / BASE}, and its outputs and token ids are the model's")


def beside(opened: Opened) -> Beside:
    """What goes along with the weights."""
    section = opened.config.get("task")
    return Beside(
        task=section if section and section.get("head") is not None else None,
        pooler=opened.pooler,
        chat_template=template_of(opened.tokenizer),
        start=opened.start,
        rows=bool(section) and section["name"] == "seq2seq",
    )


def _tell(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def template_of(tokenizer: Any) -> str | None:
    """The one chat template, where the tokenizer has its roles."""
    return JINJA_TEMPLATE if {"system", "user", "assistant"} <= tokenizer.special.keys() else None


FORMATS = {"hf": _hf, "peft": _peft}

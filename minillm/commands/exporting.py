"""`minillm export MODEL --format hf --out DIR`: a model as a folder that Transformers opens without custom code.

The folder is opened again with Transformers before it counts: logits and token ids must be the model's.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from minillm.config import UserError
from minillm.interop.export import export
from minillm.loading import open_model
from tokenizer.chat import JINJA_TEMPLATE


@dataclass(frozen=True)
class Args:
    model: tyro.conf.Positional[Path]
    """A run folder, a checkpoint folder, or a folder in Hugging Face's format."""
    out: Path
    """The folder to write; it must not hold anything."""
    format: Literal["hf"] = "hf"
    """hf: config.json, generation_config.json, model.safetensors, the tokenizer's files with the chat template."""


def main(argv: list[str]) -> int:
    args = tyro.cli(Args, prog="minillm export", description=__doc__, args=argv)
    FORMATS[args.format](args)
    return 0


def _hf(args: Args) -> None:
    opened = open_model(args.model)
    method = (opened.config.get("method") or {}).get("method")
    if method in ("adapter", "prefix", "prompt"):
        raise UserError(f"{args.model} was finetuned with method={method}, which no model of Transformers' computes")
    section = opened.config.get("task") or {}
    if section.get("head") is None:
        section = None
    notes = export(
        opened.model, opened.tokenizer, args.out, task=section, pooler=opened.pooler,
        chat_template=template_of(opened.tokenizer),
    )  # fmt: skip
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    outputs = "logits" if section is None else f"outputs for {section['name']}"
    print(f"{args.out}: opened with Transformers, and its {outputs} and token ids are the model's")


def template_of(tokenizer: Any) -> str | None:
    """The one chat template, where the tokenizer has its roles."""
    return JINJA_TEMPLATE if {"system", "user", "assistant"} <= tokenizer.special.keys() else None


FORMATS = {"hf": _hf}

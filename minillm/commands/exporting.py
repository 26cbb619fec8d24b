"""`minillm export MODEL --format hf --out DIR`: a model as a folder that Transformers opens without custom code.

The folder is opened again with Transformers before it counts: logits and token ids must be the model's.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from minillm.interop.export import export
from minillm.loading import load
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
    model, tokenizer = load(args.model)
    notes = export(model, tokenizer, args.out, chat_template=template_of(tokenizer))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{args.out}: opened with Transformers, and its logits and token ids are the model's")


def template_of(tokenizer: Any) -> str | None:
    """The one chat template, where the tokenizer has its roles."""
    return JINJA_TEMPLATE if {"system", "user", "assistant"} <= tokenizer.special.keys() else None


FORMATS = {"hf": _hf}

"""`minillm inspect MODEL --text TEXT`: the inside of a model on one text, as one page that loads nothing.

The loss of each token, attention maps, the logit lens, the loss without each head, and gradients from block to block.
A decoder is scored on each next token, an encoder on each token masked in turn.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from minillm.commands.running import say
from minillm.config import UserError
from minillm.data.records import read_records
from minillm.inspection.measures import inspect, reading
from minillm.inspection.page import page
from minillm.loading import Opened, open_model
from minillm.training.plan import choose_device


@dataclass(frozen=True)
class Args:
    model: tyro.conf.Positional[Path]
    """A run folder, a checkpoint folder, or a folder in Hugging Face's format: a decoder or an encoder."""
    text: str | None = None
    input: Path | None = None
    """In the place of --text: the first text of a .jsonl (.csv, .tsv, .json) with "text", or the first line of a .txt
    that is not empty."""
    out: Path | None = None
    """The page; None: inspect.html."""
    overwrite: bool = False
    """A page that is there already is replaced."""
    max_tokens: int = 48
    """Tokens that are read; a map has the square of it."""
    json: bool = False
    """The numbers as one object on stdout, and no page."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


def main(argv: list[str]) -> int:
    args = tyro.cli(Args, prog="minillm inspect", description=__doc__, args=argv)
    out = args.out or Path("inspect.html")
    if args.json and (args.out is not None or args.overwrite):
        raise UserError("--json writes no page: leave --out and --overwrite out")
    if not args.json:
        check_place(out, overwrite=args.overwrite)
    text, device = text_of(args), choose_device(args.device)
    opened = open_model(args.model, device=device)
    found = inspected(opened, text, args.max_tokens)
    if args.json:
        print(json.dumps({"model": str(args.model), **found}, ensure_ascii=False))
        return 0
    out.write_text(page(str(args.model), found), encoding="utf-8")
    print(out)
    return 0


def check_place(out: Path, *, overwrite: bool) -> None:
    """Raises `UserError` where no page can be written to `out`, or one would be lost."""
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already; --overwrite replaces it, or give another --out")


def text_of(args: Args) -> str:
    """What is read. Raises `UserError` where neither or both are given, or there is no text."""
    if (args.text is None) == (args.input is None):
        raise UserError("give what is to be read: either --text TEXT or --input FILE")
    if args.input is None:
        text = args.text or ""
    else:
        texts = (record.text("text", may_be_empty=True) for record in read_records(args.input))
        text = next(filter(str.strip, texts), "")
    if not text.strip():
        raise UserError(f"{args.input or '--text'} is empty; give a text")
    return text


def inspected(opened: Opened, text: str, most: int) -> dict[str, Any]:
    """`inspect`'s values; what does not fit `most` tokens or the context is cut from the end, and said."""
    model, tokenizer = opened.transformer.float().requires_grad_(True), opened.tokenizer
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:
        raise UserError(f"the text cannot be encoded: {error}") from error
    whole_frame = model.config.shape == "encoder" and "imported" in opened.config
    before, behind = opened.frame if whole_frame else ([tokenizer.document_id], [])
    room = min(most, model.config.context) - len(before) - len(behind)
    if room < 1:
        raise UserError(
            f"--max-tokens {most} and a context of {model.config.context} leave no room for a text; "
            f"with its special tokens it needs {len(before) + len(behind) + 1} or more"
        )
    if len(ids) > room:
        limit = "the context" if room + len(before) + len(behind) < most else "--max-tokens"
        say(f"note: {limit} leaves room for the first {room} of the text's {len(ids)} tokens")
    if opened.config.get("task", {}).get("head"):
        say("note: the losses are those of the language head, which training for the task did not keep up")
    read = reading(model, ids[:room], (before, behind), tokenizer.mask_id)
    values = inspect(model, read, lambda i: name_of(tokenizer, i))
    return {"text_tokens": len(ids), "read_tokens": min(room, len(ids)), **values}


def name_of(tokenizer: Any, i: int) -> str:
    """A token's own text; of a special one, or of a part of a character, the tokenizer's name for it."""
    if i >= tokenizer.vocab_size:  # a row that only fills up the matrix, and that a model may still find likely
        return f"<|row {i}|>"
    text = tokenizer.decode([i, i])[len(tokenizer.decode([i])) :]  # some tokenizers drop the space before the first
    return text if text and "\N{REPLACEMENT CHARACTER}" not in text else tokenizer.pieces[i]

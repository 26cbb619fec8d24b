"""`minillm inspect MODEL --text TEXT`: the inside of a model on one text, as one page that loads nothing.

The loss of each token, attention maps, the logit lens, the loss without each head, and gradients from block to block.
A decoder is scored on each next token, an encoder on each token masked in turn, an encoder-decoder on each next token
of --target, having read --text.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from minillm.commands.running import say
from minillm.config import UserError
from minillm.data.records import read_records
from minillm.inspection.measures import inspect
from minillm.inspection.page import page
from minillm.inspection.reading import reading
from minillm.loading import Opened, open_model
from minillm.training.plan import choose_device


@dataclass(frozen=True)
class Args:
    model: tyro.conf.Positional[Path]
    """A run folder, a checkpoint folder, or a folder in Hugging Face's format."""
    text: str | None = None
    """What is read; of an encoder-decoder what its encoder reads."""
    target: str | None = None
    """encoder-decoder: what its decoder is to say."""
    input: Path | None = None
    """In their place: the first text of a .jsonl (.csv, .tsv, .json) with "text", or with "source" and "target", or the
    first line of a .txt that is not empty."""
    out: Path | None = None
    """The page; None: inspect.html."""
    overwrite: bool = False
    """A page that is there already is replaced."""
    max_tokens: int = 48
    """Tokens that are read, of a source as many again; a map has the square of it."""
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
    check_texts(args)
    opened = open_model(args.model, device=choose_device(args.device))
    text, source = texts_of(args, pair=opened.transformer.config.shape == "encoder-decoder")
    found = inspected(opened, text, source, args.max_tokens)
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


def check_texts(args: Args) -> None:
    """Raises `UserError` for what no model could read: said before one is opened, which may take a while."""
    if (args.text is None) == (args.input is None) or (args.target is not None and args.input is not None):
        raise UserError("give what is to be read: either --text TEXT (and --target TEXT) or --input FILE")
    for name, text in (("--text", args.text), ("--target", args.target)):
        if text is not None and not text.strip():
            raise UserError(f"{name} is empty; give a text")


def texts_of(args: Args, *, pair: bool) -> tuple[str, str | None]:
    """(what is scored, of a `pair` the source that its encoder reads). Raises `UserError` where one is missing."""
    if args.text is not None:
        if pair and args.target is None:
            raise UserError("an encoder-decoder reads --text and is scored on --target; give both")
        if not pair and args.target is not None:
            raise UserError("--target is for an encoder-decoder, and this model is none; leave it out")
        return (args.text, None) if args.target is None else (args.target, args.text)
    assert args.input is not None
    keys = ("target", "source") if pair else ("text",)
    for record in read_records(args.input):
        record.require(keys, "this model's")
        text, *source = (record.text(key, may_be_empty=True) for key in keys)
        if text.strip() and all(map(str.strip, source)):
            return text, (source[0] if pair else None)
    raise UserError(f"{args.input} is empty; give a text")


def inspected(opened: Opened, text: str, source: str | None, most: int) -> dict[str, Any]:
    """`inspect`'s values; what does not fit `most` tokens or the context is cut from the end, and said."""
    model, tokenizer = opened.transformer.float().requires_grad_(True), opened.tokenizer
    frame = opened.frame if model.config.shape == "encoder" and "imported" in opened.config else None
    asked, read_source = {}, None
    if source is not None:
        ids, asked = _encoded(opened, "the source", source, opened.frame, most)
        read_source = [*opened.frame[0], *ids, *opened.frame[1]]
        frame = (opened.start, [])
    frame = frame or ([tokenizer.document_id], [])
    ids, counts = _encoded(opened, "the text" if source is None else "the target", text, frame, most)
    if opened.config.get("task", {}).get("head"):
        say("note: the losses are those of the language head, which training for the task did not keep up")
    read = reading(model, ids, frame, tokenizer.mask_id, read_source)
    values = inspect(model, read, lambda i: name_of(tokenizer, i))
    if source is not None:
        values["source"] |= asked
    return counts | values


def _encoded(
    opened: Opened, name: str, text: str, frame: tuple[list[int], list[int]], most: int
) -> tuple[list[int], dict[str, int]]:
    """(ids that fit beside those of `frame`, how many of how many these are). Raises `UserError` where none fits."""
    try:
        ids = opened.tokenizer.encode(text)
    except ValueError as error:
        raise UserError(f"{name} cannot be encoded: {error}") from error
    special, context = len(frame[0]) + len(frame[1]), opened.transformer.config.context
    room = min(most, context) - special
    if room < 1:
        raise UserError(
            f"--max-tokens {most} and a context of {context} leave no room for {name}; "
            f"with its special tokens it needs {special + 1} or more"
        )
    if len(ids) > room:
        limit = "the context" if context < most else "--max-tokens"
        say(f"note: {limit} leaves room for the first {room} of {name}'s {len(ids)} tokens")
    return ids[:room], {"text_tokens": len(ids), "read_tokens": min(room, len(ids))}


def name_of(tokenizer: Any, i: int) -> str:
    """A token's own text; of a special one, or of a part of a character, the tokenizer's name for it."""
    if i >= tokenizer.vocab_size:  # a row that only fills up the matrix, and that a model may still find likely
        return f"<|row {i}|>"
    text = tokenizer.decode([i, i])[len(tokenizer.decode([i])) :]  # some tokenizers drop the space before the first
    return text if text and "\N{REPLACEMENT CHARACTER}" not in text else tokenizer.pieces[i]

"""`minillm data prepare | clean | verify | download`: a corpus made ready before training."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from minillm.commands.corpus import list_skipped, tokenize
from minillm.config import DamagedFile, UserError
from minillm.data import cleaning, download, shards
from minillm.data.sources import open_source
from minillm.loading import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Tokenize a SOURCE into memory-mapped shards, which `train.py --data DIR` then reads."""

    data: str
    """stdlib, installed, a file, or a folder of text."""
    tokenizer: Path
    """Folder of the tokenizer; a copy goes along with the shards."""
    out: Path
    validation: float = 0.05
    """Share of the text that is held out."""
    workers: int | None = None
    """Processes. None: one for each core, and below 64 MB of files this one alone."""
    shard_tokens: int = 100_000_000
    """Tokens in one file."""
    overwrite: bool = False
    """Replace --out where it exists."""


@dataclass(frozen=True, kw_only=True)
class Clean:
    """Drop what is no text, too short or there already (near duplicates included), and say how much that was."""

    data: str
    """stdlib, installed, a file, or a folder of text."""
    out: Path
    """Folder of part-00000.jsonl … and report.json, which lists what was dropped."""
    shortest: int = cleaning.Rules.shortest
    """Characters that a document needs."""
    control: float = cleaning.Rules.control
    """Largest share of control characters."""
    similarity: float | None = cleaning.Rules.similarity
    """Share of common 5-word stretches from which a document is a near duplicate. None: those stay."""
    overwrite: bool = False
    """Replace --out where it exists."""
    json: bool = False
    """Print the counts as one JSON object."""


@dataclass(frozen=True)
class Verify:
    """Read every byte of a folder of shards and compare it with the checksums; exit code 3 where one differs."""

    folder: tyro.conf.Positional[Path]


@dataclass(frozen=True)
class Download:
    """Fetch one file over HTTPS, whole or not at all."""

    url: tyro.conf.Positional[str]
    out: Path
    sha256: str | None = None
    """Hex digits that the file must hash to."""
    limit: int | None = None
    """Bytes after which to give up."""
    overwrite: bool = False
    """Replace --out where it exists."""


def main(argv: list[str]) -> int:
    kinds = {"prepare": (Prepare, _prepare), "clean": (Clean, _clean), "verify": (Verify, _verify)}
    kinds["download"] = (Download, _download)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n", file=sys.stdout if argv else sys.stderr)
        for name, (kind, _) in kinds.items():
            print(f"  minillm data {name:<9} {kind.__doc__}", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] not in kinds:
        raise UserError(f"unknown command data {argv[0]}; there are: {', '.join(kinds)}")
    kind, run = kinds[argv[0]]
    return run(tyro.cli(kind, prog=f"minillm data {argv[0]}", description=kind.__doc__, args=argv[1:]))


def _prepare(args: Prepare) -> int:
    if not 0 < args.validation < 1:
        raise UserError(f"--validation must be between 0 and 1, not {args.validation}")
    for name in ("workers", "shard_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    source, tokenizer = open_source(args.data), load_tokenizer(args.tokenizer)
    prepared = tokenize(
        source,
        args.out,
        tokenizer,
        validation=args.validation,
        workers=args.workers,
        shard_tokens=args.shard_tokens,
        overwrite=args.overwrite,
    )
    tokenizer.save(args.out / "tokenizer")
    info = prepared.info
    print(f"documents  {info['documents']:>15,}   split {info['split']}")
    print(f"bytes      {info['bytes']:>15,}   {info['bytes_per_token']:.3f} a token")
    print(f"training   {info['train_tokens']:>15,} tokens")
    print(f"validation {info['val_tokens']:>15,} tokens")
    print(f"next: python train.py --data {args.out}")
    return 0


def _clean(args: Clean) -> int:
    source = open_source(args.data)
    rules = cleaning.Rules(shortest=args.shortest, control=args.control, similarity=args.similarity)
    with _bar(source.size, "cleaning") as bar:
        report = cleaning.clean(
            source, args.out, rules, overwrite=args.overwrite, progress=lambda done, _: bar.update(done - bar.n)
        )
    list_skipped(source)
    if args.json:
        print(json.dumps(report.as_dict()))
        return 0
    print(f"{'':<16}{'documents':>12}{'bytes':>18}")
    print(f"{'before':<16}{report.documents[0]:>12,}{report.bytes[0]:>18,}")
    for reason, (documents, size) in report.dropped.items():
        print(f"{'- ' + reason:<16}{documents:>12,}{size:>18,}")
    print(f"{'after':<16}{report.documents[1]:>12,}{report.bytes[1]:>18,}")
    print(f"next: minillm data prepare --data {args.out} --tokenizer DIR --out DIR")
    return 0


def _verify(args: Verify) -> int:
    problems = shards.verify(args.folder)
    if (args.folder / "tokenizer").is_dir():
        try:
            load_tokenizer(args.folder / "tokenizer")
        except UserError as error:
            problems.append(str(error))
    if not problems:
        print(f"{args.folder}: every byte is as it was written")
        return 0
    raise DamagedFile("\n".join(problems))


def _download(args: Download) -> int:
    with tqdm(unit="B", unit_scale=True, desc="downloading", disable=None, file=sys.stderr) as bar:

        def progress(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        size, sha256 = download.download(
            args.url, args.out, sha256=args.sha256, limit=args.limit, overwrite=args.overwrite, progress=progress
        )
    print(f"{args.out}: {size:,} bytes, SHA-256 {sha256}")
    return 0


def _bar(total: int | None, what: str) -> tqdm:
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None, file=sys.stderr)

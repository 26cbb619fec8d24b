"""`python -m benchmarks tokenizer`: how well and how fast the tokenizer works.

Trains on the standard library's source on this machine (tests left out), then measures training, encoding and decoding
in megabytes (10⁶ bytes of UTF-8) a second of that text, on one thread unless it says otherwise, and bytes per token by
kind of text beside GPT-2's vocabulary (`tokenizer.compression`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import records, timing
from benchmarks.records import Row
from minillm.data.sources import open_source
from tokenizer import Tokenizer, compression
from tokenizer.trainer import train

FULL = {"vocab_size": 4096, "bytes": None, "rounds": 5}
QUICK = {"vocab_size": 512, "bytes": 300_000, "rounds": 3}


def run(out: Path, *, quick: bool) -> int:
    """Measure, print, and write out/<device>/tokenizer.json."""
    size = QUICK if quick else FULL
    texts = corpus(size["bytes"])
    about = records.provenance("sentencepiece") | {"quick": quick}
    rows = [row | about for row in measure(texts, size["vocab_size"], size["rounds"])]
    path = out / records.slug(about["device"]) / "tokenizer.json"
    records.save(path, records.merge(records.load(path), rows))
    print(report(rows))
    print(f"written to {path}")
    return 0


def corpus(limit: int | None) -> list[str]:
    """Texts of the standard library's source, from the first file on, until `limit` bytes are reached."""
    texts, size = [], 0
    for document in open_source("stdlib").documents():
        if limit is not None and size >= limit:
            break
        texts.append(document.text)
        size += len(document.text.encode())
    return texts


def measure(texts: list[str], vocab_size: int, rounds: int) -> list[Row]:
    """Rows of speed (mb_p20, mb_p50, mb_p80: MB a second) and of compression, without provenance."""
    size = sum(len(text.encode()) for text in texts)
    made: dict[str, Any] = {}

    def training() -> None:
        made["tokenizer"] = train(texts, vocab_size=vocab_size)

    times: dict[str, list[float]] = {"train": timing.wall(training)}
    tokenizer: Tokenizer = made["tokenizer"]
    ids = [tokenizer.encode(text) for text in texts]
    steps: dict[str, Callable[[], object]] = {
        "encode": lambda: [tokenizer.encode(text) for text in texts],
        "encode, all cores": lambda: tokenizer.encode_batch(texts),
        "decode": lambda: [tokenizer.decode(row) for row in ids],
    }
    samples, failed = timing.interleaved(
        {name: lambda step=step: timing.wall(step) for name, step in steps.items()}, rounds=rounds, pause=0
    )
    if failed:
        raise ValueError("; ".join(failed.values()))
    shape = {"vocab_size": vocab_size, "bytes": size}
    speed = [
        {"kernel": f"speed of {name}", "shape": shape} | rates(size, milliseconds)
        for name, milliseconds in (times | samples).items()
    ]
    kinds = [
        {"kernel": f"compression of {row.kind}", "shape": shape, **row._asdict()}
        for row in compression.compression(tokenizer)
    ]
    whole = {"bytes": size, "tokens": sum(map(len, ids)), "bytes_per_token": size / sum(map(len, ids))}
    own = {"kernel": "compression of its own corpus", "shape": shape, "kind": "the text it was trained on", **whole}
    return [*speed, *kinds, own]


def rates(size: int, milliseconds: list[float]) -> Row:
    """Megabytes a second: the slowest fifth of the times gives the lowest rates."""
    return timing.summary_of_rates(size / 1e6, milliseconds, "mb")


def report(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if "mb_p50" in row:
            lines.append(
                f"{row['kernel'].removeprefix('speed of '):28}{row['mb_p50']:8.2f} MB/s"
                f" ({row['mb_p20']:.2f} to {row['mb_p80']:.2f}, {row['samples']} rounds)"
            )
        else:
            gpt2 = row.get("gpt2_bytes_per_token")
            lines.append(
                f"{row['kind']:28}{row['bytes_per_token']:8.2f} bytes a token" + (f", GPT-2 {gpt2:.2f}" if gpt2 else "")
            )
    return "\n".join(lines)

"""A tokenizer that needs no training: id = 4 + byte, and four special ids before."""

from collections.abc import Callable
from pathlib import Path

import pytest

from minillm.data.shards import Shards, prepare
from minillm.data.sources import open_source

DOCUMENT, VOCAB, HASH = 2, 260, "ab" * 32


def encode(texts: list[str]) -> list[list[int]]:
    return [[4 + byte for byte in text.encode()] for text in texts]


def decode(ids) -> bytes:
    return bytes(int(i) - 4 for i in ids if i >= 4)


Prepare = Callable[..., Shards]


@pytest.fixture
def prepared(tmp_path: Path) -> Prepare:
    """prepared(source path, **options) -> shards of it in tmp_path/shards"""

    def make(source: Path | str, out: Path | None = None, **options) -> Shards:
        common = {"encode": encode, "tokenizer_hash": HASH, "vocab_size": VOCAB, "document_id": DOCUMENT, "workers": 1}
        return prepare(open_source(str(source)), out or tmp_path / "shards", **{**common, **options})

    return make


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of 60 documents, two of them equal, one empty."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02d}.txt").write_text("" if i == 7 else f"document {i % 59}: " + "x" * (3 * i % 59) + "\n")
    return folder

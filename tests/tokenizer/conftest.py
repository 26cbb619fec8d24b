"""Tokenizers of each type, trained once on the standard library's source."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenizer import Tokenizer, train


def source_files(characters: int) -> Iterator[str]:
    """Texts of the standard library's modules, in the order of their names, up to about so many characters."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_bytes().decode(errors="replace")
        yield text
        characters -= len(text)
        if characters < 0:
            return


@pytest.fixture(scope="session")
def source() -> list[str]:
    return list(source_files(2_500_000))


@pytest.fixture(scope="session")
def bpe(source: list[str]) -> Tokenizer:
    return train(source, type="bpe", vocab_size=4096)


@pytest.fixture(scope="session")
def unigram() -> Tokenizer:
    return train(source_files(400_000), type="unigram", vocab_size=1500)


@pytest.fixture(scope="session")
def char(source: list[str]) -> Tokenizer:
    return train(source[:20], type="char")


@pytest.fixture(params=["bpe", "unigram"])
def any_text(request: pytest.FixtureRequest) -> Tokenizer:
    """A tokenizer of each type that encodes every text."""
    return request.getfixturevalue(request.param)

"""A text to learn from, made once."""

from pathlib import Path

import pytest

from tests.training.running import write_text


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("corpus") / "text.txt")

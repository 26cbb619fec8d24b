"""What the tests of benchmarks start from."""

import pytest

from benchmarks import runs
from tests.benchmarks.made import Commands


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Instead of minillm, for the benchmarks that are made of its commands."""
    made = Commands()
    monkeypatch.setattr(runs, "finish", made.finish)
    monkeypatch.setattr(runs, "minillm", made.minillm)
    return made

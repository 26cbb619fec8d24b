"""The tests of the kernels are themselves tested: they must notice a changed line."""

import os
import subprocess
import sys

import pytest

from tests.kernels.mutations import MUTATIONS, QUICK, ROOT, SAMPLE, Mutation, mutated


def run_mutations(*arguments: str) -> str:
    """What the runner prints; in a process of its own, which has not imported the kernels."""
    return subprocess.run(
        [sys.executable, "-m", "tests.kernels.mutations", *arguments],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip


def test_every_change_still_applies_to_exactly_one_place():
    assert len(MUTATIONS) >= 40 and len(set(MUTATIONS)) == len(MUTATIONS)
    assert all((ROOT / "tests/kernels" / mutation.tests).exists() for mutation in MUTATIONS)
    for mutation in MUTATIONS:
        before, after = (ROOT / "kernels" / mutation.file).read_text(encoding="utf-8"), mutated(mutation)
        changed = [(a, b) for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b]
        assert len(changed) == 1, f"{mutation} changes {len(changed)} lines"


def test_a_change_that_lost_its_place_is_refused():
    for old, times in (("no such line", "0"), ("tl.load", "[2-9]")):
        with pytest.raises(ValueError, match=rf"kernels/cross_entropy.py holds '{old}' {times} times, not once"):
            mutated(Mutation("cross_entropy.py", old, "", "test_cross_entropy.py"))


def test_five_changes_are_noticed():
    printed = run_mutations("--quick")
    assert len(QUICK) == 5 and printed.endswith("5 tried, 0 survived\n"), printed


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_forty_changes_are_noticed():
    printed = run_mutations("--sample")
    assert len(SAMPLE) == 40 and printed.endswith("40 tried, 0 survived\n"), printed

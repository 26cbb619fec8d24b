"""Which examples are trained on, which choose the best weights, and which only score what came out.

    as it is       train | val            val is a seeded tenth, or a file
    a test file    train | val | test     test is that file
    fold k of K    train | val | test     test is a K-th that no choice has seen; the rest is divided as without folds

Early stopping takes the best of several models and thresholds are tuned, both on val: its figures flatter a little.
Those of test do not, and over all K folds every example is in test once (Stone 1974).
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from minillm.tasks.task import Task

SHARE = 0.1
"""Of the examples that are held out where no validation data is named."""


@dataclass(frozen=True)
class Division:
    train: Sequence[Any]
    val: Sequence[Any]
    test: Sequence[Any] = ()
    """Empty without folds and without a file of it."""


def divide(
    task: Task,
    examples: Sequence[Any],
    *,
    seed: int,
    val: Sequence[Any] | None = None,
    test: Sequence[Any] = (),
    fold: tuple[int, int] | None = None,
) -> Division:
    """The examples in their parts.

    Args:
        val: validation examples; None: some of `examples`.
        test: test examples, where no fold gives them.
        fold: (k, K), k from 1.

    Raises:
        UserError: too few examples, or one of `val` or `test` with a label that training lacks (with its place).
    """
    named = (*(val or ()), *test)
    if fold is not None:
        assert not test
        examples, test = task.folds(examples, fold[1], seed)[fold[0] - 1]
    train, val = (examples, val) if val is not None else task.hold_out(examples, SHARE, seed)
    known = _names(task, train)
    for example in named:
        for name in sorted(set(task.names(example)) - known):
            example.record.fail(f"the label {name!r} never occurs in the training data; mend it, or add examples of it")
    return Division(train, val, test)


def remarks(task: Task, parts: Division) -> Iterator[str]:
    """What a reader of the figures should know: what was learnt by heart, and what nothing measures."""
    seen = {task.given(example) for example in parts.train}
    for part, name, where in ((parts.val, "validation", "training"), (parts.test, "test", "training or validation")):
        if again := sum(task.given(example) in seen for example in part):
            shown = f"{again:,} of {len(part):,} {name} examples stand in the {where} data too"
            yield f"warning: {shown}: their figures flatter"
        seen |= {task.given(example) for example in part}
        missing = sorted(_names(task, parts.train) - _names(task, part))
        if part and missing:
            shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            yield f"note: no {name} example has {shown}: nothing measures how that is learnt"


def _names(task: Task, examples: Collection[Any]) -> set[str]:
    return {name for example in examples for name in task.names(example)}

"""How a run's minutes are shared out."""

import pytest

from minillm.training.plan import CHOOSING, VALIDATING, _steps_that_fit


@pytest.mark.parametrize(
    ("share", "eval_every", "expected"),
    [
        (VALIDATING, None, (96, 96)),  # two of 2 s, at the start and at the end: more would pass 5 %
        (CHOOSING, None, (88, 18)),  # six: where they choose the best step
        (VALIDATING, 10, (80, 10)),  # as asked for, whatever it takes
    ],
)
def test_validations_take_their_share_of_the_minutes(share: float, eval_every: int | None, expected) -> None:
    steps, every = _steps_that_fit(100.0, 1.0, 2.0, share, eval_every)
    assert (steps, every) == expected
    assert steps * 1.0 + (1 + -(-steps // every)) * 2.0 <= 100.0

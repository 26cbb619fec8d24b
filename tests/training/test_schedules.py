"""The learning rate at every step that a person could name: first, warm, peak, middle, last."""

import itertools
import math

import pytest

from minillm.config import OptimConfig
from minillm.training.schedules import learning_rate

STEPS = 100  # ten of them are warm-up, ninety fall


def rates(schedule: str, **changes) -> list[float]:
    config = OptimConfig(**{"schedule": schedule, "warmup": 0.1, "final_lr": 0.2, **changes})
    return [learning_rate(step, STEPS, config) for step in range(STEPS)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_rises_along_a_line_to_the_peak(schedule: str) -> None:
    found = rates(schedule, decay=0.3)
    assert found[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert found[10] == 1.0 and max(found) == 1.0 and min(found) > 0
    assert rates(schedule, warmup=0.0)[0] == 1.0


def test_values_in_the_middle_and_at_the_end() -> None:
    """At step 55 half of the fall is over; the last step is one of ninety short of the end."""
    last = 89 / 90
    assert rates("cosine")[55] == pytest.approx(0.2 + 0.8 * 0.5)
    assert rates("cosine")[99] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * last)))
    assert rates("linear")[55] == pytest.approx(0.2 + 0.8 * 0.5)
    assert rates("linear")[99] == pytest.approx(0.2 + 0.8 * (1 - last))
    assert rates("constant")[10:] == [1.0] * 90


def test_wsd_falls_in_the_last_share_of_all_steps() -> None:
    found = rates("wsd", decay=0.3)
    assert found[10:71] == pytest.approx([1.0] * 61)
    assert found[71:] == pytest.approx([0.2 + 0.8 * (100 - step) / 30 for step in range(71, 100)])
    assert rates("wsd", decay=0.0)[10:] == [1.0] * 90
    assert rates("wsd", decay=1.0)[10:12] == pytest.approx([1.0, 0.2 + 0.8 * 89 / 90]), "all that is left may fall"


def test_a_range_rises_by_one_factor_from_a_ten_thousandth_to_the_peak_without_warm_up() -> None:
    found = rates("range", warmup=0.5, final_lr=0.9)
    assert found[0] == pytest.approx(1e-4) and found[-1] == 1.0
    assert [b / a for a, b in itertools.pairwise(found)] == pytest.approx([1e4 ** (1 / 99)] * 99)
    assert learning_rate(0, 1, OptimConfig(schedule="range")) == pytest.approx(1e-4), "a run of one step"


def test_a_fall_never_rises() -> None:
    for schedule in ("cosine", "linear", "wsd"):
        found = rates(schedule)[10:]
        assert found == sorted(found, reverse=True)
        assert found[-1] < 0.25

"""The learning-rate range test: which rate suits a run (Smith 2017, https://arxiv.org/abs/1506.01186, section 3.3).

The rate rises exponentially over the run's steps, up to `optim.lr` (see schedules.py). Low rates move nothing, higher
ones let the loss fall, and then it turns. What is read are the lines of the log, losses and the rates they ended with:

    smoothed   mean of a line and the three on either side of it
    noise      standard deviation of such a mean: median |a − 2b + c| / 1.652 / √7 over neighbouring lines a, b, c, to
               which no slope adds
    fell       its lowest value lies more than 5 noises below the first one and below the mean of the first quarter
    turn       the first rate at which it is within 2 noises of its lowest value; no turn where the last one still is
    over       it has risen above its lowest value by half of that and by 12 noises
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minillm.training.charts import finite, number

NEAR = 3
LEVEL, CLEAR, FAR = 2, 5, 12
"""Noises within which a value is as good as the lowest, by which a fall or a rise is one, and by which it is over."""
FEWEST = 20
"""Lines of the log by which anything can be told."""
MARGIN = 3
"""The suggested rate is that of the turn, divided by so much."""


@dataclass(frozen=True)
class Reading:
    curve: list[tuple[float, float]]
    """(rate, smoothed loss)"""
    noise: float
    steepest: float
    """The rate at which it fell the fastest, on its way to the turn."""
    turn: tuple[float, float]
    fell: bool
    turned: bool

    @property
    def suggested(self) -> float | None:
        """A rate for the run itself; None where there is none to name."""
        return self.turn[0] / MARGIN if self.fell and self.turned else None


def applies(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a range test."""
    return ((config.get("settings") or {}).get("optim") or {}).get("schedule") == "range"


def smooth(losses: Sequence[float]) -> list[float]:
    """[n − 6]; the first value stands at the fourth loss."""
    width = 2 * NEAR + 1
    return [math.fsum(losses[i : i + width]) / width for i in range(len(losses) - width + 1)]


def noise(losses: Sequence[float]) -> float:
    bends = [abs(a - 2 * b + c) for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
    return statistics.median(bends) / 1.652 / math.sqrt(2 * NEAR + 1)


def is_over(losses: Sequence[float]) -> bool:
    """Whether higher rates have nothing more to tell."""
    if len(losses) < FEWEST:
        return False
    smoothed = smooth(losses)
    lowest = min(smoothed)
    return smoothed[-1] - lowest > max(lowest / 2, FAR * noise(losses))


def points(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(rate, loss) of the lines of metrics.jsonl."""
    lines = [line for line in metrics if line.get("split") == "train" and finite(line.get("loss"))]
    return [(line["lr"], line["loss"]) for line in lines if finite(line.get("lr"))]


def read(metrics: Sequence[Mapping[str, Any]]) -> Reading | None:
    """What a range test tells; None where its log has too few lines."""
    found = points(metrics)
    rates, losses = [rate for rate, _ in found], [loss for _, loss in found]
    if len(losses) < FEWEST:
        return None
    smoothed = smooth(losses)
    doubt, low, quarter = noise(losses), smoothed.index(min(smoothed)), len(losses) // 4
    turn = next(i for i, loss in enumerate(smoothed) if loss <= smoothed[low] + LEVEL * doubt)
    curve = list(zip(rates[NEAR:-NEAR], smoothed, strict=True))
    before = range(NEAR, max(NEAR, turn) + 1)
    steepest = min(before, key=lambda i: smoothed[min(i + NEAR, len(smoothed) - 1)] - smoothed[i - NEAR])
    broke = any(line.get("event") == "skipped" for line in metrics)
    return Reading(
        curve=curve,
        noise=doubt,
        steepest=curve[steepest][0],
        turn=curve[turn],
        fell=min(smoothed[0], math.fsum(losses[:quarter]) / quarter) - smoothed[low] > CLEAR * doubt,
        turned=broke or smoothed[-1] - smoothed[low] > CLEAR * doubt,
    )


def sentences(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the test came to, in plain words; what it could not find, too."""
    found = read(metrics)
    if found is None:
        return [
            f"The log has {len(points(metrics))} lines; a range test is read from {FEWEST} on: give it more --steps."
        ]
    (first_rate, first), (last_rate, last) = found.curve[0], found.curve[-1]
    tried = f"The rate rose from {rate_text(first_rate)} to {rate_text(last_rate)}"
    doubt = f"give or take {number(found.noise)}"
    if not found.fell:
        went = f"went from {number(first)} to {number(last)} ({doubt})"
        return [f"{tried}, and the loss {went} without a clear fall in between: no rate can be named."]
    fell = f"{tried}; the loss fell the fastest at {rate_text(found.steepest)}"
    if not found.turned:
        return [f"{fell}, and never turned: it ended at {number(last)} ({doubt}), so higher rates may be better."]
    turn, lowest = found.turn
    return [
        f"{fell}, and turned at {rate_text(turn)}, where it was {number(lowest)} ({doubt}).",
        f"For the run itself that suggests --optim.lr {rate_text(turn / MARGIN)}, the turn's divided by {MARGIN}. "
        "This run's weights are not meant to be used.",
    ]


def rate_text(rate: float) -> str:
    return f"{rate:.1e}"

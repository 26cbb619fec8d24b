"""The learning rate over the run, as a share of its peak: pure functions of the step.

warm-up    rises linearly over the first `warmup` share of the steps
cosine     falls along half a cosine to `final_lr` (Loshchilov & Hutter 2016)
linear     falls along a line to `final_lr`
wsd        stays at the peak, and falls along a line in the last `decay` share (warm-up, stable, decay)
constant   stays at the peak
range      rises exponentially from a ten-thousandth of the peak to all of it, without warm-up, to find out which rate
           suits a run (see lr_range.py)
"""

import math
from collections.abc import Callable

from minillm.config import OptimConfig


def _cosine(x: float, config: OptimConfig) -> float:
    return 0.5 * (1 + math.cos(math.pi * x))


def _linear(x: float, config: OptimConfig) -> float:
    return 1 - x


def _stable_decay(x: float, config: OptimConfig) -> float:
    decay = min(config.decay, 1 - config.warmup)  # both are shares of all steps, x one of those after the warm-up
    return min(1.0, (1 - x) * (1 - config.warmup) / decay) if decay else 1.0


def _constant(x: float, config: OptimConfig) -> float:
    return 1.0


FALLS: dict[str, Callable[[float, OptimConfig], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _stable_decay,
    "constant": _constant,
}


RANGE = 1e-4
"""Share of the peak at which `range` begins."""


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Share of the peak rate, in (0, 1], for the step that follows `step` finished ones of `steps`."""
    if config.schedule == "range":
        return RANGE ** (1 - step / max(1, steps - 1))
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    x = (step - warmup) / max(1, steps - warmup)
    return config.final_lr + (1 - config.final_lr) * FALLS[config.schedule](x, config)

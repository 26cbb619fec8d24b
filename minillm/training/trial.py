"""What is fastest on this CPU, found by trying it: precision, threads, how many rows at a time, compiled or not.

No rule of thumb holds: bf16 halved the step of a model 128 wide with 768 tokens in it, and lengthened that of one half
as wide with 64; a few rows at a time may stay in the cache that all of them overflow; small matrices wait for their
threads. So a copy of the model trains a few steps in each way, one knob after another, and a way must be faster by
MARGIN to be taken, lest noise decide. What was chosen stands in config.json, and a resumed run takes it from there.

Fewer threads are tried where nothing else runs on the machine: beside others they would win today and lose tomorrow.
Short runs would lose more than they gain, and processes that train together would have to agree: they take the usual.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from minillm.config import Settings
from minillm.training import plan
from minillm.training.compiling import blocks_as_written, compile_blocks
from minillm.training.memory import rows_each, smaller

MARGIN = 0.05
WORTH = 120.0
"""Seconds of training from which on trying is worth its time."""
SHARE = 0.03
"""Of the planned seconds, how much may go into it: a way that begins within it is tried to its end."""
COMPILING = 600.0
"""Seconds of training from which on a compiled step is tried: to compile takes tens of them."""
QUIET = 0.1
"""Cores that other processes may use for threads to be tried."""
STEPS_EACH = 3
"""Steps that trying a way takes at least: one that warms it up, two that are timed."""


@dataclass(frozen=True)
class Way:
    dtype: str
    threads: int
    micro_batch: int
    compile: bool = False

    def __str__(self) -> str:
        threads, compiled = f"{self.threads} thread{'s' * (self.threads > 1)}", ", compiled" * self.compile
        return f"{self.dtype}, {threads}, {self.micro_batch} at a time{compiled}"


@dataclass
class Trial:
    best: Way
    seconds: dict[Way, float] = field(default_factory=dict)
    """Of a step in each way that was tried, in their order; empty where none was."""

    def tell(self, config: dict[str, Any], say: Callable[[str], None]) -> None:
        """Puts what was tried into what becomes config.json, and into one line."""
        if self.seconds:
            config["tried"] = {str(way): seconds for way, seconds in self.seconds.items()}
            shown = "; ".join(f"{way}: {seconds:.3f} s a step" for way, seconds in self.seconds.items())
            say(f"tried     {shown}")


def choose(
    settings: Settings,
    rehearsal: plan.Rehearsal,
    *,
    micro_batch: int,
    minutes_at_most: float | None = None,
    say: Callable[[str], None] | None = None,
) -> Trial:
    """The fastest way to train, of what the settings leave open; the torch threads are set to it.

    Args:
        micro_batch: the most rows at a time, those that fit the memory.
        minutes_at_most: what the run will take, if its steps would take longer.
        say: takes the compiler's complaint; None: a compiled step is not tried.
    """
    usual = Way(plan.choose_dtype(settings, rehearsal.device), torch.get_num_threads(), micro_batch)
    trial = Trial(usual)
    if rehearsal.device.type != "cpu" or rehearsal.team.size > 1:
        return trial

    def seconds(way: Way) -> float:
        torch.set_num_threads(way.threads)
        budget = {"at_least": STEPS_EACH - 1, "budget": 0.5}
        return plan.measure(settings, rehearsal, way.dtype, way.micro_batch, **budget, of_all=min)[0]

    planned = 60 * min(settings.minutes or math.inf, minutes_at_most or math.inf)
    few = settings.steps is not None and STEPS_EACH > SHARE * settings.steps
    if planned < WORTH or few:
        return trial
    others, began = _others(), time.monotonic()
    first = seconds(usual)
    quiet = _others() - others < QUIET * (time.monotonic() - began)
    if settings.steps is not None:
        planned = min(planned, settings.steps * first)
    if planned < WORTH:
        return trial
    trial.seconds[usual] = first
    for change in _changes(settings, rows_each(rehearsal.batch(0), settings.train.batch), quiet):
        _climb(trial, change, seconds, SHARE * planned)
    torch.set_num_threads(trial.best.threads)
    if say is not None and settings.compile == "auto" and planned >= COMPILING:
        part = next(rehearsal.batch(0).split(trial.best.micro_batch))
        if compile_blocks(rehearsal.objective, rehearsal.model, part, trial.best.dtype, say):
            _climb(trial, lambda way: replace(way, compile=True), seconds, math.inf)
            blocks_as_written(rehearsal.model)
    return trial


def _changes(settings: Settings, each: int, quiet: bool) -> Iterator[Callable[[Way], Way | None]]:
    """For each knob that the settings leave open, what comes after a way; None where nothing does.

    Args:
        each: rows of a sample.
        quiet: whether the machine is this process's alone.
    """
    if settings.dtype == "auto" and plan.cpu_multiplies_bf16():
        yield lambda way: replace(way, dtype="fp32" if way.dtype == "bf16" else "bf16")
    if settings.train.threads is None and quiet:
        yield lambda way: replace(way, threads=way.threads // 2) if way.threads > 1 else None
    if settings.train.micro_batch is None:
        yield lambda way: _fewer(way, smaller(way.micro_batch, settings.train.batch, each=each))


def _others() -> float:
    """Seconds that the machine's cores have worked for other processes; 0 where the system does not say (macOS)."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, *interrupts = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
    ours = os.times()
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - ours.user - ours.system


def _fewer(way: Way, rows: int | None) -> Way | None:
    return None if rows is None else replace(way, micro_batch=rows)


def _climb(trial: Trial, change: Callable[[Way], Way | None], seconds: Callable[[Way], float], room: float) -> None:
    """Changes the best way for as long as that makes it faster, and all that was tried takes less than `room`."""
    while (way := change(trial.best)) is not None and way not in trial.seconds:
        if STEPS_EACH * sum(trial.seconds.values()) > room:
            return
        trial.seconds[way] = seconds(way)
        if trial.seconds[way] > (1 - MARGIN) * trial.seconds[trial.best]:
            return
        trial.best = way

"""What a run will do, decided before its first step: device, precision, threads, and how many steps fit the time.

Everything that was decided or measured here goes into config.json, and a resumed run takes it from there. The choices
are a function of the machine and the settings alone, but for two: the steps that `--minutes` becomes, and how often a
long run is validated, follow from the measured speed, and before a long run on a CPU what is usual is held against
other ways (trial.py).
"""

import copy
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minillm import ops
from minillm.config import DamagedFile, Settings, UserError
from minillm.data.batch import Batch
from minillm.training.distributed import ALONE, Alone
from minillm.training.objectives import Objective, evaluate
from minillm.training.optim import build_optimizers
from minillm.training.units import watch_units

BF16_WIDTH = 128
"""Narrower models spend their time between the matrix products, where bf16 only adds conversions. A long run tries both
(see trial.py)."""


VALIDATING, CHOOSING = 0.05, 0.2
"""Share of a run's time that may go into validations (one at the end there is always), and the same where they choose
the best step and stop early."""
UNNOTICED = 10.0
"""Seconds that the validations of `--steps` may take in any case: a short run does not depend on the clock."""
OF_MINUTES, OF_STEPS = 5, 10
"""Parts of a run, after each of which it is saved. It is validated after some or all of them, so that the weights of
the best step are there."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    device: str
    dtype: str
    kernels: str
    compile: bool
    threads: int
    micro_batch: int
    steps: int
    eval_every: int
    save_every: int
    log_every: int
    seconds_per_step: float
    seconds_per_validation: float
    """Both measured before the run, on a copy of the model."""
    seconds_per_sample: float = 0.0
    """Of what the model writes for people; 0 where it does not."""
    eval_first: bool = True
    """Whether the model is validated before its first step, too."""

    @property
    def sample_steps(self) -> tuple[int, ...]:
        """After which steps the model writes something."""
        return 0, math.ceil(self.steps / 4), self.steps

    @property
    def seconds(self) -> float:
        """What the run will take: steps, validations and samples; writing checkpoints is not foreseen."""
        validations = self.eval_first + math.ceil(self.steps / self.eval_every)
        return (
            self.steps * self.seconds_per_step
            + validations * self.seconds_per_validation
            + len({*self.sample_steps}) * self.seconds_per_sample
        )


def known_plan(config: dict[str, Any], run: Path) -> Plan | None:
    """The plan that the config.json of a begun run holds. Raises `DamagedFile` where it is not complete."""
    known = config.get("plan")
    try:
        if known is None:
            return None
        # A run may have begun before there were the fields that have a default.
        names = [field.name for field in fields(Plan) if field.default is MISSING or field.name in known]
        return Plan(**{name: known[name] for name in names})
    except (KeyError, TypeError):
        raise DamagedFile(f"{run / 'config.json'} is damaged: its plan is not complete") from None


def choose_device(name: str) -> torch.device:
    """Raises `UserError` for a device that this machine does not have."""
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    if not has[name]:
        found = ", ".join(kind for kind, there in has.items() if there)
        raise UserError(f"--device {name}: this machine has none (it has: {found}); take --device auto")
    return torch.device(name)


def choose_dtype(settings: Settings, device: torch.device) -> str:
    """bf16 where the hardware multiplies it and the model is wide enough to gain, else fp32."""
    if settings.dtype != "auto":
        return settings.dtype
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device.type == "cpu" and settings.model.dim >= BF16_WIDTH and cpu_multiplies_bf16():
        return "bf16"
    return "fp32"


def autocast(device: str, dtype: str) -> Callable[[], AbstractContextManager]:
    """The context in which matrix products run in `dtype`."""
    if dtype == "fp32":
        return nullcontext
    return partial(torch.autocast, device, {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])


def cpu_multiplies_bf16() -> bool:
    """Whether the processor has bf16 matrix instructions (AVX512_BF16 or AMX); without them bf16 is emulated."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What steps are timed with before a run."""

    model: nn.Module
    device: torch.device
    objective: Objective
    batch: Callable[[int], Batch]
    """Step -> this process's rows of it."""
    poll: Callable[[], None]
    """Called between the steps; may raise."""
    team: Alone = ALONE


def make_plan(
    settings: Settings,
    rehearsal: Rehearsal,
    *,
    micro_batch: int,
    validation_rows: int,
    scoring: float = 0.0,
    sampling: float = 0.0,
) -> Plan:
    """Decides what the settings left open.

    Args:
        validation_rows: rows of one whole validation, whose time `--minutes` includes.
        scoring: seconds that a validation takes besides its loss.
        sampling: seconds that each of the samples takes.
    """
    device, team = rehearsal.device, rehearsal.team
    dtype = choose_dtype(settings, device)
    steps, train, first = settings.steps, settings.train, True
    share = VALIDATING if train.patience is None else CHOOSING
    if steps is None and settings.minutes is None:
        raise UserError("give the length of the run: --steps N or --minutes M")
    budget = min(8.0, 2.0 * (settings.minutes or 0.5))  # never more than a small part of the time that is planned
    seconds, for_row = measure(settings, rehearsal, dtype, micro_batch, at_least=3, budget=budget)
    validation = validation_rows / team.size * for_row + scoring
    if steps is None:
        time = 60 * settings.minutes
        # Where validations choose the best step, the untrained model is one of those to choose from.
        first = train.eval_every is not None or train.patience is not None or 2 * validation <= share * time
        steps, eval_every = _steps_that_fit(time - 3 * sampling, seconds, validation, share, train.eval_every, first)
        save_every = min(eval_every, math.ceil(steps / OF_MINUTES))
    else:
        save_every = train.eval_every or math.ceil(steps / OF_STEPS)
        spare = max(UNNOTICED, share / (1 - share) * steps * seconds)
        eval_every = train.eval_every or min(steps, save_every * _parts_apart(OF_STEPS, spare / validation - first))
    return Plan(
        device=device.type,
        dtype=dtype,
        kernels=ops.selected(device)[0],
        compile=team.compiles(train)
        and (settings.compile == "on" or (settings.compile == "auto" and device.type == "cuda")),
        threads=torch.get_num_threads(),
        micro_batch=micro_batch,
        steps=steps,
        eval_every=eval_every,
        save_every=train.save_every or save_every,
        log_every=train.log_every or max(1, steps // 100),
        seconds_per_step=seconds,
        seconds_per_validation=validation,
        seconds_per_sample=sampling,
        eval_first=first,
    )


def _steps_that_fit(
    time: float, step: float, validation: float, share: float, eval_every: int | None, first: bool
) -> tuple[int, int]:
    """(steps, eval_every) for `time`, all in seconds, validations at the end, in between and `first` included."""
    if eval_every is not None:
        return max(1, int((time - 2 * validation) / (step + validation / eval_every))), eval_every
    apart = _parts_apart(OF_MINUTES, share * time / validation - first)
    steps = max(1, int((time - (first + math.ceil(OF_MINUTES / apart)) * validation) / step))
    return steps, min(steps, apart * math.ceil(steps / OF_MINUTES))


def _parts_apart(parts: int, affordable: float) -> int:
    """After how many of a run's `parts` it is validated, so often as is affordable, but always at the end."""
    return math.ceil(parts / min(parts, max(1, int(affordable))))


def measure(
    settings: Settings,
    rehearsal: Rehearsal,
    dtype: str,
    micro_batch: int,
    *,
    at_least: int,
    budget: float,
    of_all: Callable[[list[float]], float] = statistics.mean,
) -> tuple[float, float]:
    """Seconds of a training step, and of validating one row; on a copy, so that nothing has moved after.

    Args:
        at_least: timed steps, however long they take.
        budget: seconds for which they go on.
        of_all: what is made of their times. The mean, since a run is a sum: where others use the machine too, some
            steps take twice as long as most. To compare, the shortest is disturbed the least.
    """
    device, objective, team = rehearsal.device, rehearsal.objective, rehearsal.team
    trial = copy.deepcopy(rehearsal.model)
    call = team.spread(trial, settings.train)
    optimizers = build_optimizers(trial, settings.optim, muon=team.muon)
    context = autocast(device.type, dtype)
    numbers = itertools.count()

    def step() -> None:
        rows = rehearsal.batch(next(numbers)).to(device)
        for micro in rows.split(micro_batch):
            with context():
                loss = call(objective, trial, micro) / max(1, rows.counted)
            loss.backward()
            rehearsal.poll()
        torch.nn.utils.clip_grad_norm_(trial.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def seconds(work: Callable[[], object], at_least: int, budget: float) -> float:
        """Of several runs, the first one (allocation, code generation) left out."""
        times: list[float] = []
        while len(times) <= at_least or (sum(times) < budget and len(times) < 50):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(team.slowest(time.perf_counter() - start))
        return of_all(times[1:])

    training = seconds(step, at_least, budget)
    part = next(rehearsal.batch(0).to(device).split(micro_batch))
    with watch_units(trial):
        score = partial(evaluate, trial, [part], context, rehearsal.poll, partial(call, objective))
        scoring = seconds(score, 2, budget / 4)
    return training, scoring / len(part.samples)

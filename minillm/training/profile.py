"""`--profile`: records some steps of a run, and says where their time went.

    part of an operator = where it was called (data, optimizer, one of the ops), else what it is (a product, …)

PyTorch's profiler notes each operator with the time that it took itself, without those that it called. An operator of
the backward pass carries the number of the forward operator whose gradient it computes, and so belongs to the same
part. What no operator took is idle: Python, or on a GPU the wait for work. So the parts add up to the step.
"""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from minillm import ops
from minillm.training import breakdown
from minillm.training.breakdown import Breakdown, Part
from minillm.training.roofs import copy_rate, matrix_rate

WARM, PLAIN, RECORDED = 2, 3, 3
"""Steps: the first ones, in which memory is found and code generated; timed without recording; recorded."""
STEPS = WARM + PLAIN + RECORDED

PRODUCTS, ATTENTION, NORMS, LOSS = "matrix products", "attention", "norms and RoPE", "loss"
OTHER, OPTIMIZER, DATA, IDLE = "other operators", "optimizer and clipping", "data", "idle: no operator running"
PARTS = (PRODUCTS, ATTENTION, NORMS, LOSS, OTHER, OPTIMIZER, DATA, IDLE)

_DOOR = {
    "attention": ATTENTION,
    "rms_norm": NORMS,
    "layer_norm": NORMS,
    "rope": NORMS,
    "linear_cross_entropy": LOSS,
}
"""Functions of `ops`, and the part that they are."""
_WHOLE = (ATTENTION, OPTIMIZER, DATA)
"""Parts to which everything belongs that is called from them, matrix products too."""
_NAMES = [  # of operators and GPU kernels, the first that fits; what the compiler fuses goes by what is in its name
    (re.compile(r"^Optimizer\.|_fused_adam|_foreach_|vector_norm|multi_tensor|newtonschulz"), OPTIMIZER),
    (re.compile(r"scaled_dot_product|flash|fmha|attention|^aten::baddbmm|^aten::bmm"), ATTENTION),
    (re.compile(r"gemm|gemv|cutlass|cublas|nvjet|xmma|^aten::(mm|addmm|linear)\b|mkldnn_linear"), PRODUCTS),
    (re.compile(r"cross_entropy|nll_loss|log_softmax"), LOSS),
    (re.compile(r"rms_norm|layer_norm|rope"), NORMS),
]
_BACKWARD = "autograd::engine::evaluate_function"
_STEP = "minillm: step"


@dataclass
class Profile:
    """Watches the steps of one run; `job.profile` of the loop.

    Args:
        flops: of matrix products and of attention, by the model's formula, for each token.
        whole_flops: of both, as MFU counts them.
        say: tells a person.
    """

    run: Path
    device: torch.device
    dtype: str
    flops: dict[str, float]
    whole_flops: float
    tokens: int
    compiled: bool
    say: Callable[[str], None]
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    """Whose work is counted; they are built later than this."""
    plain: list[float] = field(default_factory=list)
    recorded: list[float] = field(default_factory=list)
    rates: list[tuple[float, float]] = field(default_factory=list)
    """(matrix_rate, copy_rate) before the first and after the last of them: a busy machine is slow at times."""
    seen: int = 0
    recorder: Any = None
    bytes: Counter = field(default_factory=Counter)

    def watch(self, step: Callable[[], None]) -> float:
        """Takes a step, as it is or while recording it, and writes the breakdown after the last one to be recorded.

        Returns the seconds that this has taken besides the step.
        """
        start, before = time.perf_counter(), sum(self.plain) + sum(self.recorded)
        if self.seen >= STEPS or self.seen < WARM:
            self.seen += 1
            step()
            return 0.0
        self.seen += 1
        if self.seen == WARM + PLAIN + 1:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self.recorder = torch.profiler.profile(activities=activities, acc_events=True)  # torch 2.11 warns without
            self.recorder.start()
        if self.recorder is None:
            if not self.rates:
                self._measure_roofs()
            self.plain.append(self._timed(step))
        else:
            with record_function(_STEP), self._marked_operators():
                self.recorded.append(self._timed(step))
        if self.seen == STEPS:
            self._finish()
        return time.perf_counter() - start - (sum(self.plain) + sum(self.recorded) - before) / 1e3

    def batches(self, batch: Callable[[int], Any]) -> Callable[[int], Any]:
        """`batch` with its time counted as that of the data."""

        def marked(step: int) -> Any:
            with record_function(f"minillm: {DATA}"):
                return batch(step)

        return marked

    def _measure_roofs(self) -> None:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.dtype, torch.float32)
        self.rates.append((matrix_rate(self.device, dtype), copy_rate(self.device)))

    def _timed(self, step: Callable[[], None]) -> float:
        self._wait()
        start = time.perf_counter()
        step()
        self._wait()
        return 1e3 * (time.perf_counter() - start)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def _marked_operators(self) -> Iterator[None]:
        """While open, the functions of `ops` leave their part's name in the record, and the bytes that went through.

        Compiled code does not pass by here, and must not be made to: it would be compiled again.
        """
        if self.compiled:
            yield
            return
        before = {name: getattr(ops, name) for name in _DOOR}
        for name, function in before.items():
            setattr(ops, name, self._marked(function, _DOOR[name]))
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(ops, name, function)

    def _marked(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"minillm: {part}"):
                result = function(*args, **kwargs)
            if part == NORMS:  # what is read and written forward; backward the gradients of both
                tensors = _tensors((args, tuple(kwargs.values()), result))
                self.bytes[part] += 2 * sum(x.nbytes for x in tensors)
            return result

        return call

    def _finish(self) -> None:
        self.recorder.stop()
        self._measure_roofs()
        trace = self.run / breakdown.TRACE
        self.recorder.export_chrome_trace(str(trace))
        times, slowest = attribute(self.recorder.events(), self.device.type == "cuda")
        milliseconds = sum(self.recorded) / RECORDED
        times = {part: time / RECORDED for part, time in times.items()}
        times[IDLE] = max(0.0, milliseconds - sum(times.values()))
        work = {
            PRODUCTS: (self.tokens * self.flops[PRODUCTS], 0.0),
            ATTENTION: (self.tokens * self.flops[ATTENTION], 0.0),
            NORMS: (0.0, self.bytes[NORMS] / RECORDED),
            OPTIMIZER: update_work(self.optimizers),
        }
        parts = []
        for name in PARTS:
            flops, moved = work.get(name, (0.0, 0.0))
            parts.append(Part(name=name, milliseconds=times.get(name, 0.0), flops=flops, bytes=moved))
        matrix_rates, copy_rates = zip(*self.rates, strict=True)
        found = Breakdown(
            parts=tuple(parts), milliseconds=milliseconds, unrecorded=sorted(self.plain)[len(self.plain) // 2],
            steps=RECORDED, tokens=self.tokens, flops=self.tokens * self.whole_flops, device=self.device.type,
            dtype=self.dtype, matrix_rate=max(matrix_rates), copy_rate=max(copy_rates),
            slowest=tuple((name, time / RECORDED) for name, time in slowest.most_common(8)),
        )  # fmt: skip
        breakdown.write(self.run, found)
        self.recorder = None
        self.say(breakdown.text(found, trace))


def attribute(events: Iterable[Any], on_gpu: bool) -> tuple[dict[str, float], Counter]:
    """Milliseconds by part, and by operator (on a GPU by kernel), of recorded events; IDLE is left for what remains."""
    events = [e for e in events if e.device_type == DeviceType.CPU]
    steps = [(e.time_range.start, e.time_range.end) for e in events if e.name == _STEP]
    inside = (e for e in events if any(start <= e.time_range.start <= end for start, end in steps))
    part_of: dict[int, str | None] = {}
    forward: dict[int, str | None] = {}  # sequence number -> the part of the operator that drew it
    times: dict[str, float] = defaultdict(float)
    slowest: Counter = Counter()
    for e in sorted(inside, key=lambda e: (e.time_range.start, -e.time_range.end)):  # parents before their children
        above = None if e.cpu_parent is None else part_of.get(id(e.cpu_parent))
        part = _part(e, above, forward)
        part_of[id(e)] = part
        if e.sequence_nr >= 0 and not e.fwd_thread and not e.name.startswith(_BACKWARD):
            forward[e.sequence_nr] = part  # of several with one number it is the last that made the gradient's node
        if on_gpu:
            for kernel in e.kernels:
                own = part if part in _WHOLE else _by_name(kernel.name) or part
                times[own or OTHER] += kernel.duration / 1e3
                slowest[kernel.name] += kernel.duration / 1e3
        elif e.name != _STEP:
            times[part or OTHER] += e.self_cpu_time_total / 1e3
            slowest[e.name] += e.self_cpu_time_total / 1e3
    return dict(times), slowest


def _part(e: Any, above: str | None, forward: dict[int, str | None]) -> str | None:
    """The part of an event that is called from one of part `above`; None where nothing tells."""
    if above in _WHOLE:
        return above
    if e.name.startswith("minillm: "):
        return e.name.removeprefix("minillm: ") if e.name != _STEP else None
    if e.name.startswith(_BACKWARD):
        return forward.get(e.sequence_nr)
    named = _by_name(e.name)
    if named == PRODUCTS or above is None:
        return named or above
    return above


def _by_name(name: str) -> str | None:
    return next((part for pattern, part in _NAMES if pattern.search(name)), None)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple):
        for value in values:
            yield from _tensors(value)


def update_work(optimizers: Iterable[torch.optim.Optimizer]) -> tuple[float, float]:
    """(FLOPs, bytes) that the optimizers' steps cannot do without.

    A gradient is read, a weight and each tensor of its state are read and written. Muon's iteration, on a matrix of
    m by n with m ≤ n, takes five times A = X Xᵀ, A A and B X: 5 (4 m² n + 2 m³).
    """
    flops = moved = 0.0
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            states = [x for x in optimizer.state.get(p, {}).values() if isinstance(x, Tensor) and x.shape == p.shape]
            moved += 3 * p.nbytes + 2 * sum(x.nbytes for x in states)
            if isinstance(optimizer, torch.optim.Muon):
                m, n = sorted(p.shape[-2:])
                flops += p.numel() / (m * n) * 5 * (4 * m * m * n + 2 * m**3)
    return flops, moved

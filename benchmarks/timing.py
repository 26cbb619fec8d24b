"""How long something takes, two ways, and always as a median between two quantiles.

As called    a call from Python, launch cost included, with a cold L2 cache: `triton.testing.do_bench`, which clears
             256 MB before each call and times it by events.
GPU time     the same calls recorded into one CUDA graph and replayed: no host cost. The L2 cache would stay warm, so
             the calls go round over copies of the inputs that exceed it together (`copies`).

Providers take turns (`interleaved`), so that a clock that drifts or throttles drifts for all of them.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch

WARMUP, REPEAT = 100, 400  # milliseconds a provider and round
ROUNDS = 5
PAUSE = 1.0  # seconds between rounds, for the power limit to recover
ROTATED = 200 * 10**6  # bytes: several times the L2 cache of any GPU of today
GRAPH = 20  # milliseconds of calls in one CUDA graph, replayed GRAPH_REPLAYS times a round
GRAPH_REPLAYS = 10

Call = Callable[[], object]


def quantile(samples: Sequence[float], share: float) -> float:
    """The value below which `share` of the samples lies, linear between neighbours (numpy's and torch's default).

    Raises ValueError without samples.
    """
    if not samples:
        raise ValueError("no samples: nothing was measured")
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(samples: Sequence[float]) -> dict[str, float]:
    """{"p20", "p50", "p80"} of samples in any unit."""
    return {f"p{percent}": quantile(samples, percent / 100) for percent in (20, 50, 80)}


def interleaved(
    measures: Mapping[str, Callable[[], list[float]]], *, rounds: int = ROUNDS, pause: float = PAUSE
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Runs all measures once a round, in turn, and joins each one's samples over the rounds.

    Returns (samples by name, why by name of those that raised); one that raised is not tried again.
    """
    samples: dict[str, list[float]] = {name: [] for name in measures}
    failed: dict[str, str] = {}
    for turn in range(rounds):
        if turn and pause:
            time.sleep(pause)
        for name, measure in measures.items():
            if name in failed:
                continue
            try:
                samples[name] += measure()
            except Exception as error:  # a peer that cannot do this case is a finding, and no reason to stop
                failed[name] = one_line(error)
                del samples[name]
    return samples, failed


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def as_called(call: Call, *, warmup: int = WARMUP, repeat: int = REPEAT) -> list[float]:
    """Milliseconds of every timed call, launch cost included."""
    from triton.testing import do_bench

    return do_bench(call, warmup=warmup, rep=repeat, return_mode="all")


def copies(size: int) -> int:
    """How many copies of inputs of `size` bytes exceed ROTATED together, so that none is found in the L2 cache."""
    return max(1, -(-ROTATED // max(size, 1)))


def gpu_time(prepare: Callable[[], Sequence[Call]], *, milliseconds: float = GRAPH) -> Callable[[], list[float]]:
    """A measure of GPU time: milliseconds a call, one sample for each replay of a graph of many calls.

    As `triton.testing.do_bench_cudagraph` does it, but the calls rotate, and `prepare`, which builds them, runs on the
    stream that is recorded: a backward pass runs where its forward pass ran, and a graph records only its own stream.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = list(prepare())
        for call in calls:  # compiles, and warms up the allocator
            call()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in itertools.islice(itertools.cycle(calls), 5):
            call()
        stop.record()
        torch.cuda.synchronize()
        count = max(len(calls), int(milliseconds / max(start.elapsed_time(stop) / 5, 1e-4)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in itertools.islice(itertools.cycle(calls), count):
                call()
        torch.cuda.synchronize()

    def measure() -> list[float]:
        samples = []
        with torch.cuda.stream(stream):
            for _ in range(GRAPH_REPLAYS):
                start.record()
                graph.replay()
                stop.record()
                torch.cuda.synchronize()
                samples.append(start.elapsed_time(stop) / count)
        return samples

    return measure


def wall(call: Call) -> list[float]:
    """Milliseconds of one call by the clock on the wall, everything queued on a GPU included."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return [(time.perf_counter() - start) * 1e3]


def summary_of_rates(amount: float, milliseconds: Sequence[float], unit: str) -> dict[str, float]:
    """{"<unit>_p20", …, "samples"}: amount a second, from the times that it took; p20 is a slow round's rate."""
    spread = summary([amount / (time / 1e3) for time in milliseconds])
    return {f"{unit}_{name}": value for name, value in spread.items()} | {"samples": len(milliseconds)}

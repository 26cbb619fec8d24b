"""What this machine can do at most, measured here and now: the rates that everything else is a share of.

A datasheet promises more than any program gets, and a shared machine gives less than an idle one.
"""

import time
from collections.abc import Callable

import torch

SIDE = {"cuda": 8192}
"""Of the square matrices; elsewhere OTHERWISE, which a core multiplies between two turns of other processes."""
OTHERWISE = 1024
COPIED = {"cuda": 2**30}
"""Bytes, far beyond any cache."""
ENOUGH = 0.4
"""Seconds for which each rate is measured."""


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a product of square matrices of normal random numbers (zeros would run faster on a GPU)."""
    side = SIDE.get(device.type, OTHERWISE)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _shortest(lambda: torch.mm(a, b, out=out), device)


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a copy from memory to memory of the device, those read and those written."""
    size = COPIED.get(device.type, 2**28)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _shortest(lambda: target.copy_(source), device)


def _shortest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several runs, the first one left out: what others take away is no part of a roof."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    times: list[float] = []
    while len(times) < 4 or sum(times) < ENOUGH:
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])

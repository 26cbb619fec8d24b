"""Where Triton runs, and with which blocks and grids.

A kernel file takes `jit`, `tl` and `triton` from here, so that it can be imported (and its reference used)
where Triton is absent, as on macOS; only launching needs it.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 counts only before triton is imported
except ImportError:
    triton = tl = None
    INTERPRETED = False

    def jit(function):
        return function


TABLE = Path(__file__).with_name("tuned.json")


def runs_triton(*tensors: Tensor) -> bool:
    """Whether these tensors go through Triton: on a GPU, or on the CPU under Triton's interpreter."""
    return triton is not None and all(t.is_cuda or (INTERPRETED and t.device.type == "cpu") for t in tensors)


@cache
def architecture(device: torch.device) -> str:
    """The key of the tuned table: 'sm_90', 'gfx942', … or 'cpu' for the interpreter."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side; 4 in the interpreter, so that grids with several programs are tested."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}


@cache
def tuned(kernel: str, arch: str, shape: str, dtype: torch.dtype) -> dict[str, int]:
    """Launch choices (block sizes, num_warps, num_stages) of `kernel` for a shape class such as 'd64' or 'n4096'.

    From tuned.json: {kernel: {arch: {"<shape>/<dtype>": {...}}}}; an architecture that was never tuned takes
    the kernel's "default". Raises KeyError where the table lacks the kernel or the shape class.
    """
    rows, key = _table()[kernel], f"{shape}/{str(dtype).removeprefix('torch.')}"
    return rows.get(arch, {}).get(key) or rows["default"][key]

"""Where Triton runs, and with which blocks and grids.

A kernel file takes `jit`, `tl` and `triton` from here and starts with `from __future__ import annotations`, so that
it can be imported (and its reference used) where Triton is absent, as on macOS; only launching needs it.

**Tuned tables.** Nothing is tuned at run time. `kernels/tuned/<kernel>.json` holds one kernel's launch choices,
`{arch: {"<shape class>/<dtype>": {"BLOCK": 1024, …, "num_warps": 4, "num_stages": 1}}}`, where arch is "default" or
what `architecture` answers, the shape class is the kernel file's own word ("d64", "n4096") and dtype is "float32",
"float16" or "bfloat16". An entry is passed on as it stands: `_forward[grid](…, **tuned(…))`. The tuner tries another
one with `with candidate("rms_norm_forward", {...}):`.

**Ahead of time.** Each kernel file has `aot_cases(arch) -> Iterator[AotCase]`: one case for every configuration that
would be launched on that architecture (`shipped` lists them). `compile_ahead(case, arch)` compiles it without a GPU;
the answer's `.asm["ptx"]`, `.asm["cubin"]` (or `["hsaco"]`) and `.metadata.shared` are what a codegen table reads.
It needs the real compiler, so a process that was started without TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

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


TABLES = Path(__file__).with_name("tuned")
POINTERS = {"float32": "*fp32:16", "float16": "*fp16:16", "bfloat16": "*bf16:16"}  # dtype's name -> aligned pointer


def runs_triton(*tensors: Tensor) -> bool:
    """Whether these tensors go through Triton: on a GPU, or on the CPU under Triton's interpreter.

    fp64 never does: the kernels' statistics and accumulators are fp32, and only the reference keeps what fp64 promises.
    """
    return triton is not None and all(
        (t.is_cuda or (INTERPRETED and t.device.type == "cpu")) and t.dtype != torch.float64 for t in tensors
    )


def as_rows(x: Tensor) -> Tensor:
    """x [..., N] itself if its features lie side by side (rows may be any distance apart, even none), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def common_integers(x: Tensor) -> Tensor:
    """Ids, labels or lengths in a dtype that PyTorch's operations take: uint16, uint32 and uint64 know few of them."""
    return x.to(torch.int64) if x.dtype in (torch.uint16, torch.uint32, torch.uint64) else x


@cache
def architecture(device: torch.device) -> str:
    """The key of the tuned tables: 'sm_90', 'gfx942', … or 'cpu' for the interpreter."""
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
def _table(kernel: str) -> dict[str, dict[str, dict[str, int]]]:
    return json.loads((TABLES / f"{kernel}.json").read_text(encoding="utf-8"))


_candidates: dict[str, Mapping[str, int]] = {}  # kernel -> what the tuner tries now


@contextmanager
def candidate(kernel: str, choice: Mapping[str, int]) -> Iterator[None]:
    """Inside this block `tuned(kernel, …)` answers `choice` for every shape and dtype: for the tuner and for tests."""
    before = _candidates.get(kernel)
    _candidates[kernel] = choice
    try:
        yield
    finally:
        if before is None:
            del _candidates[kernel]
        else:
            _candidates[kernel] = before


@cache
def shipped(kernel: str, arch: str) -> dict[str, dict[str, int]]:
    """Every row of the table that holds on `arch`, {"<shape class>/<dtype>": choices}: its own, else the default's."""
    table = _table(kernel)
    return {**table["default"], **table.get(arch, {})}


def tuned(kernel: str, arch: str, shape: str, dtype: torch.dtype) -> dict[str, int]:
    """Launch choices (block sizes, num_warps, num_stages) of `kernel` for a shape class such as 'd64' or 'n4096'.

    An architecture that was never tuned takes the table's "default". Raises ValueError where the table lacks
    the shape class and dtype, and FileNotFoundError where the kernel has no table.
    """
    if kernel in _candidates:
        return dict(_candidates[kernel])
    key = f"{shape}/{str(dtype).removeprefix('torch.')}"
    rows = shipped(kernel, arch)
    if key not in rows:
        raise ValueError(f"kernels/tuned/{kernel}.json has no row {key!r} for {arch}: it holds {sorted(rows)}")
    return rows[key]


class AotCase(NamedTuple):
    """One shipped configuration of one kernel, complete enough to be compiled without a GPU.

    name        unique among all kernels: "rms_norm_forward/n1024/bfloat16"
    function    the `@jit` function
    signature   {argument: type} for every argument in order, as Triton's own ahead-of-time tool writes them:
                "*bf16:16" (a pointer aligned to 16 bytes), "i32", "i32:16" (a multiple of 16), "i64", "fp32", or
                "constexpr"
    constexprs  {argument: value} for those marked "constexpr"
    options     num_warps, num_stages
    """

    name: str
    function: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]


def compile_ahead(case: AotCase, arch: str) -> Any:
    """Compile for 'sm_90', 'gfx942', … without such a device; returns Triton's CompiledKernel, raises its errors."""
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)
    types = {name: kind.partition(":") for name, kind in case.signature.items()}
    # What the launcher sees by itself from aligned pointers and round sizes; without it there are no 128-bit loads.
    hints = {(i,): [["tt.divisibility", int(by)]] for i, (_, _, by) in enumerate(types.values()) if by}
    source = triton.compiler.ASTSource(
        case.function, {name: kind for name, (kind, _, _) in types.items()}, case.constexprs, hints
    )
    return triton.compile(source, target=target, options=dict(case.options))

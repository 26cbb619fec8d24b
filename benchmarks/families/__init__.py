"""What is measured: for each family of kernels the shapes, ours and its peers, the reference, and the work counted.

A family is a function `cases(scale)` with scale "full" (the shapes of the protocol), "quick" (a few of them) or
"small" (what Triton's interpreter does in seconds). Peers: eager PyTorch, torch.compile, and where there are such,
SDPA by forced backend, compiled FlexAttention, and Liger if it is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]  # takes the inputs by name, returns a tensor or a tuple of them
OURS = "minillm"
INTERPRETED_DTYPES = (torch.float32, torch.float16)  # the interpreter cuts bf16 off where a GPU rounds it


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure: a kernel on one shape in one direction, and all who can do it."""

    kernel: str
    shape: dict[str, Any]
    """Sizes by letter, and the options that are not at their defaults."""
    direction: str
    """"forward" (no gradient wanted), "backward" (alone, on a retained graph) or "both"."""
    dtype: torch.dtype
    inputs: Callable[[torch.device], dict[str, Tensor]]
    """Fresh tensors; those in floating point get a gradient unless named in `fixed`."""
    fixed: tuple[str, ...] = ()
    providers: Mapping[str, Function]
    torchs: Function
    """PyTorch's own way in the same dtype: the error that it makes is the yardstick."""
    exact: Function
    """The kernel's reference, which is given fp64."""
    work: float
    """Model FLOPs or bytes, the same for every provider (`benchmarks.roofs`)."""
    roof: tuple[str, ...] | tuple[str, int, int, int]
    """("copy",): `work` is bytes; ("matmul", M, N, K): it is FLOPs, over the rate of that product."""
    codegen: tuple[str, ...] = field(default=())
    """Beginnings of the names under which codegen.json has the launched configurations."""


def normal(*shape: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).to(dtype)


def directions(of: Callable[[str], Case], *names: str) -> Iterator[Case]:
    for name in names:
        yield of(name)


def compiled(function: Function, mode: str | None = None) -> Function:
    """torch.compile for one shape, from the first call on; the backward may run again and again on a retained graph."""

    @cache
    def made() -> Function:
        import torch._functorch.config

        torch._functorch.config.donated_buffer = False  # else the second backward on one graph is refused
        return torch.compile(function, dynamic=False, mode=mode)

    return lambda *args, **kwargs: made()(*args, **kwargs)


def peers(ours: Function, eager: Function, **others: Function) -> dict[str, Function]:
    """Ours, eager and compiled PyTorch, and others by name."""
    return {
        OURS: ours,
        "eager": eager,
        "torch.compile": compiled(eager),
        "torch.compile max-autotune": compiled(eager, "max-autotune-no-cudagraphs"),
        **{name.replace("_", " "): function for name, function in others.items()},
    }


def liger(**functions: Function) -> dict[str, Function]:
    """{"liger": function} where Liger is installed, else nothing."""
    return functions if importlib.util.find_spec("liger_kernel") else {}


def families() -> dict[str, Callable[[str], Iterator[Case]]]:
    """By the name that --family takes."""
    from benchmarks.families import attention, losses, rows

    return {
        "flash_attention": attention.dense,
        "masked_attention": attention.masked,
        "decode_attention": attention.decode,
        "rms_norm": rows.rms_norms,
        "layer_norm": rows.layer_norms,
        "rope": rows.ropes,
        "swiglu": rows.swiglus,
        "cross_entropy": losses.cross_entropies,
        "linear_cross_entropy": losses.linear_cross_entropies,
    }

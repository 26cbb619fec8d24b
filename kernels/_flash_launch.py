"""What a call of flash attention may look like, how its kernels are launched, and every shipped way of launching them.

B batch, T queries, S keys, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._flash_backward import by_keys, by_queries
from ._flash_forward import forward
from ._flash_tiles import list_tiles
from ._launch import INTERPRETED, POINTERS, AotCase, architecture, common_integers, shipped, triton, tuned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 256  # head width; beyond it, and in fp64, the reference answers
Window = tuple[int | None, int | None]
Pair = tuple[Tensor, Tensor]  # one tensor for the queries, one for the keys

KERNELS = {  # by tuned table
    "flash_attention_forward": forward,
    "flash_attention_backward": by_keys,  # with dq: the fused one
    "flash_attention_backward_keys": by_keys,
    "flash_attention_backward_queries": by_queries,
}


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window | None,
    softcap: float | None,
    slopes: Tensor | None,
    segments: Pair | None,
    lengths: Pair | None,
) -> None:
    """Raises ValueError, in one line that says what to give instead, where the arguments do not fit together."""
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise ValueError(
            f"attention takes q [B, H, T, D] and k, v [B, G, S, D], not {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
        )
    (B, H, T, D), (_, G, S, _) = q.shape, k.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"k {[*k.shape]} and v {[*v.shape]} must both be [B, G, S, D] with q's B = {B} and D = {D}")
    if D == 0 or G == 0 or H % G:
        raise ValueError(f"q's {H} heads must be a multiple of k's {G}, and the head width ({D}) at least 1")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k, v must have one floating-point dtype, not {q.dtype}, {k.dtype}, {v.dtype}: cast them")
    if window is not None and not _is_window(window):
        raise ValueError(f"window is (left, right), each a count of keys >= 0 or None for unlimited, not {window!r}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, or None for no cap, not {softcap}")
    extra = {"alibi_slopes": (slopes, (H,))} if slopes is not None else {}
    for name, pair, shapes in (("segments", segments, ((B, T), (B, S))), ("lengths", lengths, ((B,), (B,)))):
        if pair is None:
            continue
        for side, ids, shape in zip(("queries", "keys"), pair, shapes, strict=True):
            if ids.is_floating_point() or ids.dtype == torch.bool:
                raise ValueError(f"{name} of the {side} must be integers, not {ids.dtype}")
            extra[f"{name} of the {side}"] = (ids, shape)
    for name, (x, shape) in extra.items():
        if x.shape != shape:
            raise ValueError(f"{name} must have the shape {[*shape]}, not {[*x.shape]}")
    for name, x in {"k": k, "v": v, **{name: x for name, (x, _) in extra.items()}}.items():
        if x.device != q.device:
            raise ValueError(f"q is on {q.device} but {name} on {x.device}: move it there")
    if lengths is not None and q.device.type == "cpu" and not torch.compiler.is_compiling():
        for side, x, longest in zip(("queries", "keys"), lengths, (T, S), strict=True):
            if x.numel() and not 0 <= int(x.long().min()) <= int(x.long().max()) <= longest:
                raise ValueError(f"lengths of the {side} must lie in 0 to {longest}, not {x.tolist()}")


def _is_window(window: object) -> bool:
    return (
        isinstance(window, Sequence)
        and len(window) == 2
        and all(side is None or (isinstance(side, int) and side >= 0) for side in window)
    )


def rows(x: Tensor) -> Tensor:
    """x as the kernels can read it: its rows contiguous, and a tile's offsets within int32."""
    return x if x.stride(3) == 1 and x.stride(2) < 2**22 else x.contiguous()


def _ids(x: Tensor | None) -> Tensor | None:
    """Ids or lengths as the kernels can read them."""
    return None if x is None else common_integers(x).contiguous()


class Call:
    """The arguments that all kernels of one call share, in the order in which each kernel takes them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        slopes: Tensor | None,
        q_ids: Tensor | None,
        kv_ids: Tensor | None,
        q_lengths: Tensor | None,
        kv_lengths: Tensor | None,
        scale: float,
        softcap: float | None,
        left: int | None,
        right: int | None,
    ):
        (self.B, self.H, self.T, self.D), (self.G, self.S) = q.shape, k.shape[1:3]
        self.arch, self.dtype = architecture(q.device), q.dtype
        self.window = left, right
        self.lengths = _ids(q_lengths), _ids(kv_lengths)
        self.segments = (_ids(q_ids), _ids(kv_ids)) if q_ids is not None else None
        self.slopes = slopes.float().contiguous() if slopes is not None else None
        factor = math.log2(math.e) * (scale if softcap is None else 1.0)
        self.numbers = scale, factor, softcap, left, right, self.H, self.G, self.T, self.S
        self.constants = head_constants(self.D, q.dtype)

    def launch(self, table: str, *tensors: Tensor | None, strided: tuple[Tensor, ...], own_keys=False):
        """Run the kernel of `table` with its tuned choices: one program for each own block of each head."""
        choice = tuned(table, self.arch, f"d{self.constants['BLOCK_D']}", self.dtype)
        own, other = (choice["BLOCK_N"], choice["BLOCK_M"]) if own_keys else (choice["BLOCK_M"], choice["BLOCK_N"])
        grid = self.B * self.H * triton.cdiv(self.S if own_keys else self.T, own)
        if grid == 0:
            return
        lists = None, None
        if self.segments is not None:
            lists = list_tiles(self.segments, self.lengths, *self.window, own_keys=own_keys, block=own, other=other)
        strides = [stride for x in strided for stride in x.stride()[:3]]
        KERNELS[table][(grid,)](
            *tensors, *strides, self.slopes, *(self.segments or (None, None)), *self.lengths, *lists, *self.numbers,
            **self.constants, **choice,
        )  # fmt: skip


def head_constants(D: int, dtype: torch.dtype) -> dict[str, Any]:
    """What a kernel is compiled with for heads of that width and dtype, besides its tuned choices."""
    # tl.dot takes at least 16, and the interpreter's is wrong for bf16.
    exact = dtype != torch.float32 or not torch.backends.cuda.matmul.allow_tf32
    return {
        "D": D,
        "BLOCK_D": max(16, 1 << (D - 1).bit_length()),
        "WIDEN": INTERPRETED and dtype == torch.bfloat16,
        "PRECISION": "ieee" if exact else "tf32",
    }


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Every shipped configuration, each in its leanest form (causal alone) and in its fullest (every option on)."""
    for table, function in KERNELS.items():
        for row, choice in shipped(table, arch).items():
            shape, dtype = row.split("/")
            constants = head_constants(int(shape[1:]), getattr(torch, dtype)) | choice
            options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
            for form, absent in (("causal", ABSENT), ("everything", ())):
                types = _types(dtype, fused=table == "flash_attention_backward")
                if table == "flash_attention_backward_keys":
                    absent = (*absent, "dq_ptr")
                fixed = constants | dict.fromkeys(absent)
                signature = {name: "constexpr" if name in fixed else types[name] for name in function.arg_names}
                fixed = {name: value for name, value in fixed.items() if name in signature}
                yield AotCase(f"{table}/{row}/{form}", function, signature, fixed, options)


ABSENT = (  # arguments that are None in a call that is causal and nothing else
    "slopes_ptr", "q_ids_ptr", "kv_ids_ptr", "q_lengths_ptr", "kv_lengths_ptr", "list_ptr", "counts_ptr",
    "softcap", "left",
)  # fmt: skip


def _types(dtype: str, *, fused: bool) -> dict[str, str]:
    """{argument: type} of all kernels, for tensors that are aligned and whose sizes are multiples of 16."""
    pointer, wide, integer = POINTERS[dtype], POINTERS["float32"], "*i32:16"
    names = ("q", "k", "v", "do", "out", "dk", "dv")
    return {
        **{f"{name}_ptr": pointer for name in names},
        **{f"{name}_{axis}": "i32:16" for name in names for axis in "bht"},
        **dict.fromkeys(("lse_ptr", "delta_ptr", "slopes_ptr"), wide),
        "dq_ptr": wide if fused else pointer,  # the fused backward adds up in fp32
        **dict.fromkeys((f"{name}_ptr" for name in ("q_ids", "kv_ids", "q_lengths", "kv_lengths")), integer),
        **dict.fromkeys(("list_ptr", "counts_ptr"), integer),
        **dict.fromkeys(("scale", "factor", "softcap"), "fp32"),
        **dict.fromkeys(("left", "right", "H", "G"), "i32"),
        **dict.fromkeys(("T", "S"), "i32:16"),
    }

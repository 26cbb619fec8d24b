"""A memory check that needs no GPU: every operator once, on tensors beside which unreadable pages lie.

    TRITON_INTERPRET=1 python -m tests.kernels.guarded

Under the interpreter a kernel reads and writes through plain addresses, and what it reads beyond a tensor's end changes
no result as long as nothing keeps it: no comparison of values notices a mask that is one element too wide. Here that
element is the first of a page without access, and the process ends with SIGSEGV, naming the line. Inputs and whatever
the operators allocate lie at the end of their pages in one pass, at the beginning in another.
"""

import ctypes
import faulthandler
import mmap
import os
import signal
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from kernels._launch import candidate
from kernels.cross_entropy import cross_entropy
from kernels.decode_attention import decode_attention
from kernels.flash_attention import flash_attention
from kernels.layer_norm import layer_norm
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.rms_norm import rms_norm
from kernels.rope import rope
from kernels.swiglu import geglu, swiglu
from tests.kernels.compare import results

GUARD = 1 << 20  # bytes without access on either side
ALLOCATE = ((torch.Tensor, "new_empty"), (torch.Tensor, "new_zeros"), (torch, "empty_like"))


def guarded(x: Tensor, place: str) -> Tensor:
    """A copy of x with the same strides, its storage next to forbidden pages: place is "end" or "start"."""
    size = x.untyped_storage().nbytes()
    if size == 0:
        return x
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, GUARD + room + GUARD)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(area))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for address in (begin, begin + GUARD + room):
        if protect(ctypes.c_void_p(address), ctypes.c_size_t(GUARD), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    at = GUARD + (room - size if place == "end" else 0)
    flat = torch.frombuffer(area, dtype=x.dtype, count=size // x.element_size(), offset=at)
    flat.untyped_storage().copy_(x.untyped_storage())
    return flat.as_strided(x.shape, x.stride(), x.storage_offset())


def guard_allocations(place: str, originals: dict[str, object]) -> None:
    """From now on what the operators allocate in Python is guarded too."""
    for owner, name in ALLOCATE:
        original = originals[name]
        setattr(owner, name, lambda *a, _original=original, **k: guarded(_original(*a, **k), place))


def visit_every_operator(place: str) -> None:
    """Forward and backward of each, with sizes that no block divides and with every option that loads something."""

    def normal(*shape: int) -> Tensor:
        return guarded(torch.randn(shape), place)

    def integers(*values: int) -> Tensor:
        return guarded(torch.tensor(values), place)

    def run(function, **inputs: Tensor) -> None:
        answer = function(**inputs)
        outputs = answer if isinstance(answer, tuple) else (answer,)
        results(function, inputs, [guarded(torch.randn(y.shape), place) for y in outputs])

    x, residual, weight, bias = normal(5, 37), normal(5, 37), normal(37), normal(37)
    for block in (16, 64):  # a row that several programs share, and one that fits
        forward = {"ROWS": 2, "BLOCK": block, "num_warps": 1}
        backward = {**forward, "STAGES": 1, "PER_MULTIPROCESSOR": 1}
        for name, norm, inputs in (("rms_norm", rms_norm, {}), ("layer_norm", layer_norm, {"bias": bias})):
            with candidate(f"{name}_forward", forward), candidate(f"{name}_backward", backward):
                run(norm, x=x, weight=weight, residual=residual, **inputs)
    run(swiglu, gate=x, up=residual)
    run(partial(geglu, approximate="tanh"), gate=normal(5, 74)[:, 37:], up=residual)

    heads = {"q": normal(2, 3, 5, 24), "k": normal(2, 1, 5, 24)}
    run(partial(rope, cos=normal(5, 12), sin=normal(5, 12)), **heads)
    angles = {"cos": normal(2, 5, 12), "sin": normal(2, 5, 12)}
    run(partial(rope, **angles), **heads, q_weight=normal(24), k_weight=normal(24))

    targets, options = integers(3, -100, 36), {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0}
    for block in (16, 64):
        with candidate("cross_entropy", {"BLOCK": block, "num_warps": 1}):
            run(partial(cross_entropy, targets=targets, reduction="none", **options), logits=normal(3, 37))
    run(partial(linear_cross_entropy, targets=targets), hidden=normal(3, 5), weight=normal(37, 5), bias=normal(37))

    qkv = {"q": normal(1, 2, 20, 24), "k": normal(1, 1, 41, 24), "v": normal(1, 1, 41, 24)}
    ids = [guarded(torch.randint(0, 3, (1, n)).sort().values, place) for n in (20, 41)]
    slopes = guarded(torch.rand(2), place)
    everything = {
        "window": (20, 10), "softcap": 2.0, "alibi_slopes": slopes, "segments": tuple(ids),
        "lengths": (integers(19), integers(40)),
    }  # fmt: skip
    with ExitStack() as small_tiles:
        for table in ("forward", "backward", "backward_keys", "backward_queries"):
            choice = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 1}
            small_tiles.enter_context(candidate(f"flash_attention_{table}", choice))
        for options in ({"causal": True}, everything, everything | {"deterministic": True}):
            run(partial(flash_attention, **options), **qkv)
    caches = normal(1, 1, 41, 24), normal(1, 1, 41, 24), integers(41)
    decode_attention(normal(1, 2, 3, 24), *caches, window=(20, 0), alibi_slopes=slopes)


def main() -> None:
    faulthandler.enable()
    torch.manual_seed(0)
    for place in ("end", "start"):
        x = guarded(torch.ones(3), place)
        beyond = x.data_ptr() + (x.nbytes if place == "end" else -1)
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            ctypes.string_at(beyond, 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV, f"the page at the {place} is open"
    originals = {name: getattr(owner, name) for owner, name in ALLOCATE}
    for place in ("end", "start"):
        guard_allocations(place, originals)
        visit_every_operator(place)
    print("nothing beyond any tensor")


if __name__ == "__main__":
    main()

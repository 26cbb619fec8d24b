"""What the two cross-entropies check alike: shapes, options, labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._launch import common_integers

REDUCTIONS = ("none", "sum", "mean")


def checked(
    shape: tuple[int, int], dtype: torch.dtype, targets: Tensor, ignore_index: int, label_smoothing: float,
    softcap: float | None, reduction: str,
) -> Tensor:  # fmt: skip
    """The targets, in an integer dtype that all operations take.

    Raises ValueError where logits of this shape and dtype, labels and options do not make sense together.
    """
    if len(shape) != 2 or targets.shape != shape[:1] or not shape[1]:
        raise ValueError(
            f"cross-entropy wants logits [M, V] and targets [M]; it got {list(shape)} and {list(targets.shape)}:"
            " flatten the leading axes, e.g. logits.flatten(0, -2), targets.flatten()"
        )
    if not dtype.is_floating_point or targets.dtype.is_floating_point or targets.dtype == torch.bool:
        raise ValueError(f"cross-entropy wants float logits and integer targets, not {dtype} and {targets.dtype}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie between 0 and 1, not {label_smoothing}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be above 0, or None for no cap, not {softcap}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    targets = common_integers(targets)
    _check_labels(targets, shape[1], ignore_index)
    return targets


def _check_labels(targets: Tensor, V: int, ignore_index: int) -> None:
    """Raise ValueError naming the first label outside [0, V). On a GPU it would cost a synchronisation: not there."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= V))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets[{at}] is {int(targets[at])}, outside the {V} classes 0 to {V - 1}:"
            f" labels to leave out must be ignore_index ({ignore_index})"
        )

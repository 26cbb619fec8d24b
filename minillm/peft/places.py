"""Where a linear layer of ours stands in somebody else's model, and how updates of one are those of the other.

An update is a product B A of A [r, in] and B [out, r]. Where several layers of ours are side by side in one of theirs
(GPT-2's c_attn is query, key and value), their updates are one of block-diagonal B:

    A = [A_q; A_k; A_v]    B = diag(B_q, B_k, B_v)    and back:  A_q = A,  B_q = the query's rows of B
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """One of our layers in their model."""

    module: str
    """Their module's full name."""
    part: int = 0
    """Which of `parts` equal slices of its outputs is ours."""
    parts: int = 1
    transposed: bool = False
    """Their weight is [in, out], as GPT-2's Conv1D has it."""


Rename = Callable[[str], Place]
"""Name of a layer in our Transformer -> where it stands in theirs."""


def by_module(names: Iterable[str], rename: Rename) -> dict[str, list[tuple[Place, str]]]:
    """Their modules, each with those of our layers that it holds, in the order of its outputs."""
    found: dict[str, list[tuple[Place, str]]] = {}
    for name in names:
        place = rename(name)
        found.setdefault(place.module, []).append((place, name))
    return {module: sorted(layers, key=lambda layer: layer[0].part) for module, layers in found.items()}


def join(updates: list[tuple[Place, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(A, B) of their module from (place, A [r, in], B [out, r]) of ours."""
    A = torch.cat([A for _, A, _ in updates])
    out, parts = updates[0][2].shape[0], updates[0][0].parts
    joined = A.new_zeros(parts * out, A.shape[0])
    column = 0
    for place, _, B in updates:
        joined[place.part * out : (place.part + 1) * out, column : column + B.shape[1]] = B
        column += B.shape[1]
    return A, joined


def part_of(place: Place, B: Tensor) -> Tensor:
    """Our layer's rows of their B [parts · out, r]."""
    return B.chunk(place.parts)[place.part]

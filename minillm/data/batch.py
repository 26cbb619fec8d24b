"""What a model reads in one pass, and what it should have predicted.

B rows, T tokens of the model (of an encoder-decoder: of its decoder), S tokens of the encoder.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

IGNORED = -100
"""The target of a place that does not count."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    ids: Tensor
    """[B, T] int64"""
    targets: Tensor
    """[B, T] int64, what should be predicted at each place; IGNORED where nothing should."""
    samples: tuple[int, ...]
    """Number of each row in the order of training, by which an error names it."""
    segments: Tensor | None = None
    """[B, T] document of each token; negative ids are padding. None: each row is one document."""
    source: Tensor | None = None
    """[B, S] int64, the encoder's tokens of an encoder-decoder."""
    source_segments: Tensor | None = None
    """[B, S]"""
    token_types: Tensor | None = None
    """[B, T] sentence of a pair."""

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of `Transformer.states`, besides `ids`."""
        names = ("segments", "source", "source_segments", "token_types")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def counted(self) -> int:
        """How many targets count."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device) -> "Batch":
        return self._each_tensor(lambda x: x.to(device, non_blocking=True))

    def split(self, rows: int) -> Iterator["Batch"]:
        """Micro-batches of `rows` rows; the last one may have fewer."""
        for first in range(0, len(self.samples), rows):
            part = slice(first, first + rows)
            yield replace(self._each_tensor(lambda x, part=part: x[part]), samples=self.samples[part])

    def _each_tensor(self, change) -> "Batch":
        tensors = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        return replace(self, **{name: change(x) for name, x in tensors.items()})

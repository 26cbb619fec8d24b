"""From logits to the next token: pure functions, one row of the batch at a time.

    p = softmax(penalised logits / temperature), then cut by top_k, top_p and min_p in this order, then normalised

B rows, V vocabulary. Drawing turns one uniform number u a row into the first token whose cumulated probability
exceeds u, so that a row's text depends on its own stream of numbers alone.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.config import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Raises `UserError` naming the field for a value that makes no sense."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy: always the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens (Fan et al. 2018, https://arxiv.org/abs/1805.04833)."""
    top_p: float | None = None
    """Only the fewest likeliest tokens that together reach p (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751)."""
    min_p: float | None = None
    """Only tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Logits of tokens already in the text are divided by it where positive and multiplied where negative
    (Keskar et al. 2019, https://arxiv.org/abs/1909.05858, §4.1)."""

    def __post_init__(self) -> None:
        checks = {
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or a positive number"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "a positive number; 1 is none"),
        }
        for name, (fits, wanted) in checks.items():
            if not fits:
                raise UserError(f"{name} must be {wanted}, not {getattr(self, name)}")


def row_generator(seed: int, row: int) -> torch.Generator:
    """The random stream of one row: a function of (seed, row), the same on every device.

    Hashed, because torch's CPU generator keeps 32 bits of its seed: neighbouring seeds must not share rows.
    """
    digest = hashlib.blake2b(f"{seed} {row}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def penalise(logits: Tensor, penalty: float, seen: Tensor | None) -> Tensor:
    """logits [B, V] in fp32, those of `seen` [B, V] (bool) made less likely."""
    logits = logits.float()
    if seen is None or penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def probabilities(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """The distribution that a token is drawn from.

    Args:
        logits: [B, V]; -inf for tokens that may not come.
        seen: [B, V] bool, tokens already in the text; only the repetition penalty reads it.

    Returns:
        [B, V] fp32, each row adding up to 1; NaN in a row whose logits hold NaN or +inf, or nothing but -inf.
    """
    logits = penalise(logits, sampling.repetition_penalty, seen)
    logits = logits - logits.amax(-1, keepdim=True)  # first, so that a tiny temperature cannot make inf - inf
    if sampling.temperature == 0:
        greedy = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        return greedy.masked_fill(logits.isnan(), math.nan)
    p = torch.softmax(logits / max(sampling.temperature, 1e-30), -1)
    if sampling.top_k is not None or sampling.top_p is not None:
        p = _cut_by_rank(p, sampling.top_k, sampling.top_p)
    if sampling.min_p is not None:
        p = torch.where(p < sampling.min_p * p.amax(-1, keepdim=True), 0.0, p)
    return p / p.sum(-1, keepdim=True)


def _cut_by_rank(p: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """p [B, V] with 0 for all but the likeliest tokens; of equally likely ones the smaller id stays."""
    ranked, order = p.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked = ranked.clone()
        ranked[:, top_k:] = 0.0
    if top_p is not None:
        share = ranked / ranked.sum(-1, keepdim=True)
        before = share.cumsum(-1) - share
        ranked = torch.where(before < top_p, ranked, 0.0)  # the token that crosses top_p still counts
    return torch.zeros_like(p).scatter_(-1, order, ranked)


def pick(
    logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator], seen: Tensor | None = None
) -> Tensor:
    """Draws one token a row, [B] int64; -1 for a row whose logits are NaN, +inf, or all -inf.

    Args:
        logits: [B, V]
        generators: one a row (see `row_generator`), on the CPU; greedy choice leaves them alone.
        seen: [B, V] bool, as for `probabilities`.
    """
    if sampling.temperature == 0:
        best, token = penalise(logits, sampling.repetition_penalty, seen).max(-1)
        return torch.where(best.isfinite(), token, -1)
    p = probabilities(logits, sampling, seen)
    wide = torch.float32 if p.device.type == "mps" else torch.float64  # fp32 sums lose the tail of a large vocabulary
    cumulated = p.cumsum(-1, dtype=wide)
    possible = p > 0
    # Parallel sums may step by a rounding error where p is 0: `possible` keeps such tokens out, at the end as well.
    total = torch.where(possible, cumulated, 0.0).amax(-1)
    draws = [torch.rand((), dtype=torch.float64, generator=generator) for generator in generators]
    threshold = torch.stack(draws).to(p.device, wide) * total
    token = ((cumulated > threshold.unsqueeze(-1)) & possible).int().argmax(-1)  # the first of the largest
    return torch.where(total > 0, token, -1)

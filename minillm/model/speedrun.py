"""What only the speed recipe uses: hashed n-grams, which lower the loss for almost no arithmetic.

A Transformer spends its first layers and its first thousand steps on learning which few tokens follow which
few. Tables say it at once: the last n tokens are hashed to a row, as a second to fourth embedding of a token beside its
own (hashed n-grams: Svenstrup et al. 2017, arXiv:1709.03933; as a lever of training speed: modded-nanogpt, the value of
a bigram). A look-up costs no product, and a table as much memory as its rows.

    x_t = E[t] + P · concat_n T_n[hash(ids of t − n + 1 … t) mod rows],      n = 2 … ngrams

A long n-gram occurs few times in a small text, and then its row knows by heart what followed. In training a share of
the rows is left out, each length by itself, so that a token must do with the shorter ones: as smoothed n-gram models
fall back on these.

B batch, T tokens, dim the stream's width, W that of a table's row. Published formats have no place for the tables, so
such a model is not exported.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.model.linear import Linear

_MULTIPLIER, _MODULUS = 1_000_003, 2**31 - 1  # their product stays below 2⁶³: no overflow, the same row everywhere


def tokens_before(ids: Tensor, count: int, segments: Tensor | None) -> Tensor:
    """[count, B, T] the tokens 1 … count places before each of ids [B, T], as id + 1; 0 where its text has none."""
    shifted = []
    for back in range(1, count + 1):
        before = torch.zeros_like(ids)
        before[:, back:] = ids[:, :-back] + 1
        if segments is not None:
            same = segments[:, back:] == segments[:, :-back]
            before[:, back:] *= same
        shifted.append(before)
    return torch.stack(shifted)


class NgramEmbedding(nn.Module):
    """One table for each length from 2 to `config.speedrun.ngrams`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        sizes = config.speedrun
        self.rows, self.back, self.left_out = sizes.ngram_rows, sizes.ngrams - 1, sizes.ngram_dropout
        self.tables = nn.ModuleList(nn.Embedding(sizes.ngram_rows, sizes.ngram_dim) for _ in range(self.back))
        self.project = Linear(self.back * sizes.ngram_dim, config.dim, bias=False)

    def forward(self, ids: Tensor, before: Tensor) -> Tensor:
        """ids [B, T], before [ngrams - 1, B, T] as `tokens_before` gives it -> [B, T, dim]"""
        key, found = ids + 1, []
        for table, token in zip(self.tables, before, strict=True):
            key = (key * _MULTIPLIER + token) % _MODULUS
            row = table(key * _MULTIPLIER % _MODULUS % self.rows)  # [B, T, W]
            if self.training and self.left_out:
                row = row * F.dropout(row.new_ones(row.shape[:2]), self.left_out).unsqueeze(-1)
            found.append(row)
        return self.project(torch.cat(found, -1))

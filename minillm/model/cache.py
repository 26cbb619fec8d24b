"""The KV cache: what has been read stays read, so that each new token costs one pass of its own.

B rows, G key/value heads, D head width. Rows may hold different numbers of tokens: each row writes behind its own
last key, and attention is told how many are in use.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minillm.config import ModelConfig, UserError


class KVCache:
    """Keys and values of every decoder block, for `rows` sequences of up to `size` tokens.

    Args:
        rows: sequences side by side.
        size: the most tokens of one row, those still to be generated included.
    """

    def __init__(self, config: ModelConfig, rows: int, size: int, device: torch.device, dtype: torch.dtype):
        layers = (config.decoder_layers if config.shape == "encoder-decoder" else None) or config.layers
        shape = (layers, 2, rows, config.key_value_heads, size, config.head_width)
        self.buffer = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # [B] keys in use
        self.ids = torch.zeros(rows, size, dtype=torch.long, device=device)  # id + 1, for models that look at n-grams
        self.size, self.longest = size, 0  # `longest` bounds `lengths` from above without asking the device
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}  # block -> keys and values of the encoder's output
        self.memory_segments: Tensor | None = None  # [B, S] which of these are padding
        self.ragged = False  # whether rows may hold different numbers of tokens
        self.whole = False  # whether a single query is handed the whole buffers, whose shape no step changes

    def begin(self, T: int, new: Tensor | None) -> None:
        """Makes room for T tokens a row, of which `new` [B] are real and the rest padding on the right (None: all)."""
        if torch.is_grad_enabled():
            raise UserError("a cache is written in place, which gradients cannot cross: call within torch.no_grad()")
        self.take(T)
        step = torch.arange(T, device=self.lengths.device)
        # [B, T] positions of the new tokens; padding writes behind its row's length, where the next tokens replace it
        self.at = self.lengths.unsqueeze(1) + step
        self.ragged = self.ragged or new is not None
        self.new = torch.full_like(self.lengths, T) if new is None else new
        self.lengths += self.new  # in place, as all that a recorded step finds again (inference/recorded.py)

    def take(self, T: int) -> None:
        """Counts T more tokens of the longest row. Raises `UserError` where they do not fit."""
        if self.longest + T > self.size:
            raise UserError(f"the cache holds {self.size} tokens, and {self.longest} + {T} do not fit")
        self.longest += T

    def grow(self, tokens: int) -> None:
        """Makes room for so many more tokens a row."""
        self.buffer = torch.nn.functional.pad(self.buffer, (0, 0, 0, tokens))
        self.ids = torch.nn.functional.pad(self.ids, (0, tokens))
        self.size += tokens

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [B, G, T, D] of the new tokens -> all keys and values so far [B, G, S, D], in the cache's own dtype."""
        keys, values = self.buffer[layer]
        if self.ragged or self.whole:  # only the device knows where each row ends
            index = self.at[:, None, :, None].expand_as(k)
            keys.scatter_(2, index, k.to(keys.dtype))
            values.scatter_(2, index, v.to(values.dtype))
        else:
            new = slice(self.longest - k.shape[2], self.longest)
            keys[:, :, new], values[:, :, new] = k, v
        S = self.size if self.whole and k.shape[2] == 1 else self.longest
        return keys[:, :, :S], values[:, :, :S]

    def tokens_before(self, ids: Tensor, count: int) -> Tensor:
        """As in speedrun.py, for new ids [B, T] whose predecessors are here: [count, B, T], id + 1, or 0 for none."""
        self.ids.scatter_(1, self.at, ids + 1)
        back = [self.at - i for i in range(1, count + 1)]
        return torch.stack([self.ids.gather(1, at.clamp(min=0)) * (at >= 0) for at in back])

    def once(self, layer: int, keys_and_values: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's output, computed in the first step only."""
        if layer not in self.memory:
            self.memory[layer] = keys_and_values()
        return self.memory[layer]

    def remember(self, other: "KVCache", rows: Tensor | slice = slice(None)) -> None:
        """Takes over what `other` has read of the encoder's output, of these rows [B'] alone."""
        self.memory = {layer: (k[rows], v[rows]) for layer, (k, v) in other.memory.items()}
        self.memory_segments = None if other.memory_segments is None else other.memory_segments[rows]

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows [B'], in this order: those that have ended cost no more time, and one that several
        go on from comes several times."""
        self.buffer, self.lengths, self.ids = self.buffer[:, :, rows], self.lengths[rows], self.ids[rows]
        self.longest = int(self.lengths.max())
        self.remember(self, rows)

    def put(self, rows: Tensor, other: "KVCache") -> None:
        """Replaces the tokens of these rows [B'] by those of `other`, which has B' rows and no greater size."""
        self.buffer[:, :, rows, :, : other.size] = other.buffer
        self.ids[rows, : other.size] = other.ids
        self.lengths[rows] = other.lengths
        self.longest, self.ragged = int(self.lengths.max()), True

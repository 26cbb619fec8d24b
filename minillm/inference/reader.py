"""The texts so far -> the logits of their next tokens, with a KV cache or without.

B rows, T tokens, S tokens of an encoder's source, V vocabulary. Rows of different lengths stand side by side, padded
on the right.

Beyond the context there is one rule for all position schemes: the model reads at most `context` tokens (less what a
prefix or a soft prompt takes of it), and where one more would not fit it goes on from the last half of them, as if
the text began there. What it reads is a function of the text's length alone, so the cached and the uncached model
agree there too.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from minillm.config import UserError
from minillm.inference import recorded
from minillm.model.cache import KVCache
from minillm.model.transformer import Transformer


def window_start(tokens: int, context: int) -> int:
    """The first of `tokens` that the model still reads: 0 up to `context`, then in jumps of half a context."""
    jump = context - context // 2
    return max(0, -(-(tokens - context) // jump) * jump)


def room(model: Transformer) -> int:
    """Tokens that a decoder can read at a time: its context, less what a prefix or a soft prompt takes of it."""
    return model.config.context - model.decoder.front.length


def framed(ids: Sequence[int], frame: tuple[Sequence[int], Sequence[int]], context: int) -> list[int]:
    """What an encoder reads of a text: as much of its beginning as the context has room for, between the two of
    `frame`."""
    before, behind = frame
    return [*before, *ids[: max(0, context - len(before) - len(behind))], *behind]


class Reader:
    """Reads growing texts with one model.

    Args:
        sources: the encoder's ids a row, of an encoder-decoder.
        new_tokens: by how many tokens a text may grow.
        use_cache: False reads every text anew each time: slow, and what the cache is tested against.
    """

    def __init__(
        self, model: Transformer, sources: Sequence[Sequence[int]] | None, new_tokens: int, use_cache: bool = True
    ):
        self.model, self.new_tokens = model, new_tokens
        self.device = model.embedding.weight.device
        self.context = room(model)
        self.use_cache = use_cache
        self.records = recorded.possible(self.device)
        self.cache: KVCache | None = None
        self.step: Callable[[Tensor], Tensor] | None = None  # that of the cache's present rows, after their first
        self.starts: list[int] = []
        self.source: Tensor | None = None  # [B, S]
        self.source_segments: Tensor | None = None  # [B, S] 0, and -1 for padding
        if sources is not None:
            self.source, lengths = self._padded(sources)
            self.source_segments = -(torch.arange(self.source.shape[1], device=self.device) >= lengths[:, None]).long()

    def next_logits(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """[B, V] fp32; each text is the one of the last call (see `keep`) and one token more."""
        starts = [window_start(len(text), self.context) for text in texts]
        moved = [row for row, (was, now) in enumerate(zip(self.starts, starts, strict=False)) if was != now]
        if self.cache is None or len(moved) == len(texts):
            logits = self._read([text[start:] for text, start in zip(texts, starts, strict=True)])
        else:
            if moved:
                self._read_again(moved, [texts[row][starts[row] : -1] for row in moved])
            logits = self._read_last(torch.tensor([text[-1:] for text in texts], device=self.device))
        self.starts = starts
        return logits

    def _read(self, windows: list[Sequence[int]]) -> Tensor:
        """All of `windows` at once -> logits [B, V] after the last token of each."""
        ids, lengths = self._padded(windows)
        if self.use_cache:
            cache = self._new_cache(len(windows), min(ids.shape[1] + self.new_tokens, self.context))
            cache.whole = self.records
            if self.cache is not None:
                cache.remember(self.cache)  # the source has not changed, only the decoder's window
            self.cache, self.step = cache, None
        states = self._states(ids, self.cache, lengths)
        return self._logits(states[torch.arange(len(windows), device=self.device), lengths - 1])

    def _read_last(self, ids: Tensor) -> Tensor:
        """[B, 1] one more token of each row -> logits [B, V]; recorded where the same rows were read so before."""
        assert self.cache is not None
        if self.step is None:
            self.step = self._one_token
        elif self.records and self.step == self._one_token:
            self.step = recorded.RecordedStep(self._one_token, self.cache, ids)
        return self.step(ids)

    def _one_token(self, ids: Tensor) -> Tensor:
        return self._logits(self._states(ids, self.cache)[:, -1])

    def _logits(self, states: Tensor) -> Tensor:
        """[B, dim] -> [B, V] fp32"""
        return self.model.head(states, self.model.output_weight).float()

    def _read_again(self, moved: list[int], windows: list[Sequence[int]]) -> None:
        """Puts `windows` into the cache in the place of what the rows `moved` [B'] hold there."""
        assert self.cache is not None
        rows = torch.tensor(moved, device=self.device)
        ids, lengths = self._padded(windows)
        part = self._new_cache(len(moved), ids.shape[1])
        part.remember(self.cache, rows)
        self._states(ids, part, lengths)
        self.cache.put(rows, part)

    def _states(self, ids: Tensor, cache: KVCache | None, lengths: Tensor | None = None) -> Tensor:
        """[B, T, dim]"""
        known = cache is not None and bool(cache.memory)
        return self.model.states(
            ids,
            source=None if known else self.source,
            source_segments=None if known else self.source_segments,
            cache=cache,
            new=lengths if cache is not None and lengths is not None and lengths.min() < ids.shape[1] else None,
        )

    def _new_cache(self, rows: int, size: int) -> KVCache:
        autocast = torch.is_autocast_enabled(self.device.type)
        dtype = torch.get_autocast_dtype(self.device.type) if autocast else self.model.embedding.weight.dtype
        if self.device.type == "cpu" and not autocast:  # see minillm/cpu.py; autocast would narrow what attention reads
            dtype = torch.promote_types(dtype, torch.float32)
        return KVCache(self.model.config, rows, size, self.device, dtype)

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """[B, T] ids, filled up with 0 on the right, and [B] lengths."""
        T = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (T - len(row))] for row in rows], device=self.device)
        return ids, torch.tensor([len(row) for row in rows], device=self.device)

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows alone, in this order; one may come several times, for texts that branch."""
        if list(rows) == list(range(len(self.starts))):
            return
        self.starts = [self.starts[row] for row in rows]
        index = torch.tensor(rows, device=self.device)
        if self.source is not None and self.source_segments is not None:
            self.source, self.source_segments = self.source[index], self.source_segments[index]
        if self.cache is not None:
            self.cache.keep(index)
            self.step = None


@contextmanager
def generating(model: Transformer) -> Iterator[None]:
    """Without dropout and gradients; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def check_arguments(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sources: Sequence[Sequence[int]] | None,
    banned_ids: Collection[int],
) -> None:
    """Raises `UserError` where the model cannot generate, or an argument does not fit it."""
    shape, V = model.config.shape, model.embedding.num_embeddings
    if shape == "encoder":
        raise UserError("this model is an encoder: it cannot generate text; take a decoder or an encoder-decoder")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if (sources is not None) != (shape == "encoder-decoder"):
        raise UserError(f"`sources` are for an encoder-decoder, and needed there; this model's shape is {shape}")
    if sources is not None and len(sources) != len(prompts):
        raise UserError(f"{len(sources)} sources do not fit {len(prompts)} prompts: give one each")
    for name, rows in (("prompt", prompts), ("source", sources or ())):
        for row, ids in enumerate(rows):
            if not ids:
                raise UserError(f"{name} {row} is empty: give at least one token, such as the tokenizer's document id")
            if not (0 <= min(ids) and max(ids) < V):
                raise UserError(f"{name} {row} holds ids outside the model's vocabulary of {V}: another tokenizer's?")
    if len({i for i in banned_ids if 0 <= i < V}) == V:
        raise UserError("every token of the vocabulary is banned")

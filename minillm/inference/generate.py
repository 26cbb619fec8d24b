"""Generation: read the prompts once, then one token a row and step, until each row has ended.

B rows, T tokens, S tokens of an encoder's source, V vocabulary. Rows of different lengths stand side by side, padded
on the right; a row that has ended leaves the batch and the cache.

Beyond the context there is one rule for all position schemes: the model reads at most `context` tokens, and where
one more would not fit it goes on from the last half of them, as if the text began there. What it reads is a
function of the text's length alone, so the cached and the uncached model agree there too.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from minillm.config import UserError
from minillm.inference.sampling import Sampling, pick, row_generator
from minillm.model.cache import KVCache
from minillm.model.transformer import Transformer


def window_start(tokens: int, context: int) -> int:
    """The first of `tokens` that the model still reads: 0 up to `context`, then in jumps of half a context."""
    jump = context - context // 2
    return max(0, -(-(tokens - context) // jump) * jump)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    first_row: int = 0,
    sources: Sequence[Sequence[int]] | None = None,
    stop_ids: Collection[int] = (),
    banned_ids: Collection[int] = (),
    on_token: Callable[[int, int], bool | None] | None = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """Continues each prompt; the rows do not influence each other, nor does this touch torch's global generator.

    Args:
        model: a decoder or an encoder-decoder; in evaluation mode meanwhile, and left as it was.
        prompts: token ids a row, at least one each (a text begins with the tokenizer's document id); of an
            encoder-decoder what its decoder begins with.
        sampling: None: `Sampling()`, which draws from the model's own distribution.
        seed: with the row's number it makes the row's random stream.
        first_row: number of the first row, where a longer list is generated in parts.
        sources: the encoder's ids a row, of an encoder-decoder.
        stop_ids: a row ends where one of these comes; it is not part of the result.
        banned_ids: never come (padding, masks, …).
        on_token: called with (row, id) for each new token; a row ends where it returns True.
        use_cache: False reads the whole text anew for each token: slow, and what the cache is tested against.

    Returns:
        The new ids of each row, without the prompt.

    Raises:
        UserError: the model cannot generate, an argument does not fit it, or its logits are not finite.
    """
    if not prompts:
        return []
    _check(model, prompts, max_new_tokens, sources, banned_ids)
    sampling = sampling or Sampling()
    device, V = model.embedding.weight.device, model.embedding.num_embeddings
    banned = torch.tensor([i for i in set(banned_ids) if 0 <= i < V], dtype=torch.long, device=device)
    texts = [list(prompt) for prompt in prompts]
    generators = [row_generator(seed, first_row + row) for row in range(len(texts))]
    seen = _seen(texts, V, device) if sampling.repetition_penalty != 1.0 else None

    with _evaluating(model), torch.no_grad():
        reader = _Reader(model, sources, max_new_tokens, use_cache)
        alive = list(range(len(texts)))  # the rows of the batch, in order
        for _ in range(max_new_tokens):
            logits = reader.next_logits([texts[row] for row in alive])
            logits[:, banned] = float("-inf")
            tokens = pick(logits, sampling, [generators[row] for row in alive], seen)
            kept = []
            for place, (row, token) in enumerate(zip(alive, tokens.tolist(), strict=True)):
                if token < 0:
                    raise UserError(
                        f"the model's logits are NaN or infinite after {len(texts[row])} tokens of row {row}"
                    )
                if token in stop_ids:
                    continue
                texts[row].append(token)
                if not (on_token and on_token(row, token)):
                    kept.append(place)
            if not kept:
                break
            if seen is not None:
                seen.scatter_(1, tokens.unsqueeze(1), True)
            if len(kept) < len(alive):
                alive = [alive[place] for place in kept]
                index = torch.tensor(kept, device=device)
                reader.keep(index)
                seen = None if seen is None else seen[index]
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


class _Reader:
    """The texts so far -> logits of their next tokens, with a KV cache or without."""

    def __init__(
        self, model: Transformer, sources: Sequence[Sequence[int]] | None, max_new_tokens: int, use_cache: bool
    ):
        self.model, self.room, self.use_cache = model, max_new_tokens, use_cache
        self.device = model.embedding.weight.device
        self.cache: KVCache | None = None
        self.starts: list[int] = []
        self.source: Tensor | None = None  # [B, S]
        self.source_segments: Tensor | None = None  # [B, S] 0, and -1 for padding
        if sources is not None:
            self.source, lengths = self._padded(sources)
            self.source_segments = -(torch.arange(self.source.shape[1], device=self.device) >= lengths[:, None]).long()

    def next_logits(self, texts: list[list[int]]) -> Tensor:
        """[B, V] fp32"""
        starts = [window_start(len(text), self.model.config.context) for text in texts]
        if self.cache is not None and starts == self.starts:
            last = torch.tensor([text[-1:] for text in texts], device=self.device)  # [B, 1]
            states = self._states(last)[:, -1]
        else:
            states = self._read([text[start:] for text, start in zip(texts, starts, strict=True)])
        self.starts = starts
        return self.model.head(states, self.model.output_weight).float()

    def _read(self, windows: list[list[int]]) -> Tensor:
        """All of `windows` at once -> the state [B, dim] at the last token of each."""
        ids, lengths = self._padded(windows)
        new = None
        if self.use_cache:
            self.cache = self._new_cache(len(windows), ids.shape[1])
            new = lengths if min(map(len, windows)) < ids.shape[1] else None
        states = self._states(ids, new)
        return states[torch.arange(len(windows), device=self.device), lengths - 1]

    def _states(self, ids: Tensor, new: Tensor | None = None) -> Tensor:
        source = None if self.cache is not None and self.cache.memory else self.source
        return self.model.states(
            ids, source=source, source_segments=self.source_segments, cache=self.cache, new=new
        )  # [B, T, dim]

    def _new_cache(self, rows: int, longest: int) -> KVCache:
        autocast = torch.is_autocast_enabled(self.device.type)
        dtype = torch.get_autocast_dtype(self.device.type) if autocast else self.model.embedding.weight.dtype
        size = min(longest + self.room, self.model.config.context)
        cache = KVCache(self.model.config, rows, size, self.device, dtype)
        if self.cache is not None:
            cache.memory = self.cache.memory  # the source has not changed, only the decoder's window
        return cache

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """[B, T] ids, filled up with 0 on the right, and [B] lengths."""
        T = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (T - len(row))] for row in rows], device=self.device)
        return ids, torch.tensor([len(row) for row in rows], device=self.device)

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows [B'] alone."""
        self.starts = [self.starts[row] for row in rows.tolist()]
        if self.source is not None and self.source_segments is not None:
            self.source, self.source_segments = self.source[rows], self.source_segments[rows]
        if self.cache is not None:
            self.cache.keep(rows)


@contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
    """Dropout off; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _seen(texts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Tensor:
    """[B, V] bool: which tokens stand in each text."""
    seen = torch.zeros(len(texts), vocab_size, dtype=torch.bool, device=device)
    for row, text in enumerate(texts):
        seen[row, torch.tensor(text, device=device)] = True
    return seen


def _check(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sources: Sequence[Sequence[int]] | None,
    banned_ids: Collection[int],
) -> None:
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

"""Beam search: the likeliest text, looked for with N texts a prompt side by side.

    score = log p(text) / length^α

Of all texts that are one token longer than the N best, the N likeliest go on. One that ends among them is scored;
the search is over when N have ended, or at the greatest length, where what is still going counts too. α above 0
favours long texts, 0 leaves the probability as it is. N = 1 is greedy generation. The length counts new tokens, the
one that ends a text among them, and of what an encoder-decoder's decoder begins with all but the first.

As in Transformers with `early_stopping=True`, and in fairseq. B prompts, N beams, V vocabulary.
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from minillm.config import UserError
from minillm.inference.reader import Reader, check_arguments, generating
from minillm.model.transformer import Transformer


class Search:
    """The beams of one prompt, of which `counted` tokens are a part of the text that is scored."""

    def __init__(self, prompt: Sequence[int], beams: int, length_penalty: float, counted: int = 0):
        self.prompt, self.beams, self.length_penalty, self.counted = list(prompt), beams, length_penalty, counted
        self.texts = [self.prompt]
        """[N] those that go on, the likeliest first."""
        self.scores = [0.0]
        """[N] log p of each; −inf for one that stands in where there are fewer than N."""
        self.ended: list[tuple[float, list[int]]] = []
        """Score and new ids of those that have ended."""

    def grow(self, candidates: Sequence[tuple[float, int, int]], stops: Collection[int], *, last: bool) -> list[int]:
        """One step.

        Args:
            candidates: (log p, beam, token), the likeliest first; enough that N of them go on.
            last: whether the text has its greatest length now.

        Returns:
            The beam that each of the new texts comes from.
        """
        length = self.counted + len(self.texts[0]) - len(self.prompt) + 1
        texts, scores, origins = [], [], []
        for rank, (log_p, beam, token) in enumerate(candidates):
            ends = token in stops
            if not ends and len(texts) < self.beams:
                texts.append([*self.texts[beam], token])
                scores.append(log_p)
                origins.append(beam)
            # What comes after the N likeliest is there to go on where these end, not to end itself.
            if (ends or last) and rank < self.beams and log_p > -math.inf:
                new = self.texts[beam][len(self.prompt) :] + ([] if ends else [token])
                self.ended.append((log_p / length**self.length_penalty, new))
        self.texts, self.scores = texts, scores
        return origins

    @property
    def over(self) -> bool:
        return len(self.ended) >= self.beams or max(self.scores, default=-math.inf) == -math.inf

    @property
    def best(self) -> list[int]:
        """The new ids of the best text that has ended."""
        return max(self.ended, key=lambda scored: scored[0])[1]


def beam_search(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    sources: Sequence[Sequence[int]] | None = None,
    stop_ids: Collection[int] = (),
    banned_ids: Collection[int] = (),
    use_cache: bool = True,
) -> list[list[int]]:
    """The best continuation of each prompt; the prompts do not influence each other.

    Args:
        model, prompts, max_new_tokens, sources, stop_ids, banned_ids, use_cache: as for `generate`.
        beams: N, at least 1; as many texts are read side by side for each prompt.
        length_penalty: α.

    Returns:
        The new ids of each row, without the prompt and without the stop id.

    Raises:
        UserError: as `generate`; or `beams` or `length_penalty` make no sense.
    """
    if beams < 1:
        raise UserError(f"beams must be at least 1, not {beams}")
    if not math.isfinite(length_penalty):
        raise UserError(f"length_penalty must be a finite number, not {length_penalty}")
    if not prompts:
        return []
    check_arguments(model, prompts, max_new_tokens, sources, banned_ids)
    V, device = model.embedding.num_embeddings, model.embedding.weight.device
    stops = {i for i in stop_ids if 0 <= i < V}
    banned = torch.tensor([i for i in set(banned_ids) if 0 <= i < V], dtype=torch.long, device=device)
    searches = [Search(prompt, beams, length_penalty, len(prompt) - 1 if sources else 0) for prompt in prompts]
    alive = searches
    with generating(model):
        reader = Reader(model, sources, max_new_tokens, use_cache)
        for step in range(1, max_new_tokens + 1):
            logits = reader.next_logits([text for search in alive for text in search.texts])  # [B · N, V]
            if not logits.isfinite().all():
                raise UserError(f"the model's logits are NaN or infinite after {step - 1} new tokens")
            logits[:, banned] = float("-inf")
            found = _candidates(logits.log_softmax(-1), alive, beams * (1 + len(stops)))
            kept, first, still = [], 0, []
            for search, candidates in zip(alive, found, strict=True):
                width = len(search.texts)
                origins = search.grow(candidates, stops, last=step == max_new_tokens)
                if not search.over:
                    kept += [first + beam for beam in origins]
                    still.append(search)
                first += width
            alive = still
            if not alive:
                break
            reader.keep(kept)
    return [search.best for search in searches]


def _candidates(log_p: Tensor, searches: Sequence[Search], count: int) -> list[list[tuple[float, int, int]]]:
    """For each search its likeliest texts that are one token longer, as `Search.grow` reads them.

    Args:
        log_p: [B · N, V] of each token, given the text.
        count: how many are needed: N and, since every text may end in each stop id, N more for each of these.
    """
    V = log_p.shape[-1]
    before = torch.tensor([search.scores for search in searches], device=log_p.device)  # [B, N]
    total = before.unsqueeze(-1) + log_p.view(*before.shape, V)  # [B, N, V]
    best, index = total.flatten(1).topk(min(count, total[0].numel()))
    return [
        [(value, *divmod(place, V)) for value, place in zip(values, places, strict=True)]
        for values, places in zip(best.tolist(), index.tolist(), strict=True)
    ]

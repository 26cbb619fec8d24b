"""Generation: read the prompts once, then draw one token a row and step, until each row has ended.

B rows, V vocabulary. A row that has ended leaves the batch and the cache. What a model reads of a text that is longer
than its context is said in `reader`.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from minillm.config import UserError
from minillm.inference.reader import Reader, check_arguments, generating
from minillm.inference.sampling import Sampling, pick, row_generator
from minillm.model.transformer import Transformer


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
    check_arguments(model, prompts, max_new_tokens, sources, banned_ids)
    sampling = sampling or Sampling()
    device, V = model.embedding.weight.device, model.embedding.num_embeddings
    banned = torch.tensor([i for i in set(banned_ids) if 0 <= i < V], dtype=torch.long, device=device)
    texts = [list(prompt) for prompt in prompts]
    generators = [row_generator(seed, first_row + row) for row in range(len(texts))]
    seen = _seen(texts, V, device) if sampling.repetition_penalty != 1.0 else None

    with generating(model):
        reader = Reader(model, sources, max_new_tokens, use_cache)
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
                reader.keep(kept)
                seen = None if seen is None else seen[torch.tensor(kept, device=device)]
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _seen(texts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Tensor:
    """[B, V] bool: which tokens stand in each text."""
    seen = torch.zeros(len(texts), vocab_size, dtype=torch.bool, device=device)
    for row, text in enumerate(texts):
        seen[row, torch.tensor(text, device=device)] = True
    return seen

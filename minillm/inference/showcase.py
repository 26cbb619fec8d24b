"""What a model can do, shown while it learns: the same prompt each time, and a number where there is one."""

import ast
from typing import Any

import torch
from torch import Tensor

from minillm.inference.generate import generate
from minillm.inference.sampling import Sampling
from minillm.inference.stream import stop_and_banned
from minillm.model.transformer import Transformer

PYTHON_PROMPT = "\n\ndef "
FUNCTIONS = 24
"""How many are sampled for the share that parses."""


def continuation(model: Transformer, tokenizer: Any, prompt: str, tokens: int, rows: int = 1) -> list[str]:
    """What follows `prompt` in each of `rows` samples."""
    stops, banned = stop_and_banned(tokenizer, model.config)
    ids = [tokenizer.document_id, *tokenizer.encode(prompt)]
    texts = generate(
        model,
        [ids] * rows,
        max_new_tokens=tokens,
        sampling=Sampling(temperature=0.8),
        seed=0,
        stop_ids=stops,
        banned_ids=banned,
    )
    return [tokenizer.decode(text) for text in texts]


def functions(model: Transformer, tokenizer: Any, tokens: int) -> dict[str, Any]:
    """Samples Python functions; the event of metrics.jsonl, with the share of them that parses."""
    texts = [first_function(text) for text in continuation(model, tokenizer, PYTHON_PROMPT, tokens, FUNCTIONS)]
    share = sum(parses(PYTHON_PROMPT + text) for text in texts) / len(texts)
    return {"prompt": PYTHON_PROMPT, "text": texts[0], "parses": share, "tried": len(texts)}


def first_function(text: str) -> str:
    """What follows `def`, up to the next line that is not indented, or to before the last line, which may be cut."""
    lines = text.rstrip("\n").split("\n")
    ends = (i for i, line in enumerate(lines) if i and line.strip() and not line.startswith((" ", "\t", ")")))
    return "\n".join(lines[: next(ends, max(1, len(lines) - 1))]).rstrip() + "\n"


def parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


@torch.no_grad()
def filled_masks(model: Transformer, tokenizer: Any, ids: Tensor, targets: Tensor, ignored: int) -> str:
    """What an encoder puts in the place of masks: each as ⟦guess⟧, or ⟦guess≠truth⟧ where it is wrong."""
    training = model.training
    model.eval()
    guesses = model(ids.unsqueeze(0).to(model.embedding.weight.device))[0].argmax(-1).tolist()
    model.train(training)
    text = []
    for token, guess, truth in zip(ids.tolist(), guesses, targets.tolist(), strict=True):
        if truth == ignored:
            text.append(tokenizer.decode([token]))
        else:
            shown, right = (tokenizer.decode([i]).replace("\n", "⏎") for i in (guess, truth))
            text.append(f"⟦{shown}⟧" if guess == truth else f"⟦{shown}≠{right}⟧")
    return "".join(text)


def filled_spans(model: Transformer, tokenizer: Any, source: list[int], tokens: int) -> str:
    """What an encoder-decoder puts in the place of sentinels: each as ⟦guess⟧."""
    stops, banned = stop_and_banned(tokenizer, model.config)
    answer = generate(
        model,
        [[tokenizer.document_id]],
        sources=[source],
        max_new_tokens=tokens,
        sampling=Sampling(temperature=0.0),
        stop_ids=stops,
        banned_ids=banned,
    )[0]
    sentinels, spans, at = set(tokenizer.sentinel_ids), {}, None
    for token in answer:
        if token in sentinels:
            at = token
            spans[at] = []
        elif at is not None:
            spans[at].append(token)
    parts = [f"⟦{tokenizer.decode(spans.get(i, []))}⟧" if i in sentinels else tokenizer.decode([i]) for i in source]
    return "".join(parts)

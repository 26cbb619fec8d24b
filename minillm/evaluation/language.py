"""What a loss means.

    perplexity = exp(loss);   bits per byte = loss · targets / (ln 2 · bytes)

Perplexity compares models of one tokenizer, bits per byte of any.
"""

import math


def language_scores(loss: float, *, targets: int, text_bytes: int) -> dict[str, float]:
    """perplexity and bits_per_byte; infinite where the perplexity exceeds what a float holds.

    Args:
        loss: mean over the targets, in nats.
        targets: how many there were.
        text_bytes: UTF-8 bytes of the text that they spell.

    Raises:
        ValueError: no targets, or no bytes.
    """
    if targets < 1 or text_bytes < 1:
        raise ValueError(f"{targets} targets in {text_bytes} bytes leave nothing to score; give some text")
    perplexity = math.exp(loss) if loss < 709 else math.inf
    return {"perplexity": perplexity, "bits_per_byte": loss * targets / math.log(2) / text_bytes}

"""tanh, for c · tanh(x / c): the softcap of attention's scores and of the logits (Gemma 2, 2024, section 2)."""

from __future__ import annotations

from ._launch import jit, tl


@jit
def tanh(x):
    """Odd series near 0, where 1 - exp(-2|x|) would cancel; its next term is below 1e-8 at the seam."""
    y = x * x
    series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))  # exp(-2|x|), which cannot overflow
    far = (1 - e) / (1 + e)
    return tl.where(y < 0.0625, series, tl.where(x < 0, -far, far))

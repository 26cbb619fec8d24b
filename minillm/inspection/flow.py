"""The page's section on gradients: their size from block to block, and what residual connections do for them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

Values = Sequence[float | None]
Scale = Callable[[float], float | None]
"""y -> units from the top, of 1000; None: it cannot be drawn."""

_NAMES = {"encoder": "Encoder", "decoder": "Decoder"}
_TEXT = (
    "<h2>Gradient flow</h2><p>Norms of the gradient of the mean loss (in nats): at the stream that enters a block, and "
    "of all the block's weights together. Values of about one size let every block learn at one rate; values that "
    "shrink towards the first block tell of gradients that vanish (Glorot and Bengio 2010; Xiong et al. 2020). Norms "
    "divide by the size of the stream, so where it is small, as often at the first block, its gradient is large.</p>"
    "<h3>What residual connections are for</h3><p>A gradient passes each block by the addition x + f(x), and goes "
    "through f too. <i>Through the blocks alone</i>: the same weights and values, but gradients go through every f and "
    "past none (Veit et al. 2016). <i>Nothing added</i>: the same weights with f(x) in the place of x + f(x), forward "
    "and backward; the norms keep up the size of what is left, but the tokens of the stream grow alike (Dong et al. "
    "2021).</p>"
)


def flow_section(found: dict[str, Any]) -> str:
    """HTML of what `measures.inspect` found under "gradients"."""
    stacks = found["gradients"]
    parts = ((f"<h3>{_NAMES[name]}</h3>" if len(stacks) > 1 else "") + _stack(flow) for name, flow in stacks.items())
    return _TEXT + "".join(parts)


def _stack(flow: dict[str, Values]) -> str:
    norms = {
        "kept": ("as it is", flow["streams"]),
        "alone": ("through the blocks alone", flow["streams_blocks_alone"]),
        "removed": ("nothing added", flow["streams_without_additions"]),
    }
    likeness = {
        "kept": ("as it is", flow["likeness"]),
        "removed": ("nothing added", flow["likeness_without_additions"]),
    }
    return (
        f"<p>{_sentence(flow)}</p>"
        + _figure(norms, "Norm of the gradient at the stream, by depth; logarithmic", log=True)
        + _figure(likeness, "Mean cosine of two tokens of the stream, by depth; at 1 all say the same", log=False)
        + _table(flow)
    )


def _sentence(flow: dict[str, Values]) -> str:
    """What the figures show, in numbers of this model."""
    first, alone = flow["streams"][0], flow["streams_blocks_alone"][0]
    likeness, removed = flow["likeness"][-1], flow["likeness_without_additions"][-1]
    said = (
        f"Here a gradient of {_number(first)} arrives at the first block; through the blocks alone, {_number(alone)}."
    )
    if likeness is None or removed is None:
        return said
    return f"{said} Two tokens at the end have a cosine of {likeness:.2f}; with nothing added, of {removed:.2f}."


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"


def _figure(lines: dict[str, tuple[str, Values]], title: str, *, log: bool) -> str:
    """A chart over the depths, which needs no script: class of a line -> (its name, its values)."""
    scale, marks = _scale([y for _, values in lines.values() for y in values], log)
    depths = max(len(values) for _, values in lines.values())
    every = math.ceil(depths / 14)
    heights = [(scale(y) or 0.0, words) for y, words in marks]
    rules = "".join(f'<line x1="0" x2="1000" y1="{y:.1f}" y2="{y:.1f}"/>' for y, _ in heights)
    paths = "".join(f'<path class="{style}" d="{_path(values, scale)}"/>' for style, (_, values) in lines.items())
    beside = "".join(f'<span class="y" style="top:{y / 10:.2f}%">{words}</span>' for y, words in heights)
    below = "".join(
        f'<span class="x" style="left:{100 * i / max(1, depths - 1):.2f}%">{"end" if i == depths - 1 else i}</span>'
        for i in range(depths)
        if i == depths - 1 or (i % every == 0 and i + every / 2 < depths)
    )
    keys = "".join(f'<span><i class="key {style}"></i>{name}</span>' for style, (name, _) in lines.items())
    return (
        f'<figure><figcaption>{title}<br>{keys}</figcaption><div class="plot{"" if log else " low"}">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{title}">{rules}{paths}</svg>'
        f"{beside}{below}</div></figure>"
    )


def _scale(values: Sequence[float | None], log: bool) -> tuple[Scale, list[tuple[float, str]]]:
    """(scale, marks with their words); logarithmic in whole powers of ten."""
    known = [y for y in values if y is not None]
    if not log:
        low = min(0.0, *known)
        return (lambda y: 1000 * (1 - y) / (1 - low)), [(0.0, "0"), (0.5, "0.5"), (1.0, "1")]
    powers = [math.log10(y) for y in known if y > 0] or [0.0]
    low, high = math.floor(min(powers)), math.ceil(max(powers))
    high = max(high, low + 1)
    marks = range(high, low - 1, -math.ceil((high - low) / 6))
    return (lambda y: 1000 * (high - math.log10(y)) / (high - low) if y > 0 else None), [
        (10.0**n, f"1e{n:+03d}") for n in marks
    ]


def _path(values: Values, scale: Scale) -> str:
    """A line with gaps where there is no number, or none that the scale has."""
    across, found, pen = 1000 / max(1, len(values) - 1), [], "M"
    for i, value in enumerate(values):
        y = None if value is None else scale(value)
        if y is not None:
            found.append(f"{pen}{i * across:.1f} {y:.1f}")
        pen = "M" if y is None else "L"
    return " ".join(found)


def _table(flow: dict[str, Values]) -> str:
    heads = "".join(
        f"<th>{name}</th>"
        for name in ("", "at the input stream", "of the weights", "through the blocks alone", "nothing added")
    )
    columns = [flow["streams"], [*flow["weights"], None]]
    columns += [flow["streams_blocks_alone"], flow["streams_without_additions"]]
    names = [*(f"block {i}" for i in range(len(flow["weights"]))), "end"]
    rows = "".join(
        f"<tr><th>{name}</th>{''.join(f'<td class=number>{_number(value)}</td>' for value in values)}</tr>"
        for name, *values in zip(names, *columns, strict=True)
    )
    return f'<div class="wide"><table><tr>{heads}</tr>{rows}</table></div>'

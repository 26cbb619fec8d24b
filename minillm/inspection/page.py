"""What `measures.inspect` found, as one HTML file that loads nothing, in light and dark.

The content security policy forbids every request, and every script but the one whose hash it names; tokens are text
everywhere: escaped here, `textContent` in the script.
"""

import base64
import hashlib
import html
import json
from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any

from minillm.inspection.flow import flow_section
from minillm.inspection.style import SCRIPT, STYLE

READS = {
    "encoder": "Encoder: the source reads itself",
    "decoder": "Decoder: the text reads itself",
    "cross": "Across: the text reads the source",
}
"""What each kind of attention does, where a model has more than one."""
_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}


def page(model: str, found: dict[str, Any]) -> str:
    """The whole file. `found`: what `inspect` returns, and `text_tokens` and `read_tokens` of each text."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    read, of = found["read_tokens"], found["text_tokens"]
    cut = f" Only the first {read} of the text's {of} tokens were read (--max-tokens, or the context)." * (read < of)
    if found["source"]:
        read, of = found["source"]["read_tokens"], found["source"]["text_tokens"]
        cut += f" Of the source the first {read} of {of} tokens were read." * (read < of)
    kind = "each token masked in turn (Salazar et al. 2020)" if found["shape"] == "encoder" else "each next token"
    parts = [
        f'<p class="over">minillm inspect</p><h1>{html.escape(model)}</h1>'
        f"<p>{found['mean_bits']:.3f} bits a token: the mean loss on {kind}.{cut}</p>",
        *(part(found) for part in (_text, _maps, _lens, _ablation, flow_section)),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Inside {html.escape(model)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{STYLE}\n</style>\n<body>\n{''.join(parts)}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def visible(token: str) -> str:
    """A token with its spaces to be seen, and without characters that would act on the text around them."""
    shown = (_VISIBLE.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in token)
    return "".join(shown)


def _token(token: str) -> str:
    return html.escape(visible(token))


def _shade(share: float, colour: str = "mark") -> str:
    """A background of 0 (none) to 1, light enough for the text on it."""
    return f"background:color-mix(in srgb, var(--{colour}) {60 * min(max(share, 0), 1):.0f}%, transparent)"


def _text(found: dict[str, Any]) -> str:
    bits: dict[int, float] = dict(zip(found["scored"], found["bits"], strict=True))
    most = max(bits.values())
    spans = (
        f'<span style="{_shade(bits[i] / (most or 1))}" title="{bits[i]:.2f} bits">{_token(token)}</span>'
        if i in bits
        else f'<span title="not scored">{_token(token)}</span>'
        for i, token in enumerate(found["tokens"])
    )
    source = ""
    if found["source"]:
        tokens = "".join(f"<span>{_token(token)}</span>" for token in found["source"]["tokens"])
        source = f'<p class="under">The encoder reads:</p><p class="text">{tokens}</p><p class="under">The decoder:</p>'
    return (
        "<h2>The loss of each token</h2><p>The stronger the shade, the more bits it took to say this token: −log₂ of "
        f"the probability that the model gave it (Shannon 1951). The strongest took {most:.1f}. The pointer on "
        "a token shows its own.</p>"
        f'{source}<p class="text">{"".join(spans)}</p>'
    )


def _maps(found: dict[str, Any]) -> str:
    parts = "".join(
        _headed(kind, found["attention"], _kind_maps(kind, maps, found)) for kind, maps in found["attention"].items()
    )
    return (
        "<h2>Attention maps</h2><p>A row is a token that reads, a column one that is read; the weights of a row add "
        "up to 1 (Vaswani et al. 2017, §3.2.1). The shade is the square root of the weight, so that small ones can be "
        "seen. A click shows a map large. What is read is not yet what decides: that is what the ablation below "
        f"asks (Jain and Wallace 2019).</p>{parts}"
    )


def _headed(kind: str, kinds: Collection[str], body: str) -> str:
    """A part of a section, with a heading where there are several."""
    return f"<h3>{READS[kind]}</h3>{body}" if len(kinds) > 1 else body


def _kind_maps(kind: str, maps: Sequence[Any], found: dict[str, Any]) -> str:
    """Small maps, one of them large, and the place for its labels: the script fills them."""
    source = found["source"] or found
    queries = (source if kind == "encoder" else found)["tokens"]
    keys = (found if kind == "decoder" else source)["tokens"]
    flat = chain.from_iterable(row for layer in maps for head in layer for row in head)
    weights = base64.b64encode(bytes(round(255 * weight) for weight in flat)).decode()
    names = " ".join(
        f'data-{name}="{html.escape(json.dumps([visible(token) for token in tokens], ensure_ascii=False))}"'
        for name, tokens in (("queries", queries), ("keys", keys))
    )
    rows = "".join(
        f"<span>block {i}</span>"
        + "".join(f'<button title="block {i}, head {h}"><canvas></canvas></button>' for h in range(len(layer)))
        for i, layer in enumerate(maps)
    )
    heads = "".join(f"<span>head {h}</span>" for h in range(len(maps[0])))
    shape = len(keys) / len(queries)
    largest = min(50 * min(1, shape), max(18, 2.4 * len(keys)))  # of few tokens no wall of a map
    width = f"width:min(100%, {largest:.1f}rem)"
    return (
        f'<div class="maps" {names} data-weights="{weights}">'
        f'<div class="wide"><div class="grid" style="grid-template-columns:repeat({len(maps[0]) + 1}, max-content)">'
        f'<span></span>{heads}{rows}</div></div><div class="large" style="{width}">'
        '<div class="keys"></div><div class="queries"></div>'
        f'<div style="aspect-ratio:{shape:.3f}"><canvas></canvas></div></div><p class="readout"></p></div>'
    )


def _lens(found: dict[str, Any]) -> str:
    lens, tokens = found["lens"], found["tokens"]
    depths = ["embedding", *(f"block {i}" for i in range(len(lens) - 1))]
    decoder = found["shape"] != "encoder"
    rows = []
    for n, at in enumerate(found["scored"]):
        cells = [
            f'<td class="token" style="{_shade(depth["probabilities"][n])}" title="{depth["probabilities"][n]:.1%}">'
            f"{_bold(_token(depth['tokens'][n]), depth['ids'][n] == found['ids'][at])}</td>"
            for depth in lens
        ]
        reads = f'<td class="token">{_token(tokens[at - 1])}</td>' if decoder else ""
        rows.append(f'<tr>{reads}{"".join(cells)}<td class="token">{_token(tokens[at])}</td></tr>')
    names = "".join(f"<th>{name}</th>" for name in depths)
    bits = "".join(f'<td class="number">{depth["mean_bits"]:.2f}</td>' for depth in lens)
    before = "<th>after</th>" if decoder else ""
    loss = '<td class="number">loss</td>' if decoder else ""
    return (
        "<h2>Logit lens</h2><p>What the model would say if it ended at that depth: the last norm and the output matrix "
        "on the stream there (nostalgebraist 2020, “interpreting GPT: the logit lens”). In each cell the likeliest "
        "token, its shade the stronger the surer, bold where it is the one that was to be said. The first row is the "
        f'loss by depth, in bits a token.</p><div class="wide"><table>'
        f"<tr>{before}{names}<th>to be said</th></tr><tr>{loss}{bits}<td></td></tr>"
        f"{''.join(rows)}</table></div>"
    )


def _bold(text: str, right: bool) -> str:
    return f"<b>{text}</b>" if right else text


def _ablation(found: dict[str, Any]) -> str:
    kinds = found["ablation_bits"]
    most = max(abs(change) for changes in kinds.values() for layer in changes for change in layer) or 1.0
    parts = "".join(_headed(kind, kinds, _ablation_table(changes, most)) for kind, changes in kinds.items())
    return (
        "<h2>Without a head</h2><p>Bits a token by which the loss rises where a head's output is set to zero, all else "
        "as it is (Michel et al. 2019). Red: the head helps on this text; green: the text goes better without it. One "
        f"text says little of a head in general.</p>{parts}"
    )


def _ablation_table(changes: Sequence[Sequence[float]], most: float) -> str:
    heads = "".join(f"<th>head {h}</th>" for h in range(len(changes[0])))

    def cell(change: float) -> str:
        shade = _shade(abs(change) / most, "bad" if change > 0 else "good")
        return f'<td class="number" style="{shade}">{change:+.3f}</td>'

    rows = "".join(f"<tr><th>block {i}</th>{''.join(map(cell, layer))}</tr>" for i, layer in enumerate(changes))
    return f'<div class="wide"><table><tr><th></th>{heads}</tr>{rows}</table></div>'

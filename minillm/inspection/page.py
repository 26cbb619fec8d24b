"""What `measures.inspect` found, as one HTML file that loads nothing, in light and dark.

The content security policy forbids every request, and every script but the one whose hash it names; tokens are text
everywhere: escaped here, `textContent` in the script.
"""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

STYLE = """
:root { --paper: #fcfcfa; --ink: #20242a; --soft: #646b75; --hair: #e4e4df; --panel: #f4f4f0;
  --mark: #1f5fa8; --good: #2c7a4b; --bad: #a8452c; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e3e5e8; --soft: #969da7; --hair: #2c3138;
  --panel: #1c2026; --mark: #7db3ef; --good: #7cc596; --bad: #e59a82; } }
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 3.5rem 1.5rem 3rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif;
  font-variant-numeric: tabular-nums; }
h1, h2 { font-family: Charter, "Bitstream Charter", "Iowan Old Style", Cambria, Georgia, "Liberation Serif", serif; }
h1 { margin: 0; font-size: 2.4rem; line-height: 1.15; font-weight: 600; overflow-wrap: anywhere; }
h2 { margin: 3.2rem 0 0.9rem; font-size: 1.35rem; font-weight: 600; }
p { margin: 0 0 1rem; max-width: 42rem; } .over, .under { color: var(--soft); font-size: 0.85rem; margin: 0.4rem 0; }
.text, td.token, .large span, .readout { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.text { line-height: 2.1; overflow-wrap: anywhere; }
.text span { padding: 0.2rem 0; border-right: 1px solid var(--paper); white-space: pre-wrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.82rem; }
th, td { padding: 0.15rem 0.6rem; text-align: left; border-bottom: 1px solid var(--hair); white-space: nowrap; }
th { color: var(--soft); font-weight: 400; } td.number { text-align: right; }
.bar { display: inline-block; height: 0.6rem; background: var(--mark); border-radius: 1px; }
.grid { display: grid; gap: 0.35rem; width: max-content; align-items: center; font-size: 0.75rem; color: var(--soft); }
.grid button { width: 4.4rem; height: 4.4rem; padding: 0; border: 1px solid var(--hair); background: var(--panel);
  cursor: pointer; }
.grid button[aria-pressed=true] { outline: 2px solid var(--mark); }
canvas { display: block; width: 100%; height: 100%; image-rendering: pixelated; }
.large { display: grid; grid-template: max-content 1fr / max-content 1fr; width: min(100%, 50rem); margin-top: 1.5rem; }
.large .keys, .large .queries { display: flex; font-size: 0.62rem; line-height: 1; color: var(--soft); }
.large .keys { grid-column: 2; } .large .queries { grid-column: 1; flex-direction: column; }
.large .keys span { flex: 1 1 0; width: 0; writing-mode: vertical-rl; transform: rotate(180deg); display: flex;
  align-items: center; }
.large .queries span { flex: 1 1 0; height: 0; display: flex; align-items: center; justify-content: end; }
.large span { padding: 0 0.25rem; white-space: pre; }
.large div:last-child { aspect-ratio: 1; border: 1px solid var(--hair); background: var(--panel); }
.readout { min-height: 1.6em; font-size: 0.85rem; }
@media print { body { padding: 0; max-width: none; font-size: 10pt; } h2 { break-after: avoid; } }
""".strip()

SCRIPT = """
const maps = document.querySelector(".maps"), tokens = JSON.parse(maps.dataset.tokens), T = tokens.length;
const weights = Uint8Array.from(atob(maps.dataset.weights), letter => letter.charCodeAt(0));
const mark = getComputedStyle(document.documentElement).getPropertyValue("--mark").trim();
const rgb = [1, 3, 5].map(i => parseInt(mark.slice(i, i + 2), 16));
function draw(canvas, map) {
  canvas.width = canvas.height = T;
  const image = new ImageData(T, T);
  for (let i = 0; i < T * T; i++)
    image.data.set([...rgb, Math.sqrt(weights[map * T * T + i] / 255) * 255], 4 * i);
  canvas.getContext("2d").putImageData(image, 0, 0);
}
const buttons = [...maps.querySelectorAll("button")], readout = maps.querySelector(".readout");
const large = maps.querySelector(".large canvas");
let shown = 0;
function show(map) {
  shown = map;
  draw(large, map);
  buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === map));
  readout.textContent = buttons[map].title;
}
for (const place of maps.querySelectorAll(".keys, .queries"))
  for (const token of tokens) {
    const label = document.createElement("span");
    label.textContent = token.length > 12 ? token.slice(0, 11) + "…" : token;
    place.append(label);
  }
buttons.forEach((button, i) => {
  draw(button.firstChild, i);
  button.addEventListener("click", () => show(i));
});
large.addEventListener("pointermove", event => {
  const box = large.getBoundingClientRect(), place = share => Math.min(T - 1, Math.max(0, Math.floor(share * T)));
  const key = place((event.clientX - box.left) / box.width), query = place((event.clientY - box.top) / box.height);
  const share = (100 * weights[(shown * T + query) * T + key] / 255).toFixed(0);
  const said = `${query} ${tokens[query]} takes ${share} % from ${key} ${tokens[key]}`;
  readout.textContent = `${buttons[shown].title}: ${said}`;
});
large.addEventListener("pointerleave", () => readout.textContent = buttons[shown].title);
show(0);
""".strip()

_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}


def page(model: str, found: dict[str, Any]) -> str:
    """The whole file. `found`: what `inspect` returns, and `text_tokens` and `read_tokens` of the text."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    read, of = found["read_tokens"], found["text_tokens"]
    cut = f" Only the first {read} of the text's {of} tokens were read (--max-tokens, or the context)." * (read < of)
    kind = "each next token" if found["shape"] == "decoder" else "each token masked in turn (Salazar et al. 2020)"
    parts = [
        f'<p class="over">minillm inspect</p><h1>{html.escape(model)}</h1>'
        f"<p>{found['mean_bits']:.3f} bits a token: the mean loss on {kind}.{cut}</p>",
        *(part(found) for part in (_text, _maps, _lens, _ablation, _gradients)),
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
    return (
        "<h2>The loss of each token</h2><p>The stronger the shade, the more bits it took to say this token: −log₂ of "
        f"the probability that the model gave it (Shannon 1951). The strongest took {most:.1f}. The pointer on "
        "a token shows its own.</p>"
        f'<p class="text">{"".join(spans)}</p>'
    )


def _maps(found: dict[str, Any]) -> str:
    maps = found["attention"]
    flat = chain.from_iterable(row for layer in maps for head in layer for row in head)
    weights = base64.b64encode(bytes(round(255 * weight) for weight in flat)).decode()
    tokens = html.escape(json.dumps([visible(token) for token in found["tokens"]], ensure_ascii=False))
    rows = "".join(
        f"<span>block {i}</span>"
        + "".join(f'<button title="block {i}, head {h}"><canvas></canvas></button>' for h in range(len(layer)))
        for i, layer in enumerate(maps)
    )
    heads = "".join(f"<span>head {h}</span>" for h in range(len(maps[0])))
    return (
        "<h2>Attention maps</h2><p>A row is a token that reads, a column one that is read; the weights of a row add "
        "up to 1 (Vaswani et al. 2017, §3.2.1). The shade is the square root of the weight, so that small ones can be "
        "seen. A click shows a map large. What is read is not yet what decides: that is what the ablation below "
        f'asks (Jain and Wallace 2019).</p><div class="maps" data-tokens="{tokens}" data-weights="{weights}">'
        f'<div class="wide"><div class="grid" style="grid-template-columns:repeat({len(maps[0]) + 1}, max-content)">'
        f'<span></span>{heads}{rows}</div></div><div class="large"><div class="keys"></div><div class="queries"></div>'
        '<div><canvas></canvas></div></div><p class="readout"></p></div>'
    )


def _lens(found: dict[str, Any]) -> str:
    lens, tokens = found["lens"], found["tokens"]
    depths = ["embedding", *(f"block {i}" for i in range(len(lens) - 1))]
    decoder = found["shape"] == "decoder"
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
    changes: Sequence[Sequence[float]] = found["ablation_bits"]
    most = max(abs(change) for layer in changes for change in layer) or 1.0
    heads = "".join(f"<th>head {h}</th>" for h in range(len(changes[0])))

    def cell(change: float) -> str:
        shade = _shade(abs(change) / most, "bad" if change > 0 else "good")
        return f'<td class="number" style="{shade}">{change:+.3f}</td>'

    rows = "".join(f"<tr><th>block {i}</th>{''.join(map(cell, layer))}</tr>" for i, layer in enumerate(changes))
    return (
        "<h2>Without a head</h2><p>Bits a token by which the loss rises where a head's output is set to zero, all else "
        "as it is (Michel et al. 2019). Red: the head helps on this text; green: the text goes better without it. One "
        'text says little of a head in general.</p><div class="wide"><table>'
        f"<tr><th></th>{heads}</tr>{rows}</table></div>"
    )


def _gradients(found: dict[str, Any]) -> str:
    streams, weights = found["gradient_norms"]["streams"], found["gradient_norms"]["weights"]

    def cell(norm: float, most: float) -> str:
        bar = f'<i class="bar" style="width:{12 * norm / (most or 1):.2f}rem"></i>'
        return f'<td class="number">{norm:.2e}</td><td>{bar}</td>'

    rows = "".join(
        f"<tr><th>block {i}</th>{cell(streams[i], max(streams))}{cell(weights[i], max(weights))}</tr>"
        for i in range(len(weights))
    )
    end = f"<tr><th>end</th>{cell(streams[-1], max(streams))}<td></td><td></td></tr>"
    return (
        "<h2>Gradient flow</h2><p>Norms of the gradient of the mean loss (in nats): at the stream that enters a block, "
        "and of all the block's weights together. Bars of about one length let every block learn at one rate; bars "
        "that shrink towards the first block tell of gradients that vanish (Glorot and Bengio 2010; Xiong et al. "
        "2020). Norms divide by the size of the stream, so where it is small, as often at the first block, its "
        "gradient is large.</p>"
        f'<div class="wide"><table><tr><th></th><th colspan="2">at the input stream</th><th colspan="2">of the weights'
        f"</th></tr>{rows}{end}</table></div>"
    )

"""The frame of the report: one HTML file that loads nothing, in light and dark, for screens, phones and paper.

The content security policy forbids every request, and every script but the one whose hash it names: text that a model
wrote could do nothing even if it were not escaped.
"""

import base64
import hashlib
import html

STYLE = """
:root {
  --paper: #fcfcfa; --ink: #20242a; --soft: #646b75; --hair: #e4e4df; --panel: #f4f4f0;
  --first: #a9b6c6; --second: #1f5fa8; --level: #b9b3a6; --good: #2c7a4b; --bad: #a8452c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --ink: #e3e5e8; --soft: #969da7; --hair: #2c3138; --panel: #1c2026;
    --first: #6b7a8e; --second: #7db3ef; --level: #6b665b; --good: #7cc596; --bad: #e59a82;
  }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 3.5rem 1.5rem 3rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
h1, h2, .score b {
  font-family: Charter, "Bitstream Charter", "Iowan Old Style", Cambria, Georgia, "Liberation Serif", serif;
}
h1 { margin: 0; font-size: 2.4rem; line-height: 1.15; font-weight: 600; letter-spacing: -0.01em; }
h2 { margin: 3.2rem 0 0.9rem; font-size: 1.35rem; font-weight: 600; }
h3 { margin: 0 0 0.5rem; font-size: 0.85rem; font-weight: 600; }
p { margin: 0 0 0.6rem; max-width: 42rem; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.over { margin: 0 0 0.4rem; color: var(--soft); font-size: 0.85rem; letter-spacing: 0.04em; }
.under { margin: 0.6rem 0 0; color: var(--soft); max-width: none; }
.verdict {
  display: grid; grid-template-columns: minmax(9rem, auto) 1fr; gap: 0.5rem 3rem; margin-top: 2.4rem;
  align-items: start;
}
.score b { display: block; font-size: 3.6rem; line-height: 1; font-weight: 600; color: var(--second); }
.score span { color: var(--soft); font-size: 0.9rem; }
.rank {
  display: grid; grid-template-columns: max-content 1fr max-content; gap: 0.35rem 0.9rem;
  align-items: center; margin-top: 2rem; font-size: 0.9rem;
}
.rank i { display: block; height: 0.55rem; border-radius: 1px; background: var(--level); opacity: 0.55; }
.rank .own { font-weight: 600; } .rank i.own { background: var(--second); opacity: 1; }
figure { margin: 0; }
figcaption {
  display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; font-size: 0.85rem;
  min-height: 1.6em;
}
.readout { color: var(--soft); } .readout b { color: var(--ink); font-weight: 600; }
.plot { position: relative; height: 8.5rem; margin: 0.5rem 0.4rem 3.6rem 3.2rem; touch-action: pan-y; }
.tall .plot { height: 22rem; margin-bottom: 4.6rem; } .labelled .plot { margin-right: 8.6rem; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke-width: 1; }
.plot .grid { stroke: var(--hair); }
.plot .level { stroke: var(--level); stroke-dasharray: 1 4; stroke-linecap: round; stroke-width: 1.5; }
.plot .line { stroke-width: 1.75; stroke-linejoin: round; } .plot .dots { stroke-width: 6; stroke-linecap: round; }
.plot .first { stroke: var(--first); } .plot .second { stroke: var(--second); }
.small .plot { margin-bottom: 1.8rem; } .small .plot .first { stroke: var(--second); stroke-width: 1.4; }
.plot span { position: absolute; font-size: 0.75rem; line-height: 1.25; color: var(--soft); white-space: nowrap; }
.plot .y { right: calc(100% + 0.6rem); transform: translateY(-50%); }
.plot .x { top: calc(100% + 0.5rem); transform: translateX(-50%); text-align: center; }
.plot .x.start { transform: none; text-align: left; }
.plot .x.end { transform: translateX(-100%); text-align: right; }
.plot small { display: block; font-size: inherit; } .plot small + small { opacity: 0.75; }
.plot .label { left: calc(100% + 0.7rem); transform: translateY(-50%); } .plot .label b { font-weight: 600; }
.plot .label.second { color: var(--second); }
.cursor {
  display: none; position: absolute; top: 0; bottom: 0; width: 1px; background: var(--soft);
  pointer-events: none;
}
.legend { margin: 0 0 1.2rem; color: var(--soft); font-size: 0.85rem; }
.key {
  display: inline-block; width: 1.1rem; height: 0; border-top: 2px solid; vertical-align: middle;
  margin: 0 0.35rem 0 0.9rem;
}
.key.first { border-color: var(--first); margin-left: 0; } .key.second { border-color: var(--second); }
.key.level { border-color: var(--level); border-top-style: dotted; }
.small {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 0.5rem 1.5rem;
  margin-top: 1.2rem;
}
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1.2rem; }
.samples pre {
  margin: 0; padding: 0.9rem 1rem; background: var(--panel); border-radius: 4px; font-size: 0.78rem; line-height: 1.5;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 30rem; overflow-y: auto;
}
.samples pre em { font-style: normal; color: var(--second); }
.samples h3 span { float: right; color: var(--soft); font-weight: 400; }
.pairs { columns: 2 24rem; column-gap: 3rem; } .pairs section { break-inside: avoid; }
dl {
  display: grid; grid-template-columns: minmax(8rem, 11rem) 1fr; gap: 0 1rem; margin: 0 0 1.2rem;
  font-size: 0.9rem; break-inside: avoid;
}
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; }
th, td {
  padding: 0.32rem 1rem 0.32rem 0; text-align: left; border-bottom: 1px solid var(--hair);
  overflow-wrap: anywhere; vertical-align: top;
}
th { color: var(--soft); font-weight: 400; }
td:first-child { width: 40%; } td + td + td { color: var(--soft); }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--soft); font-size: 0.9rem; }
.next { padding: 0; margin: 0; list-style: none; }
.next li { margin: 0 0 1rem; }
.next code {
  display: block; padding: 0.55rem 0.9rem; background: var(--panel); border-radius: 4px;
  font-size: 0.85rem; overflow-wrap: anywhere;
}
.next span { color: var(--soft); font-size: 0.9rem; }
footer {
  margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--hair); color: var(--soft);
  font-size: 0.8rem;
}
@media (max-width: 44rem) {
  body { padding: 2rem 1rem; } h1 { font-size: 1.8rem; }
  .verdict { grid-template-columns: 1fr; gap: 1.2rem; }
  .labelled .plot { margin-right: 6.6rem; } .tall .plot { height: 18rem; margin-left: 2.4rem; }
  .plot .minor { display: none; }
  dl { grid-template-columns: 8rem 1fr; }
}
@media print {
  :root {
    --paper: #fff; --ink: #000; --soft: #555; --hair: #ddd; --panel: #f6f6f6;
    --first: #a9b6c6; --second: #1f5fa8; --level: #999;
  }
  body { padding: 0; max-width: none; font-size: 10pt; }
  .samples pre { max-height: none; }
  figure, .samples > div, .next li, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
""".strip()

SCRIPT = """
const plots = [...document.querySelectorAll(".plot")].map(plot => ({
  plot, data: JSON.parse(plot.dataset.chart), cursor: plot.querySelector(".cursor"),
  readout: plot.parentNode.querySelector(".readout"), rest: plot.parentNode.querySelector(".readout").innerHTML,
}));
const nearest = (points, x) =>
  points.reduce((best, point) => Math.abs(point[0] - x) <= Math.abs(best[0] - x) ? point : best);
function show(share) {
  for (const {data, cursor, readout} of plots) {
    const x = data.low + share * data.across, parts = [];
    if (data.words.length) parts.push([nearest(data.words, x)[1], ""]);
    for (const [name, points] of data.lines)
      if (points.length) parts.push([name ? name + " " : "", nearest(points, x)[1], data.unit]);
    readout.replaceChildren();
    parts.forEach(([name, value, unit], i) => {
      readout.append((i ? " · " : "") + name);
      const bold = document.createElement("b");
      bold.textContent = value;
      readout.append(bold, unit || "");
    });
    cursor.style.display = "block";
    cursor.style.left = 100 * share + "%";
  }
}
function rest() {
  for (const {cursor, readout, rest} of plots) { cursor.style.display = "none"; readout.innerHTML = rest; }
}
for (const {plot} of plots) {
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    show(Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)));
  });
  plot.addEventListener("pointerleave", rest);
}
""".strip()


def page(title: str, body: str) -> str:
    """The whole file; `title` is escaped here, `body` is HTML already."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{STYLE}\n</style>\n<body>\n{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )

"""How the page looks, in light and dark, and the script that draws its attention maps."""

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
h3 { margin: 2rem 0 0.7rem; font-size: 0.95rem; font-weight: 600; }
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
.large { display: grid; grid-template: max-content 1fr / max-content 1fr; margin-top: 1.5rem; }
.large .keys, .large .queries { display: flex; font-size: 0.62rem; line-height: 1; color: var(--soft); }
.large .keys { grid-column: 2; } .large .queries { grid-column: 1; flex-direction: column; }
.large .keys span { flex: 1 1 0; width: 0; writing-mode: vertical-rl; transform: rotate(180deg); display: flex;
  align-items: center; }
.large .queries span { flex: 1 1 0; height: 0; display: flex; align-items: center; justify-content: end; }
.large span { padding: 0 0.25rem; white-space: pre; }
.large div:last-child { border: 1px solid var(--hair); background: var(--panel); }
.readout { min-height: 1.6em; font-size: 0.85rem; }
figure { margin: 1.4rem 0 3rem; max-width: 50rem; }
figcaption { font-size: 0.85rem; color: var(--soft); margin: 0 0 0.6rem 3.6rem; }
.key { display: inline-block; width: 1.2rem; margin: 0 0.4rem 0.2rem 0; border-top: 2px solid; vertical-align: middle; }
figcaption span { white-space: nowrap; margin-right: 1.4rem; }
.kept { stroke: var(--mark); border-color: var(--mark); } .alone { stroke: var(--bad); border-color: var(--bad); }
.removed { stroke: var(--soft); border-color: var(--soft); stroke-dasharray: 5 4; border-top-style: dashed; }
.plot { position: relative; height: 14rem; margin: 0 1rem 1.6rem 3.6rem; font-size: 0.72rem; color: var(--soft); }
.plot.low { height: 7rem; }
.plot svg { position: absolute; width: 100%; height: 100%; overflow: visible; }
.plot path, .plot line { fill: none; stroke-width: 2px; vector-effect: non-scaling-stroke; }
.plot line { stroke: var(--hair); stroke-width: 1px; }
.plot span { position: absolute; line-height: 1; white-space: nowrap; }
.plot .y { right: 100%; margin-right: 0.5rem; transform: translateY(-50%); }
.plot .x { top: 100%; margin-top: 0.5rem; transform: translateX(-50%); }
@media print { body { padding: 0; max-width: none; font-size: 10pt; } h2 { break-after: avoid; } }
""".strip()

SCRIPT = """
const mark = getComputedStyle(document.documentElement).getPropertyValue("--mark").trim();
const rgb = [1, 3, 5].map(i => parseInt(mark.slice(i, i + 2), 16));
function set(maps) {
  const queries = JSON.parse(maps.dataset.queries), keys = JSON.parse(maps.dataset.keys);
  const weights = Uint8Array.from(atob(maps.dataset.weights), letter => letter.charCodeAt(0));
  const T = queries.length, S = keys.length;
  const buttons = [...maps.querySelectorAll("button")], readout = maps.querySelector(".readout");
  const large = maps.querySelector(".large canvas");
  let shown = 0;
  function draw(canvas, map) {
    canvas.width = S;
    canvas.height = T;
    const image = new ImageData(S, T);
    for (let i = 0; i < T * S; i++)
      image.data.set([...rgb, Math.sqrt(weights[map * T * S + i] / 255) * 255], 4 * i);
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
  function show(map) {
    shown = map;
    draw(large, map);
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === map));
    readout.textContent = buttons[map].title;
  }
  for (const [place, tokens] of [[".keys", keys], [".queries", queries]])
    for (const token of tokens) {
      const label = document.createElement("span");
      label.textContent = token.length > 12 ? token.slice(0, 11) + "…" : token;
      maps.querySelector(place).append(label);
    }
  buttons.forEach((button, i) => {
    draw(button.firstChild, i);
    button.addEventListener("click", () => show(i));
  });
  large.addEventListener("pointermove", event => {
    const box = large.getBoundingClientRect();
    const place = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    const key = place((event.clientX - box.left) / box.width, S);
    const query = place((event.clientY - box.top) / box.height, T);
    const share = (100 * weights[(shown * T + query) * S + key] / 255).toFixed(0);
    const said = `${query} ${queries[query]} takes ${share} % from ${key} ${keys[key]}`;
    readout.textContent = `${buttons[shown].title}: ${said}`;
  });
  large.addEventListener("pointerleave", () => readout.textContent = buttons[shown].title);
  show(0);
}
document.querySelectorAll(".maps").forEach(set);
""".strip()

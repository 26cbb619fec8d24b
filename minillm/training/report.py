"""report.html: what a run did and how good it is, on one page made of config.json and metrics.jsonl.

Whatever is missing is left out: a run of two steps, one without baselines, or one that broke down has a report too.
All text is escaped: samples are what a model wrote.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minillm.config import Settings, to_dict
from minillm.training import breakdown, lr_range
from minillm.training.charts import Level, Line, chart, compact, duration, finite, number, round_step
from minillm.training.page import page
from minillm.training.run import read_config, read_metrics
from minillm.training.verdict import Scores, next_commands, score, scores, verdict

__all__ = ["next_commands", "verdict", "write_report"]


def write_report(run: Path, concluded: Sequence[str] = ()) -> Path:
    """Writes RUN/report.html, all of it or nothing, and returns its path.

    Args:
        concluded: sentences on what a finetuned model is worth, which stand first.

    Raises `UserError` where RUN holds no config.json, `DamagedFile` where that cannot be read.
    """
    run = Path(run)
    config, metrics = read_config(run), read_metrics(run)
    result = scores(metrics)
    if lr_range.applies(config):  # how good a run is that was to break down at its end is not the question
        result = replace(result, validation=[], baselines={})
    title = f"{_setting(config, 'preset', 'run')} on {Path(str(_setting(config, 'source', 'text'))).name}"
    sections = [
        _head(title, config, metrics),
        _verdict([*concluded, *verdict(config, metrics)], result),
        _range(metrics) if lr_range.applies(config) else "",
        _curves(metrics, result),
        _samples(metrics),
        breakdown.section(run),
        _what_ran(config, metrics),
        _settings(config.get("settings") or {}),
        _next(run, config, metrics),
        "<footer>Made from config.json and metrics.jsonl of this run; this page loads nothing.</footer>",
    ]
    path, temporary = run / "report.html", run / "report.tmp"
    temporary.write_text(page(f"minillm: {title}", "\n".join(filter(None, sections))), encoding="utf-8")
    temporary.replace(path)
    return path


def _head(title: str, config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    plan = config.get("plan") or {}
    last: Mapping[str, Any] = next((line for line in reversed(metrics) if finite(line.get("tokens"))), {})
    seconds = max((line["seconds"] for line in metrics if finite(line.get("seconds"))), default=None)
    facts = []
    if finite(plan.get("parameters")):
        facts.append(f"{compact(plan['parameters'])} parameters")
    if last:
        facts += [f"{last['step']:,} step{'s' * (last['step'] != 1)}", f"{compact(last['tokens'])} tokens"]
    if seconds is not None:
        facts.append(duration(seconds))
    if plan.get("device"):
        facts.append(f"on {plan['device']}")
    under = _e(" · ".join(facts))
    return f'<p class="over">minillm training report</p>\n<h1>{_e(title)}</h1>\n<p class="under">{under}</p>'


def _verdict(said: Sequence[str], result: Scores) -> str:
    sentences = "".join(f"<p>{_e(sentence)}</p>" for sentence in said)
    if not result.validation:
        return f"<section><div>{sentences}</div></section>"
    best = min(value for _, value in result.validation)
    shown = (
        f'<div class="score"><b>{score(best)}</b><span>{result.unit}<br>of held-out text, best validation</span></div>'
    )
    return f'<section class="verdict">{shown}<div>{sentences}</div></section>{_rank(best, result)}'


def _rank(best: float, result: Scores) -> str:
    """The model among its baselines, shortest bar first."""
    if not result.baselines:
        return ""
    rows = sorted([*((value, name, "") for name, value in result.baselines.items()), (best, "this model", "own")])
    widest = max(value for value, _, _ in rows)
    cells = "".join(
        f'<span class="{style}">{_e(name)}</span><i class="{style}" style="width:{100 * value / widest:.1f}%"></i>'
        f'<span class="{style}">{score(value)}</span>'
        for value, name, style in rows
    )
    return f'<div class="rank">{cells}</div>'


def _range(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The loss against the rate, which rises exponentially; the axis is that of its logarithm."""
    points, found = [(math.log10(rate), loss) for rate, loss in lr_range.points(metrics)], lr_range.read(metrics)
    if found is None:
        return ""
    low, high = points[0][0], points[-1][0]
    decades = [(x, [lr_range.rate_text(10.0**x)]) for x in range(math.ceil(low + 0.1), math.ceil(high - 0.1))]
    ends = [(x, [f"rate {lr_range.rate_text(10**x)}"]) for x in (low, high)]
    turn = [(math.log10(found.turn[0]), found.turn[1])] if found.suggested is not None else []
    lines = [
        Line("a line of the log", points, "first"),
        Line("smoothed", [(math.log10(rate), loss) for rate, loss in found.curve], "second"),
        Line("turn", turn, "second", dots=True),
    ]
    ticks: list[tuple[float, list[str]]] = [ends[0], *decades, ends[1]]
    readout = [[x, f"rate {lr_range.rate_text(10**x)}"] for x, _ in points]
    figure = chart("Loss against the learning rate", lines, x_ticks=ticks, tall=True, readout=readout)
    return f"<h2>Where it fell, and where it turned</h2>{figure}"


def _curves(metrics: Sequence[Mapping[str, Any]], result: Scores) -> str:
    train = [line for line in metrics if line.get("split") == "train"]
    places = _places(metrics)
    if not places:
        return ""
    lines = [
        Line("training", _points(train, "bits_per_byte" if result.unit == "bits per byte" else "loss"), "first"),
        Line("validation", result.validation, "second", dots=True),
    ]
    levels = [Level(name, value) for name, value in result.baselines.items()]
    if result.validation:
        levels.append(Level("this model", result.validation[-1][1], "second", drawn=False))
    marks = _marks(places)
    readout = [[step, _words(step, tokens, seconds)] for step, tokens, seconds in places]
    title = "Bits per byte" if result.unit == "bits per byte" else "Loss in nats per target"
    main = chart(title, lines, x_ticks=marks, levels=levels, tall=True, readout=readout[:: len(readout) // 400 + 1])
    middle = [marks[len(marks) // 2]] if len(marks) > 2 else []
    ends = [(step, words[:1]) for step, words in (marks[0], *middle, marks[-1])]
    small = [
        chart("Learning rate", [Line("", _points(train, "lr"))], x_ticks=ends, from_zero=True),
        chart("Gradient norm, before clipping", [Line("", _points(train, "grad_norm"))], x_ticks=ends),
        chart("Tokens a second", [Line("", _points(train, "tokens_per_second"))], x_ticks=ends, from_zero=True),
    ]
    key = (
        '<p class="legend"><i class="key first"></i>training<i class="key second"></i>validation'
        + ('<i class="key level"></i>baselines on the same validation text' if result.baselines else "")
        + "</p>"
    )
    return f'<h2>How it learned</h2>{key}{main}<div class="small">{"".join(small)}</div>'


def _places(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, float]]:
    """(step, tokens, seconds) of every line that has them, each step once."""
    found = {
        line["step"]: (line["step"], line["tokens"], line["seconds"])
        for line in metrics
        if all(finite(line.get(name)) for name in ("step", "tokens", "seconds"))
    }
    return [found[step] for step in sorted(found)]


def _marks(places: Sequence[tuple[int, int, float]]) -> list[tuple[float, list[str]]]:
    """A handful of round steps, each with the tokens and the time until then; the first and last bound the axis."""
    first, last = places[0][0], places[-1][0]
    if last == first:
        return [(first, [f"step {first:,}"]), (first + 1, [])]
    apart = max(1, round(round_step((last - first) / 7)))
    round_steps = [step for step in range(0, last, apart) if step > first and last - step > 0.6 * apart]
    marks: list[tuple[float, list[str]]] = []
    for step in [first, *round_steps, last]:
        tokens, seconds = _passed(places, step)
        words = [f"step {step:,}" if step in (first, last) else f"{step:,}"]
        marks.append((step, words if step == 0 else [*words, compact(tokens), duration(seconds)]))
    return marks


def _passed(places: Sequence[tuple[int, int, float]], step: int) -> tuple[float, float]:
    """Tokens and seconds at a step, in proportion between the recorded ones around it."""
    before = max((place for place in places if place[0] <= step), key=lambda place: place[0])
    after = min((place for place in places if place[0] >= step), key=lambda place: place[0])
    share = (step - before[0]) / max(1, after[0] - before[0])
    return before[1] + share * (after[1] - before[1]), before[2] + share * (after[2] - before[2])


def _words(step: int, tokens: int, seconds: float) -> str:
    return f"step {step:,} · {compact(tokens)} tokens · {duration(seconds)}"


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float | None]]:
    return [(line["step"], line.get(key)) for line in lines]


def _samples(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The same prompts at the beginning, on the way and at the end, side by side; one row of columns a prompt."""
    samples = [line for line in metrics if line.get("event") == "sample"]
    if not samples:
        return ""
    prompts = list(dict.fromkeys(str(sample.get("prompt") or "") for sample in samples))
    rows = []
    for prompt in prompts:
        cells = []
        for sample in (sample for sample in samples if str(sample.get("prompt") or "") == prompt):
            text = str(sample.get("text") or "")
            rest = text.removeprefix(prompt)
            share = f"<span>{_e(_parsing(sample))}</span>" if finite(sample.get("parses")) else ""
            cells.append(
                f"<div><h3>{share}after {sample['step']:,} steps</h3><pre><em>{_e(prompt)}</em>{_e(rest)}</pre></div>"
            )
        rows.append(f'<div class="samples">{"".join(cells)}</div>')
    return f"<h2>What it wrote</h2>{''.join(rows)}"


def _parsing(sample: Mapping[str, Any]) -> str:
    tried = sample.get("tried")
    return f"{sample['parses']:.0%} of {tried} parse" if tried else f"{sample['parses']:.0%} parse"


def _what_ran(config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    corpus, plan, versions = (dict(config.get(part) or {}) for part in ("corpus", "plan", "versions"))
    text = {
        "source": corpus.pop("source", _setting(config, "source", None)),
        "documents": corpus.pop("documents", None),
        "bytes": corpus.pop("bytes", None),
        "training tokens": corpus.pop("train_tokens", None),
        "validation tokens": corpus.pop("val_tokens", None),
        "held out": corpus.pop("split", None),
        "bytes per token": corpus.pop("bytes_per_token", None),
    }
    epochs = [line["epoch"] for line in metrics if finite(line.get("epoch"))]
    if epochs:
        text["epochs read"] = round(epochs[-1], 2)
    lists = [_definitions("Text", {**text, **corpus}), _definitions("Plan", plan), _definitions("Versions", versions)]
    return f'<h2>What ran</h2><div class="pairs">{"".join(lists)}</div>'


def _definitions(title: str, values: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in _flat(values).items() if value is not None}
    if not shown:
        return ""
    rows = "".join(f"<dt>{_e(name.replace('_', ' '))}</dt><dd>{_e(_show(value))}</dd>" for name, value in shown.items())
    return f"<section><h3>{title}</h3><dl>{rows}</dl></section>"


def _settings(settings: Mapping[str, Any]) -> str:
    """What differs from the defaults first; the rest folded away."""
    defaults, chosen = _flat(to_dict(Settings())), _flat(settings)
    absent = object()
    changed = {name: value for name, value in chosen.items() if value != defaults.get(name, absent)}
    same = {name: value for name, value in chosen.items() if name not in changed}
    if not chosen:
        return ""
    rows = "".join(
        f"<tr><td>{_e(name)}<td>{_e(_show(value))}<td>{_e(_show(defaults.get(name)))}"
        for name, value in changed.items()
    )
    rest = "".join(f"<tr><td>{_e(name)}<td>{_e(_show(value))}" for name, value in same.items())
    table = f"<table><tr><th>setting<th>value<th>default{rows}</table>" if changed else "<p>All defaults.</p>"
    folded = f"<details><summary>{len(same)} settings at their defaults</summary><table>{rest}</table></details>"
    return f"<h2>Settings</h2>{table}{folded if same else ''}"


def _next(run: Path, config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    items = "".join(
        f"<li><code>{_e(command)}</code><span>{_e(reason)}</span></li>"
        for command, reason in next_commands(run, config, metrics)
    )
    return f'<h2>What to do next</h2><ul class="next">{items}</ul>'


def _setting(config: Mapping[str, Any], name: str, default: Any) -> Any:
    return (config.get("settings") or {}).get(name, default)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"layers": 6}} -> {"model.layers": 6}"""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _show(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return value[:12] + "…"  # a hash; config.json has the whole of it
    return number(value) if finite(value) else str(value)


def _e(text: object) -> str:
    return html.escape(str(text))

"""Tables of what is learnt: by a run of training, and by finetuning."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks import records
from benchmarks.learning import goals
from benchmarks.nanogpt import PEER
from benchmarks.records import Row
from benchmarks.tables.markdown import deviation, markdown, missing, versions


def learning(results: Path) -> str:
    """The goals, met or not, beside the peer's figures of the same run."""
    rows = [row for row in records.load(results / "learning.json") if not row["quick"]]
    lines = goals(rows)
    if not lines:
        return missing("python -m benchmarks learning --text FILE --nanogpt PATH")
    body = [[line["goal"], line["ours"], "met" if line["met"] else "**not met**"] for line in lines]
    peer = next((row for row in rows if row["kernel"] == PEER), None)
    peers = f"nanoGPT: {peer['loss']:.4f} nats in {peer['wall']:.1f} s. " if peer else ""
    clocked = [row for row in rows if row["kernel"] in (PEER, "goal")]
    load = max(row["load"] for row in clocked)
    plain = next((row for row in clocked if row["shape"].get("goal") == "plain"), None)
    if plain is not None:
        peers += f"The five-minute run without n-gram dropout: {plain['loss']:.4f} nats. "
    note = f"{peers}Wall time of whole processes. {clocked[-1]['device']}, load up to {load}. {versions(clocked)}"
    return markdown(["goal", "ours", ""], body, note)


def ladder(results: Path) -> str:
    """A line for each lever, added to those above: bits per byte on each corpus, and what it gained.

    Beside it what the whole recipe loses where that lever alone is left out, with seed 1 as both were measured. Below
    them the levers that were deleted, as the ladder of their time found them (rows that no run of today can write).
    """
    measured = [row for row in records.load(results / "learning.json") if not row["quick"]]
    rows = [row for row in measured if row["kernel"] == "ladder"]
    if not rows:
        return missing("python -m benchmarks learning --part ladder --text FILE")
    corpora = list(dict.fromkeys(row["shape"]["corpus"] for row in rows))
    body, before = [], dict.fromkeys(corpora, float("nan"))
    last = max((row["shape"]["rung"] for row in rows), default=0)
    for rung in sorted({row["shape"]["rung"] for row in rows}):
        found = [row for row in rows if row["shape"]["rung"] == rung]
        line = [("+ " if rung else "") + found[0]["name"]]
        for corpus in corpora:
            values = [row["bits_per_byte"] for row in found if row["shape"]["corpus"] == corpus]
            mean = statistics.mean(values) if values else float("nan")
            line += [deviation(values) if values else "–", f"{mean - before[corpus]:+.3f}" if rung else ""]
            line += [_left_out(measured, corpus, rung, last)]
            before[corpus] = mean
        body.append(line)
    deleted = [row for row in measured if row["kernel"] == "deleted lever"]
    for lever in dict.fromkeys(row["shape"]["lever"] for row in deleted):
        line = [f"*{lever}: deleted*"]
        for row in (row for row in deleted if row["shape"]["lever"] == lever):
            change = statistics.mean(row["with"]) - statistics.mean(row["added_to"])
            left_out = "" if row["left_out"] is None else f"{row['left_out'] - row['whole']:+.3f}"
            line += [deviation(row["with"]), f"{change:+.3f}", left_out]
        body.append(line)
    header = ["lever", *(cell for corpus in corpora for cell in (f"{corpus}, bits per byte", "change", "left out"))]
    note = f"{rows[0]['tokens']:,} tokens a run; ± is the standard deviation over seeds, the others are one run each. "
    note += f"Left out: the whole recipe without that lever alone. {rows[-1]['device']}. {versions(rows)}"
    return markdown(header, body, note)


def _left_out(rows: list[Row], corpus: str, rung: int, last: int) -> str:
    """The whole recipe without the lever of a rung, less the whole; "" where either is not measured."""
    wanted = ("without", {"corpus": corpus, "rung": rung}), ("ladder", {"corpus": corpus, "rung": last, "seed": 1})
    found = [[row["bits_per_byte"] for row in rows if (row["kernel"], row["shape"]) == case] for case in wanted]
    return f"{found[0][0] - found[1][0]:+.3f}" if all(found) else ""


def width(results: Path) -> str:
    """A line for each width: bits per byte at each learning rate, the best in bold, by both rules."""
    rows = [row for row in records.load(results / "learning.json") if row["kernel"] == "width" and not row["quick"]]
    if not rows:
        return missing("python -m benchmarks learning --part width --text FILE")
    rates = sorted({row["shape"]["lr"] for row in rows})
    body = []
    for transfer, dim in sorted({(row["shape"]["transfer"], row["shape"]["dim"]) for row in rows}):
        found = {
            row["shape"]["lr"]: row["bits_per_byte"]
            for row in rows
            if (row["shape"]["transfer"], row["shape"]["dim"]) == (transfer, dim)
        }
        best = min(found.values())
        cells = [f"**{found[lr]:.3f}**" if found[lr] == best else f"{found[lr]:.3f}" for lr in rates]
        body.append(["rates by width" if transfer else "one rate", f"{dim}", *cells])
    note = (
        f"Bits per byte after {rows[0]['tokens']:,} tokens of tiny Shakespeare, AdamW for all weights, one run each. "
    )
    return markdown(["", "width", *(f"{lr:g}" for lr in rates)], body, f"{note}{rows[-1]['device']}. {versions(rows)}")


def finetuning(results: Path) -> str:
    """A line for each method: scores on the test sentences, what moved, what it took."""
    rows = records.shown(results / "finetuning.json")
    methods: dict[str, list[Row]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    if not rows:
        return missing("python -m benchmarks finetuning --data DIR")
    body = []
    for method in sorted(methods, key=lambda name: name != "majority"):
        found, first = methods[method], methods[method][0]
        scores = [deviation([row["test"][name] for row in found]) for name in ("macro_f1", "accuracy")]
        line = [method.replace("-", " "), *scores]
        if "parameters" not in first:
            body.append([*line, "–", "–", "–", "–"])
            continue
        share = first["trained_parameters"] / first["parameters"]
        taken = [row["cpu_seconds"] for row in found if row["cpu_seconds"] is not None]
        seconds = f"{statistics.mean(taken):,.0f}" if taken else "–"
        peak = max(row["peak_bytes"] for row in found) / 2**20
        moved = f"{first['trained_parameters']:,} ({share:.1%})"
        body.append([*line, moved, f"{first['adapter_bytes'] / 2**10:,.0f} KiB", f"{peak:,.0f} MiB", seconds])
    header = ["method", "macro F1", "accuracy", "trained parameters", "file", "peak memory", "CPU seconds"]
    seeds = {len(found) for found in methods.values()} - {1}
    note = f"{rows[0]['examples']:,} test sentences; ± is the standard deviation over {max(seeds, default=1)} seeds, "
    note += f"the others are one run each. {rows[-1]['device']}, one thread. {versions(rows)}"
    return markdown(header, body, note)


METRICS = {"macro_f1": "macro F1", "entity_f1": "entity F1", "f1": "F1", "rmse": "RMSE", "rouge_l": "ROUGE-L"}
"""As people write them."""


def tasks(results: Path) -> str:
    """A line for each task: its default run beside the trivial answer."""
    rows = records.shown(results / "tasks.json")
    if not rows:
        return missing("python -m benchmarks tasks")
    body = []
    for row in rows:
        measure = f"{METRICS.get(row['metric'], row['metric'])} {row['value']:.3f}"
        trivial = f"{row['trivial']:.3f} ({row['what']})"
        time = f"{row['seconds'] / 60:.1f} min"
        body.append([row["task"], f"`{row['base']}`", f"{row['examples']:,}", time, measure, trivial])
    header = ["task", "base", "examples", "time", "it reaches", "the trivial answer"]
    threads = max(row["threads"] for row in rows)
    note = f"{rows[-1]['device']}, {threads} threads, load up to {max(row['load'] for row in rows)}. {versions(rows)}"
    return markdown(header, body, note)


def unbalanced(results: Path) -> str:
    """A line for each way to train and to decide: the rare class over all folds."""
    rows = records.shown(results / "unbalanced.json")
    if not rows:
        return missing("python -m benchmarks unbalanced")
    ways = {"alike": "every example alike", "weighted": "class weights", "balanced": "balanced batches"}
    body = []
    for way, title in ways.items():
        found = [row for row in rows if row["way"] == way]
        for decides, which in (("likelier", "the likelier class"), ("threshold", "the tuned threshold")):
            names = ("f1", "precision", "recall", "macro_f1")
            if found:
                body.append([title, which, *(deviation([row[decides][name] for row in found]) for name in names)])
    header = ["training", "decided by", "F1 of the rare class", "its precision", "its recall", "macro F1"]
    runs, rare = len({(row["seed"], row["fold"]) for row in rows}), rows[0]["rare"]
    note = f"Mean ± standard deviation over {runs} folds of {rows[0]['examples']} held-out examples, {rare} rare ones. "
    return markdown(header, body, f"{note}{rows[-1]['device']}, one thread. {versions(rows)}")


def forgetting(results: Path) -> str:
    """A line for each thing that is done against it: losses on both tasks, before and after."""
    rows = records.shown(results / "forgetting.json")
    if not rows:
        return missing("python -m benchmarks forgetting")
    names = ("new_before", "new_after", "old_before", "old_after")
    body = [
        [row["way"], *(f"{row[name]:.3f}" for name in names), f"{row['old_after'] - row['old_before']:+.3f}"]
        for row in rows
    ]
    header = ["against forgetting", "replies before", "after", "source before", "after", "forgotten"]
    note = f"Nats per token on held-out text, one run each. {rows[-1]['device']}, one thread. {versions(rows)}"
    return markdown(header, body, note)

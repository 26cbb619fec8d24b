"""`python -m benchmarks tables`: the README's tables, made from the result files and from nothing else.

In the README a table stands between two markers, each on a line of its own; what lies between them is replaced:

    <!-- table:NAME -->
    <!-- /table -->

NAME is one of TABLES. A table whose results do not exist says which command makes them.
"""

from __future__ import annotations

import difflib
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.learning import goals
from benchmarks.nanogpt import PEER
from benchmarks.records import Row

BLOCK = re.compile(
    r"^(?P<open>[ \t]*<!-- table:(?P<name>[^\n]*?) -->[ \t]*\n)(?P<body>.*?)(?P<close>^[ \t]*<!-- /table -->)",
    re.M | re.S,
)
MARKER = re.compile(r"^[ \t]*<!-- (?:table:.*|/table) -->", re.M)


def run(readme: Path, results: Path, *, check: bool = False) -> int:
    """Rewrites the tables in `readme`; with `check` changes nothing and returns 1 where one is out of date.

    Raises ValueError for a file that cannot be read, an unknown table, and a marker without its partner.
    """
    try:
        before = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{readme} cannot be read ({error}): give the file with --readme") from error
    after = rewritten(before, results, str(readme))
    if check:
        print(f"{readme}: {'up to date' if before == after else 'out of date, run `python -m benchmarks tables`'}")
        return int(before != after)
    if before != after:
        readme.write_text(after, encoding="utf-8")
    print(f"{readme}: {'nothing changed' if before == after else 'written'}", file=sys.stderr)
    return 0


def rewritten(text: str, results: Path, where: str = "the text") -> str:
    """`text` with the table of every pair of markers made anew from the files under `results`."""
    if 2 * len(BLOCK.findall(text)) != len(MARKER.findall(text)):
        raise ValueError(f"{where}: each <!-- table:NAME --> needs a <!-- /table --> on a line of its own after it")

    def table(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in TABLES:
            near = difflib.get_close_matches(name, TABLES, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TABLES)}"
            raise ValueError(f"{where}: there is no table {name!r}: {hint}")
        return f"{found['open']}\n{TABLES[name](results)}\n\n{found['close']}"

    return BLOCK.sub(table, text)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def codegen(results: Path) -> str:
    """Kernel × architecture: the most registers, spills (bytes a thread) and shared memory among its configurations."""
    rows = records.load(results / "codegen.json")
    if not rows:
        return _missing("python -m benchmarks kernels --codegen")
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    cells: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        cells.setdefault(row["kernel"], {}).setdefault(row["arch"], []).append(row)

    def cell(found: list[Row]) -> str:
        registers, spills, shared = (max(row[name] for row in found) for name in ("registers", "spills", "shared"))
        return f"{registers} / {spills} / {shared / 1024:.0f}" if found else "–"

    body = [[f"`{kernel}`"] + [cell(of[arch]) if arch in of else "–" for arch in archs] for kernel, of in cells.items()]
    count = f"{len(rows)} configurations, {sum(row['fault'] is not None for row in rows)} with a fault"
    note = f"Registers a thread / bytes spilled a thread / KiB of shared memory a program, the most of each; {count}."
    return markdown(["kernel", *archs], body) + f"\n\n{note}"


def kernels(results: Path) -> str:
    """For each device: a line for each case, ours beside the best peer, times of the GPU alone."""
    parts = []
    for device, rows in _by_device(results, "kernels.json"):
        cases: dict[str, list[Row]] = {}
        for row in rows:
            if row["mode"] == "gpu time":
                cases.setdefault(records.case_key(row), []).append(row)
        body = [line for found in cases.values() if (line := _kernel_line(found))]
        header = ["kernel", "shape", "ms (p20 to p80)", "of the roof", "best peer", "its ms (p20 to p80)", "ratio"]
        parts.append(markdown(header, body) + f"\n\n{device}, GPU time. {_versions(rows)}")
    return "\n\n".join(parts) or _missing("python -m benchmarks kernels", "on a GPU")


def _kernel_line(rows: Sequence[Row]) -> list[str] | None:
    timed = [row for row in rows if "ms_p50" in row]
    ours = next((row for row in timed if row["provider"] == "minillm"), None)
    if ours is None:
        return None
    shape = " ".join(f"{name}={value}" for name, value in ours["shape"].items() if name != "documents")
    shape += " packed" if "documents" in ours["shape"] else ""
    line = [f"{ours['kernel']} {ours['dir']}", shape, _spread(ours, "ms", 3), f"{100 * ours['frac_roof']:.0f} %"]
    peers = [row for row in timed if row is not ours]
    if not peers:
        return [*line, "–", "–", "–"]
    best = min(peers, key=lambda row: row["ms_p50"])
    return [*line, best["provider"], _spread(best, "ms", 3), f"{best['ms_p50'] / ours['ms_p50']:.2f}×"]


def generation(results: Path) -> str:
    """For each device: tokens a second by batch, with and without cache, ours and the peer's."""
    parts = []
    for device, rows in _by_device(results, "generation.json"):
        names = list(dict.fromkeys(row["provider"] for row in rows))
        cases: dict[str, dict[str, Row]] = {}
        for row in rows:
            cases.setdefault(records.case_key(row), {})[row["provider"]] = row
        body = []
        for found in cases.values():
            first = next(iter(found.values()))
            shape, model = first["shape"], first["kernel"].removeprefix("generate ")
            title = f"{model}, batch {shape['B']}, {'cache' if shape['cache'] else 'no cache'}"
            body.append(
                [title, str(shape["new_tokens"])]
                + [_spread(found[name], "tokens", 0) if "tokens_p50" in found.get(name, {}) else "–" for name in names]
            )
        load = max(row["load"] for row in rows)
        note = f"{device}; tokens a second, median (p20 to p80), fp32, greedy. Load of the machine up to {load}."
        parts.append(markdown(["", "new tokens", *names], body) + f"\n\n{note} {_versions(rows)}")
    return "\n\n".join(parts) or _missing("python -m benchmarks generation")


def tokenizer(results: Path) -> str:
    """For each device: bytes per token by kind of text beside GPT-2's, and speed."""
    parts = []
    for device, rows in _by_device(results, "tokenizer.json"):
        kinds = [row for row in rows if "bytes_per_token" in row]
        body = [
            [row["kind"], _figure(row["bytes_per_token"]), _figure(row.get("gpt2_bytes_per_token"))] for row in kinds
        ]
        speeds = [row for row in rows if "mb_p50" in row]
        speed = ", ".join(f"{row['kernel'].removeprefix('speed of ')} {_spread(row, 'mb', 1)}" for row in speeds)
        size = rows[0]["shape"]["vocab_size"]
        note = f"Speed in MB a second: {speed}. {device}. {_versions(rows)}"
        header = ["bytes per token", f"ours, {size:,} pieces of Python", "GPT-2, 50,257 of the web"]
        parts.append(markdown(header, body) + f"\n\n{note}")
    return "\n\n".join(parts) or _missing("python -m benchmarks tokenizer")


def finetuning(results: Path) -> str:
    """A line for each method: scores on the test sentences, what moved, what it took."""
    rows = _measured(records.load(results / "finetuning.json"))
    methods: dict[str, list[Row]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    if not rows:
        return _missing("python -m benchmarks finetuning --data DIR")
    body = []
    for method in sorted(methods, key=lambda name: name != "majority"):
        found, first = methods[method], methods[method][0]
        scores = [_deviation([row["test"][name] for row in found]) for name in ("macro_f1", "accuracy")]
        line = [method.replace("-", " "), *scores]
        if "parameters" not in first:
            body.append([*line, "–", "–", "–", "–"])
            continue
        share = first["trained_parameters"] / first["parameters"]
        taken = [row["cpu_seconds"] for row in found if row["cpu_seconds"] is not None]
        peak = max(row["peak_bytes"] for row in found) / 2**20
        moved = f"{first['trained_parameters']:,} ({share:.1%})"
        body.append([*line, moved, f"{first['adapter_bytes'] / 2**10:,.0f} KiB", f"{peak:,.0f} MiB", _mean(taken)])
    header = ["method", "macro F1", "accuracy", "trained parameters", "file", "peak memory", "CPU seconds"]
    seeds = {len(found) for found in methods.values()} - {1}
    note = f"{rows[0]['examples']:,} test sentences; ± is the standard deviation over {max(seeds, default=1)} seeds, "
    note += f"the others are one run each. {rows[-1]['device']}, one thread. {_versions(rows)}"
    return markdown(header, body) + f"\n\n{note}"


def tasks(results: Path) -> str:
    """A line for each task: its default run beside the trivial answer."""
    rows = _measured(records.load(results / "tasks.json"))
    if not rows:
        return _missing("python -m benchmarks tasks")
    body = []
    for row in rows:
        measure = f"{row['metric'].replace('_', ' ')} {row['value']:.3f}"
        trivial = f"{row['trivial']:.3f} ({row['what']})"
        time = f"{row['seconds'] / 60:.1f} min"
        body.append([row["task"], f"`{row['base']}`", f"{row['examples']:,}", time, measure, trivial])
    header = ["task", "base", "examples", "time", "it reaches", "the trivial answer"]
    threads = max(row["threads"] for row in rows)
    note = f"{rows[-1]['device']}, {threads} threads, load up to {max(row['load'] for row in rows)}. {_versions(rows)}"
    return markdown(header, body) + f"\n\n{note}"


def unbalanced(results: Path) -> str:
    """A line for each way to train and to decide: the rare class over all folds."""
    rows = _measured(records.load(results / "unbalanced.json"))
    if not rows:
        return _missing("python -m benchmarks unbalanced")
    ways = {"alike": "every example alike", "weighted": "class weights", "balanced": "balanced batches"}
    body = []
    for way, title in ways.items():
        found = [row for row in rows if row["way"] == way]
        for decides, which in (("likelier", "the likelier class"), ("threshold", "the tuned threshold")):
            names = ("f1", "precision", "recall", "macro_f1")
            if found:
                body.append([title, which, *(_deviation([row[decides][name] for row in found]) for name in names)])
    header = ["training", "decided by", "F1 of the rare class", "its precision", "its recall", "macro F1"]
    runs, rare = len({(row["seed"], row["fold"]) for row in rows}), rows[0]["rare"]
    note = f"Mean ± standard deviation over {runs} folds of {rows[0]['examples']} held-out examples, {rare} rare ones. "
    return markdown(header, body) + f"\n\n{note}{rows[-1]['device']}, one thread. {_versions(rows)}"


def forgetting(results: Path) -> str:
    """A line for each thing that is done against it: losses on both tasks, before and after."""
    rows = _measured(records.load(results / "forgetting.json"))
    if not rows:
        return _missing("python -m benchmarks forgetting")
    names = ("new_before", "new_after", "old_before", "old_after")
    body = [
        [row["way"], *(f"{row[name]:.3f}" for name in names), f"{row['old_after'] - row['old_before']:+.3f}"]
        for row in rows
    ]
    header = ["against forgetting", "replies before", "after", "source before", "after", "forgotten"]
    note = f"Nats per token on held-out text, one run each. {rows[-1]['device']}, one thread. {_versions(rows)}"
    return markdown(header, body) + f"\n\n{note}"


def _deviation(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):,.0f}" if values else "–"


def training(results: Path) -> str:
    """For each device: a line for each case and provider, with ours first."""
    parts = []
    for device, rows in _by_device(results, "training.json"):
        body = []
        for row in rows:
            ours = next(r for r in rows if r["kernel"] == row["kernel"] and r["provider"] == "minillm")
            shape, case = row["shape"], row["kernel"].removeprefix("training ")
            body.append(
                [
                    f"{case}, {shape['batch']} × {shape['context']}, {row['dtype']}" if row is ours else "",
                    row["provider"],
                    _spread(row, "tokens", 0),
                    f"{ours['ms_p50'] / row['ms_p50']:.2f}×",
                    f"{100 * row['mfu']:.0f} %",
                    f"{row['peak_bytes'] / 2**20:,.0f} MiB",
                    "–" if row is ours else f"{row['gap']:.0e}",
                ]
            )
        header = ["", "", "tokens a second (p20 to p80)", "of ours", "MFU", "peak memory", "largest gap of losses"]
        load, rate = max(row["load"] for row in rows), [row["matrix_rate"] / 1e9 for row in rows]
        note = f"{device}, {rows[0]['threads']} threads. MFU is 6N + 12·A·w·S FLOP a token over the rate of a large "
        note += f"product measured in the same run ({min(rate):,.0f} to {max(rate):,.0f} GFLOP/s). Same first weights, "
        note += f"batches, AdamW; {len(rows[0]['losses'])} steps. Load of the machine up to {load}. {_versions(rows)}"
        parts.append(f"{markdown(header, body)}\n\n{note}")
    return "\n\n".join(parts) or _missing("python -m benchmarks training")


def learning(results: Path) -> str:
    """The goals, met or not, beside the peer's figures of the same run."""
    rows = [row for row in records.load(results / "learning.json") if not row["quick"]]
    lines = goals(rows)
    if not lines:
        return _missing("python -m benchmarks learning --text FILE --nanogpt PATH")
    body = [[line["goal"], line["ours"], "met" if line["met"] else "**not met**"] for line in lines]
    peer = next((row for row in rows if row["kernel"] == PEER), None)
    peers = f"nanoGPT: {peer['loss']:.4f} nats in {peer['wall']:.1f} s. " if peer else ""
    load = max(row["load"] for row in rows if row["kernel"] != "ladder")
    note = f"{peers}Wall time of whole processes. {rows[-1]['device']}, load up to {load}. {_versions(rows)}"
    return markdown(["goal", "ours", ""], body) + f"\n\n{note}"


def ladder(results: Path) -> str:
    """A line for each lever, added to those above: bits per byte on each corpus, and what it gained."""
    rows = [row for row in records.load(results / "learning.json") if row["kernel"] == "ladder" and not row["quick"]]
    if not rows:
        return _missing("python -m benchmarks learning --part ladder --text FILE")
    corpora = list(dict.fromkeys(row["shape"]["corpus"] for row in rows))
    body, before = [], dict.fromkeys(corpora, float("nan"))
    for rung in sorted({row["shape"]["rung"] for row in rows}):
        found = [row for row in rows if row["shape"]["rung"] == rung]
        line = [("+ " if rung else "") + found[0]["name"]]
        for corpus in corpora:
            values = [row["bits_per_byte"] for row in found if row["shape"]["corpus"] == corpus]
            mean = statistics.mean(values) if values else float("nan")
            line += [_deviation(values) if values else "–", f"{mean - before[corpus]:+.3f}" if rung else ""]
            before[corpus] = mean
        body.append(line)
    header = ["lever", *(cell for corpus in corpora for cell in (f"{corpus}, bits per byte", "change"))]
    seeds, tokens = len({row["shape"]["seed"] for row in rows}), rows[0]["tokens"]
    note = f"{tokens:,} tokens, {seeds} run{'s' if seeds > 1 else ''} of each. {rows[-1]['device']}. {_versions(rows)}"
    return markdown(header, body) + f"\n\n{note}"


TABLES: dict[str, Callable[[Path], str]] = {
    "learning": learning,
    "ladder": ladder,
    "codegen": codegen,
    "kernels": kernels,
    "generation": generation,
    "tokenizer": tokenizer,
    "training": training,
    "finetuning": finetuning,
    "tasks": tasks,
    "unbalanced": unbalanced,
    "forgetting": forgetting,
}


def _by_device(results: Path, name: str) -> Iterable[tuple[str, list[Row]]]:
    """(device, rows) of each result folder that has the file; rows of --quick runs only where there are no others."""
    for path in sorted(results.glob(f"*/{name}")):
        if rows := _measured(records.load(path)):
            yield rows[0]["device"], rows


def _measured(rows: list[Row]) -> list[Row]:
    return [row for row in rows if not row.get("quick")] or rows


def _versions(rows: Sequence[Row]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in rows[-1]["versions"].items())
    return f"{versions}; {rows[-1]['date'][:10]}{', --quick' if rows[-1].get('quick') else ''}."


def _spread(row: Row, unit: str, digits: int) -> str:
    middle, low, high = (f"{row[f'{unit}_{name}']:,.{digits}f}" for name in ("p50", "p20", "p80"))
    return f"{middle} ({low} to {high})"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _missing(command: str, where: str = "") -> str:
    return f"*Not measured yet: `{command}`{' ' + where if where else ''}.*"

"""Tables of how fast parts are: kernels and what the compiler made of them, generation, the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.records import Row
from benchmarks.tables.markdown import markdown, missing, spread, versions


def kernels(results: Path) -> str:
    """For each device: a line for each case, ours beside the best peer, times of the GPU alone."""
    parts = []
    for device, rows in records.by_device(results, "kernels.json"):
        cases: dict[str, list[Row]] = {}
        for row in rows:
            if row["mode"] == "gpu time":
                cases.setdefault(records.case_key(row), []).append(row)
        body = [line for found in cases.values() if (line := _kernel_line(found))]
        header = ["kernel", "shape", "ms (p20 to p80)", "of the roof", "best peer", "its ms (p20 to p80)", "ratio"]
        parts.append(markdown(header, body, f"{device}, GPU time. {versions(rows)}"))
    return "\n\n".join(parts) or missing("python -m benchmarks kernels", "on a GPU")


def _kernel_line(rows: Sequence[Row]) -> list[str] | None:
    timed = [row for row in rows if "ms_p50" in row]
    ours = next((row for row in timed if row["provider"] == "minillm"), None)
    if ours is None:
        return None
    shape = " ".join(f"{name}={value}" for name, value in ours["shape"].items() if name != "documents")
    shape += " packed" if "documents" in ours["shape"] else ""
    line = [f"{ours['kernel']} {ours['dir']}", shape, spread(ours, "ms", 3), f"{100 * ours['frac_roof']:.0f} %"]
    peers = [row for row in timed if row is not ours]
    if not peers:
        return [*line, "–", "–", "–"]
    best = min(peers, key=lambda row: row["ms_p50"])
    return [*line, best["provider"], spread(best, "ms", 3), f"{best['ms_p50'] / ours['ms_p50']:.2f}×"]


def codegen(results: Path) -> str:
    """Kernel × architecture: the most registers, spills (bytes a thread) and shared memory among its configurations."""
    rows = records.load(results / "codegen.json")
    if not rows:
        return missing("python -m benchmarks kernels --codegen")
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
    return markdown(["kernel", *archs], body, note)


def generation(results: Path) -> str:
    """For each device: tokens a second by batch, with and without cache, ours and the peer's."""
    parts = []
    for device, rows in records.by_device(results, "generation.json"):
        names = list(dict.fromkeys(row["provider"] for row in rows))
        cases: dict[str, dict[str, Row]] = {}
        for row in rows:
            cases.setdefault(records.case_key(row), {})[row["provider"]] = row
        body = []
        for found in cases.values():
            first = next(iter(found.values()))
            shape, model = first["shape"], first["kernel"].removeprefix("generate ")
            title = f"{model}, {first['dtype']}, batch {shape['B']}, {'cache' if shape['cache'] else 'no cache'}"
            share = found["minillm"].get("frac_roof")
            body.append(
                [title, str(shape["new_tokens"])]
                + [spread(found[name], "tokens", 0) if "tokens_p50" in found.get(name, {}) else "–" for name in names]
                + ["–" if share is None else f"{100 * share:.0f} %"]
            )
        load = max(row["load"] for row in rows)
        note = f"{device}, {rows[0]['threads']} threads; new tokens a second, all rows together, greedy; "
        note += "median (p20 to p80). The last column: how fast ours reads its weights, as a share of a copy's rate "
        note += f"({rows[0]['roof'] / 1e9:,.0f} GB a second). Load of the machine up to {load}."
        parts.append(markdown(["", "new tokens", *names, "of the memory's rate"], body, f"{note} {versions(rows)}"))
    return "\n\n".join(parts) or missing("python -m benchmarks generation")


def tokenizer(results: Path) -> str:
    """For each device: bytes per token by kind of text beside GPT-2's, and speed."""
    parts = []
    for device, rows in records.by_device(results, "tokenizer.json"):
        kinds = [row for row in rows if "bytes_per_token" in row]
        body = [
            [row["kind"], _figure(row["bytes_per_token"]), _figure(row.get("gpt2_bytes_per_token"))] for row in kinds
        ]
        speeds = [row for row in rows if "mb_p50" in row]
        speed = ", ".join(f"{row['kernel'].removeprefix('speed of ')} {spread(row, 'mb', 1)}" for row in speeds)
        size = rows[0]["shape"]["vocab_size"]
        note = f"Speed in MB a second: {speed}. {device}. {versions(rows)}"
        header = ["bytes per token", f"ours, {size:,} pieces of Python", "GPT-2, 50,257 of the web"]
        parts.append(markdown(header, body, note))
    return "\n\n".join(parts) or missing("python -m benchmarks tokenizer")


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def training(results: Path) -> str:
    """For each device: a line for each case and provider, with ours first."""
    parts = []
    for device, rows in records.by_device(results, "training.json"):
        body = []
        for row in rows:
            ours = next(r for r in rows if r["kernel"] == row["kernel"] and r["provider"] == "minillm")
            shape, case = row["shape"], row["kernel"].removeprefix("training ")
            body.append(
                [
                    f"{case}, {shape['batch']} × {shape['context']}, {row['dtype']}" if row is ours else "",
                    row["provider"],
                    spread(row, "tokens", 0),
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
        note += f"batches, AdamW; {len(rows[0]['losses'])} steps. Load of the machine up to {load}. {versions(rows)}"
        parts.append(markdown(header, body, note))
    return "\n\n".join(parts) or missing("python -m benchmarks training")

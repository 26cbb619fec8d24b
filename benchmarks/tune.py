"""`python -m benchmarks tune`: finds the launch choices of this GPU and rewrites kernels/tuned/*.json with them.

For each tuned table, shape class and dtype: candidates around the shipped choice (`candidates`); those that do not
compile, spill, or do not fit the chip's shared memory are out before anything runs (`codegen`'s own rule); the rest
are timed on the GPU, taking turns (`timing.interleaved`). A candidate replaces the shipped choice only where its
median is below the shipped one's 20 % quantile: what lies within the spread is no gain. The rows written belong to
this architecture alone, and the evidence, every candidate with its figures, goes to results/<device>/tuned.json.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import codegen, errors, kernels, records, timing
from benchmarks.families import OURS, Case, attention, losses, rows
from benchmarks.records import Row
from kernels import _launch

Choice = dict[str, int]
Cases = Callable[
    [bool], Iterator[tuple[str, Case]]
]  # whether quick -> (row of the table, the case that it is timed on)

VALUES: dict[str, tuple[int, ...]] = {  # what a choice may be made of, by its name in the tables
    "BLOCK_M": (16, 32, 64, 128),
    "BLOCK_N": (16, 32, 64, 128),
    "BLOCK": (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    "ROWS": (1, 2, 4, 8, 16, 32),
    "BLOCK_T": (4, 8, 16, 32, 64, 128),
    "HEADS": (1, 2, 4, 8),
    "GROUP": (8, 16, 32, 64),
    "STAGES": (1, 2, 3),
    "PER_MULTIPROCESSOR": (1, 2, 4),
    "num_warps": (1, 2, 4, 8, 16, 32),
    "num_stages": (1, 2, 3, 4),
}
STEPS = 2  # names that a candidate changes at most
QUICK_STEPS = 1


def run(names: Sequence[str], out: Path, *, quick: bool) -> int:
    """Tune the named tables (all where none is named). Returns 0.

    Raises ValueError without a GPU, and for a table that does not exist.
    """
    if not torch.cuda.is_available():
        raise ValueError("tuning needs the GPU that it tunes for, and there is none here: run it on that machine")
    if _launch.INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set, so kernels would be interpreted: unset it to tune")
    workloads = tuned_cases()
    for name in names:
        if name not in workloads:
            raise ValueError(f"there is no tuned table {name!r}: choose from {', '.join(workloads)}")
    arch = _launch.architecture(torch.device("cuda"))
    path = out / records.slug(records.device_name()) / "tuned.json"
    for table in names or workloads:
        winners = {}
        for key, case in workloads[table](quick):
            shipped = _launch.shipped(table, arch)[key]
            tried = list(_tried(table, key, shipped, case, arch, quick=quick))
            winners[key] = winner(shipped, tried)
            about = records.provenance() | {"kernel": f"tune {table}", "dtype": key.split("/")[1], "quick": quick}
            shape = {"key": key, **case.shape}
            new = [about | {"shape": shape, "chosen": row["choice"] == winners[key]} | row for row in tried]
            records.save(path, records.merge(records.load(path), new))
            print(f"{table} {key}: {shipped} -> {winners[key]}, {len(tried)} tried", flush=True)
        rewrite(_launch.TABLES / f"{table}.json", arch, winners)
    print(f"evidence in {path}; now run `pytest -m gpu` and `python -m benchmarks kernels --codegen`", file=sys.stderr)
    return 0


def candidates(shipped: Mapping[str, int], *, steps: int = STEPS) -> list[Choice]:
    """The shipped choice first, then all that differ from it in at most `steps` names, each by one place in VALUES."""
    found = [dict(shipped)]
    for count in range(1, steps + 1):
        for names in itertools.combinations(shipped, count):
            for values in itertools.product(*(_neighbours(name, shipped[name]) for name in names)):
                found.append(dict(shipped) | dict(zip(names, values, strict=True)))
    return found


def _neighbours(name: str, value: int) -> list[int]:
    values = VALUES[name]
    if value not in values:  # a choice made by hand: the nearest on either side
        below, above = [x for x in values if x < value], [x for x in values if x > value]
        return below[-1:] + above[:1]
    place = values.index(value)
    return [values[i] for i in (place - 1, place + 1) if 0 <= i < len(values)]


def winner(shipped: Mapping[str, int], tried: Sequence[Row]) -> Choice:
    """The fastest by median, if that is below the 20 % quantile of the shipped choice; else the shipped one."""
    timed = [row for row in tried if "ms_p50" in row]
    own = next((row for row in timed if row["choice"] == shipped), None)
    best = min(timed, key=lambda row: row["ms_p50"], default=None)
    if best is None or (own is not None and best["ms_p50"] >= own["ms_p20"]):
        return dict(shipped)
    return dict(best["choice"])


def fits(case: Any, choice: Mapping[str, int], arch: str) -> Row:
    """What compiling a shipped case with another choice gives: registers, spills, shared, fault (codegen.fault)."""
    constexprs = {name: choice.get(name, value) for name, value in case.constexprs.items()}
    if "CHUNKS" in constexprs:  # of a norm's row: what BLOCK leaves over
        constexprs["CHUNKS"] = -(-int(case.name.split("/")[1][1:]) // choice["BLOCK"])
    options = {name: choice.get(name, value) for name, value in case.options.items()}
    return codegen._compiled(case._replace(constexprs=constexprs, options=options), arch)


def rewrite(path: Path, arch: str, winners: Mapping[str, Mapping[str, int]]) -> None:
    """Sets the rows of one architecture in a tuned table; all else stays, a line for each row."""
    table = json.loads(path.read_text(encoding="utf-8"))
    own = table.setdefault(arch, {})
    default = table["default"]
    for key, choice in winners.items():
        if key in own or default.get(key) != choice:  # what equals the default needs no row
            own[key] = dict(choice)
    blocks = [
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"    {json.dumps(key)}: {json.dumps(choice)}" for key, choice in rows.items())
        + "\n  }"
        for name, rows in table.items()
        if rows
    ]
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


def tuned_cases() -> dict[str, Cases]:
    """By table, a usual size in each shape class.

    What no case reaches keeps its choices: rope_norm_backward, scale_rows, and the gelu rows of the gated ones.
    """
    flash = {
        "flash_attention_forward": "forward",
        "flash_attention_backward": "backward",
    }
    tables = {name: _flash_cases(direction) for name, direction in flash.items()}
    tables |= {
        f"flash_attention_backward_{side}": _flash_cases("backward", deterministic=True) for side in ("keys", "queries")
    }
    tables |= {"decode_attention": _decode_cases, "decode_attention_combine": _decode_cases}
    for kernel in rows.NORMS:
        for direction in ("forward", "backward"):
            tables[f"{kernel}_{direction}"] = _norm_cases(kernel, direction)
    tables |= {
        "rope": _rope_cases,
        "gated_forward": _gated_cases("forward"),
        "gated_backward": _gated_cases("backward"),
    }
    return tables | {"cross_entropy": _loss_cases}


def _dtypes(quick: bool) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16, torch.float32)


def _key(shape: str, dtype: torch.dtype) -> str:
    return f"{shape}/{str(dtype).removeprefix('torch.')}"


def _flash_cases(direction: str, *, deterministic: bool = False) -> Cases:
    def cases(quick: bool) -> Iterator[tuple[str, Case]]:
        for dtype in _dtypes(quick):
            for D in (64, 128) if quick else (16, 32, 64, 128, 256):
                H = attention.WIDTH // D
                options: dict[str, Any] = {"causal": True} | ({"deterministic": True} if deterministic else {})
                for case in attention.flash(4, H, H, 4096, D, dtype, options):
                    if case.direction == direction:
                        yield _key(f"d{D}", dtype), case

    return cases


def _decode_cases(quick: bool) -> Iterator[tuple[str, Case]]:
    for dtype in _dtypes(quick):
        for D in (64, 128) if quick else (16, 32, 64, 128, 256):
            yield _key(f"d{D}", dtype), attention.decoding(8, 32, 8, 8192, D, dtype)


def _norm_cases(kernel: str, direction: str) -> Cases:
    def cases(quick: bool) -> Iterator[tuple[str, Case]]:
        for dtype in _dtypes(quick):
            for N in (1024, 4096) if quick else (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768):
                yield _key(f"n{N}", dtype), rows.norm(kernel, 16384, N, dtype, direction)

    return cases


def _rope_cases(quick: bool) -> Iterator[tuple[str, Case]]:
    for dtype in _dtypes(quick):
        for D in (64, 128) if quick else (16, 32, 64, 128, 256, 512):
            H = max(1, attention.WIDTH // D)
            yield _key(f"d{D}", dtype), next(rows.rotation(8, rows.LENGTH, H, H, D, dtype))


def _gated_cases(direction: str) -> Cases:
    def cases(quick: bool) -> Iterator[tuple[str, Case]]:
        for dtype in _dtypes(quick):
            for case in rows.gated(16384, 2816, dtype):
                if case.direction == direction:
                    yield _key("silu", dtype), case

    return cases


def _loss_cases(quick: bool) -> Iterator[tuple[str, Case]]:
    for dtype in _dtypes(quick):
        for shape, V in (("v1024", 1000), ("v4096", 4000), ("large", 50304)):
            yield _key(shape, dtype), losses.of_logits(8192, V, dtype)


def _tried(table: str, key: str, shipped: Choice, case: Case, arch: str, *, quick: bool) -> Iterator[Row]:
    """Every candidate with what the compiler says and, unless that rules it out, its times."""
    files = sorted(_launch.TABLES.parent.glob("[a-z]*.py"))
    modules = [importlib.import_module(f"kernels.{path.stem}") for path in files]
    ahead = [aot for module in modules if hasattr(module, "aot_cases") for aot in module.aot_cases(arch)]
    compiled = [aot for aot in ahead if aot.name.startswith(f"{table}/{key}")]
    inputs = case.inputs(torch.device("cuda"))
    back = errors.cotangents(case, inputs)
    verdicts, measures = [], {}
    for choice in candidates(shipped, steps=QUICK_STEPS if quick else STEPS):
        found = [fits(aot, choice, arch) for aot in compiled]
        fault = next((row["fault"] for row in found if row["fault"]), None)
        most = {name: max((row[name] for row in found), default=0) for name in ("registers", "spills", "shared")}
        verdicts.append({"choice": choice, **most, "fault": fault})
        if fault is None:
            measures[json.dumps(choice)] = _timer(table, choice, case, inputs, back)
    samples, failed = timing.interleaved(measures, rounds=3 if quick else timing.ROUNDS, pause=0)
    for row in verdicts:
        name = json.dumps(row["choice"])
        if name in samples:
            yield row | {f"ms_{part}": value for part, value in timing.summary(samples[name]).items()}
        else:
            yield row | ({"failed": failed[name]} if name in failed else {})


def _timer(
    table: str, choice: Choice, case: Case, inputs: Mapping[str, Tensor], back: list[Tensor]
) -> Callable[[], list[float]]:
    def measure() -> list[float]:
        with _launch.candidate(table, choice):
            call = kernels.prepared(case, case.providers[OURS], inputs, back)
            return timing.as_called(call, warmup=25, repeat=100)

    return measure

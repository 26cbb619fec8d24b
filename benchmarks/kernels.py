"""`python -m benchmarks kernels`: every kernel against its peers, or, where there is no GPU, against its reference.

On a GPU, for each case: errors of all providers against fp64 first (`errors.py`), then their times, as called and on
the GPU alone, the providers taking turns for ROUNDS rounds (`timing.py`), as fractions of roofs measured in the same
run (`roofs.py`). A family stops after `minutes` and goes on from there when it is called again.

Without a GPU nothing is timed: the kernels run under Triton's interpreter on small shapes, errors are judged by the
same gate and written to correctness.json, and the compiler's figures are made (`codegen.py`).

A row of kernels.json (one for each provider and mode of a case; milliseconds): kernel, shape, dtype, dir, provider,
mode ("as called" | "gpu time"), ms_p20, ms_p50, ms_p80, samples, tflops | gbps, frac_roof, roof, err, err_ref, gate,
peak_bytes, regs, spills, smem (of ours, from codegen.json), clocks, device, versions, commit, sources, date, quick;
a provider that could not do the case has `failed` in place of the figures.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import codegen, errors, records, roofs, timing
from benchmarks.families import OURS, Case, Function, families
from benchmarks.records import Row

MINUTES = 8.0  # a family's; the next call goes on
REPEATS = 20  # of our kernel in the check of errors: a race shows in some runs only
PACKAGES = ("liger-kernel", "numpy")


def run(names: Sequence[str], out: Path, *, quick: bool, minutes: float = MINUTES) -> int:
    """Measure the named families (all where none is named); 1 if one of our kernels fails its gate, else 0.

    Raises ValueError for a family that does not exist.
    """
    known = families()
    for name in names:
        if name not in known:
            raise ValueError(f"there is no kernel family {name!r}: choose from {', '.join(known)}")
    chosen = {name: known[name] for name in names or known}
    if torch.cuda.is_available():
        return _on_gpu(chosen, out, quick=quick, minutes=minutes)
    return _interpreted(chosen, out, quick=quick)


def _interpreted(chosen: Mapping[str, Callable[[str], Any]], out: Path, *, quick: bool) -> int:
    from kernels._launch import INTERPRETED

    print("No GPU here: nothing is timed. The kernels run under Triton's interpreter, against fp64.", file=sys.stderr)
    if not INTERPRETED:
        raise ValueError("Triton is absent or compiles here: start with TRITON_INTERPRET=1, on Linux with triton")
    path, bad = out / records.slug(records.device_name()) / "correctness.json", 0
    rows, about = records.load(path), records.provenance(*PACKAGES) | {"quick": quick}
    for cases in chosen.values():
        for case in cases("small"):
            found = judged(case, torch.device("cpu"), only=(OURS,))
            row = identity(case) | {"provider": OURS, "mode": "interpreted"} | found[OURS] | about
            bad += row["gate"] is not None
            print(f"{case.kernel:22}{case.direction:10}{row['dtype']:10}{_shape(row)}: {row['gate'] or 'passed'}")
            rows = records.merge(rows, [row])
    records.save(path, rows)
    print(f"{len(rows)} cases in {path}")
    compiled = codegen.run(("sm_90",) if quick else codegen.ARCHITECTURES, path.parent, quick=quick)
    return 1 if bad or compiled else 0


def _on_gpu(chosen: Mapping[str, Callable[[str], Any]], out: Path, *, quick: bool, minutes: float) -> int:
    about = records.provenance(*PACKAGES) | {"quick": quick}
    folder = out / records.slug(about["device"])
    path, bad = folder / "kernels.json", 0
    ceilings = roofs.preamble()
    records.save(folder / "roofs.json", [*records.load(folder / "roofs.json"), ceilings | about])
    rates = dict(ceilings["rates"])
    for name, cases in chosen.items():
        start = time.monotonic()
        for case in cases("quick" if quick else "full"):
            rows = records.load(path)
            key = records.case_key(identity(case) | about)
            if key in records.finished(rows, about["sources"], about["device"]):
                continue
            if time.monotonic() - start > 60 * minutes:
                print(f"{name}: {minutes:g} minutes are over; the same command goes on from here", file=sys.stderr)
                break
            new = [row | about for row in measure(case, rates, quick=quick)]
            bad += any(row["provider"] == OURS and (row.get("gate") or row.get("failed")) for row in new)
            records.save(path, records.merge(rows, new))
            print(report(new), flush=True)
    print(f"written to {path}")
    if path.exists():
        from benchmarks.plots import draw_all

        draw_all(records.load(path), folder)
    return 1 if bad else 0


def identity(case: Case) -> Row:
    """What tells one case from another."""
    dtype = str(case.dtype).removeprefix("torch.")
    return {"kernel": case.kernel, "shape": case.shape, "dtype": dtype, "dir": case.direction}


def judged(case: Case, device: torch.device, *, only: Sequence[str] | None = None) -> dict[str, Row]:
    """By provider: err, err_ref (PyTorch's own error), gate (None: passed); or `failed`, with the reason."""
    torch.manual_seed(0)
    inputs = case.inputs(device)
    back = errors.cotangents(case, inputs)
    exact = errors.results(case, case.exact, errors.wide(inputs), back)
    torchs = errors.error(errors.results(case, case.torchs, inputs, back), exact)
    eps = torch.finfo(case.dtype).eps
    found: dict[str, Row] = {}
    for name in only or case.providers:
        try:
            for turn in range(REPEATS if name == OURS and device.type == "cuda" else 1):
                err = errors.error(errors.results(case, case.providers[name], inputs, back), exact)
                verdict = errors.gate(err, torchs, exact, eps)
                if not turn or verdict:
                    found[name] = {"err": err, "err_ref": torchs, "gate": verdict}
        except Exception as error:  # a peer that cannot do this case is a finding
            found[name] = {"failed": timing.one_line(error)}
    return found


def measure(case: Case, rates: dict[str, float], *, quick: bool = False) -> list[Row]:
    """All rows of a case, without provenance. `rates` are the measured roofs; a missing one is measured and added."""
    torch._dynamo.reset()  # what was compiled for other shapes would count against this one's limit
    device = torch.device("cuda")
    roof_name, roof = _roof(case, rates)
    verdicts = judged(case, device)
    torch.manual_seed(0)
    inputs = case.inputs(device)
    back = errors.cotangents(case, inputs)
    clocks = {"before": roofs.query_gpu()}
    rows = []
    for mode in ("as called", "gpu time"):
        measures, failed, peaks = {}, {}, {}
        for name, function in case.providers.items():
            if "failed" in verdicts[name]:
                failed[name] = verdicts[name]["failed"]
                continue
            try:
                measures[name] = _measure_of(case, function, inputs, back, mode, quick=quick)
                if mode == "as called":
                    peaks[name] = {"peak_bytes": _peak(prepared(case, function, inputs, back))}
            except Exception as error:  # as above: an operator that cannot be captured, say
                failed[name] = timing.one_line(error)
        samples, broken = timing.interleaved(measures)
        for name in case.providers:
            row = identity(case) | {"provider": name, "mode": mode, "roof": {"name": roof_name, "rate": roof}}
            reason = failed.get(name) or broken.get(name)
            figures = {"failed": reason} if reason else timed(samples[name], case.work, case.roof[0], roof)
            rows.append(row | verdicts[name] | figures | peaks.get(name, {}))
    clocks["after"] = roofs.query_gpu()
    ours = codegen_figures(case, _codegen_rows())
    return [row | {"clocks": clocks} | (ours if row["provider"] == OURS else {}) for row in rows]


def timed(samples: Sequence[float], work: float, kind: str, roof: float) -> Row:
    """The figures of one provider in one mode, from milliseconds a call: quantiles, rate, fraction of the roof."""
    spread = timing.summary(samples)
    rate = work / (spread["p50"] / 1e3)
    named = {"gbps": rate / 1e9} if kind == "copy" else {"tflops": rate / 1e12}
    return {f"ms_{name}": value for name, value in spread.items()} | {
        "samples": len(samples),
        **named,
        "frac_roof": rate / roof,
    }


def prepared(case: Case, function: Function, inputs: Mapping[str, Tensor], back: list[Tensor]) -> timing.Call:
    """One call of what the case's direction asks for, and nothing else: a backward pass has its graph already."""
    own = errors.leaves(case, inputs)
    if case.direction == "forward":
        return lambda: function(**own)
    wanted = [x for x in own.values() if x.requires_grad]
    answer = errors.outputs(function(**own))
    given = [dy.to(y.dtype) for dy, y in zip(back, answer, strict=True)]
    if case.direction == "backward":
        return lambda: torch.autograd.grad(answer, wanted, given, retain_graph=True)
    return lambda: torch.autograd.grad(errors.outputs(function(**own)), wanted, given)


def codegen_figures(case: Case, rows: Sequence[Row]) -> Row:
    """Registers and spills a thread and shared memory of our kernel's launched configurations: the most of each."""
    dtype = str(case.dtype).removeprefix("torch.")
    used = [
        row for row in rows if row["case"].startswith(case.codegen) and dtype in row["case"].split("/") if case.codegen
    ]
    names = {"regs": "registers", "spills": "spills", "smem": "shared"}
    return {short: max(row[long] for row in used) for short, long in names.items()} if used else {}


def report(rows: Sequence[Row]) -> str:
    """A case as text, a line for each provider and mode."""
    first = rows[0]
    lines = [f"{first['kernel']} {first['dir']} {first['dtype']} {_shape(first)}"]
    for row in rows:
        if "failed" in row:
            figures = f"failed: {row['failed'][:80]}"
        else:
            rate = f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row else f"{row['gbps']:.0f} GB/s"
            figures = f"{row['ms_p50']:9.4f} ms ({row['ms_p20']:.4f} to {row['ms_p80']:.4f})  {rate}"
            figures += f"  {100 * row['frac_roof']:.0f} % of {row['roof']['name']}"
            figures += f"  {row['gate']}" if row["gate"] else ""
        lines.append(f"  {row['provider']:28}{row['mode']:10} {figures}")
    return "\n".join(lines)


def _measure_of(
    case: Case, function: Function, inputs: Mapping[str, Tensor], back: list[Tensor], mode: str, *, quick: bool
) -> Callable[[], list[float]]:
    if mode == "as called":
        call = prepared(case, function, inputs, back)
        share = 4 if quick else 1
        return lambda: timing.as_called(call, warmup=timing.WARMUP // share, repeat=timing.REPEAT // share)
    size = sum(x.nbytes for x in inputs.values())

    def calls() -> list[timing.Call]:
        return [
            prepared(case, function, {name: x.clone() for name, x in inputs.items()}, back)
            for _ in range(timing.copies(size))
        ]

    return timing.gpu_time(calls)


def _peak(call: timing.Call) -> int:
    """Bytes that a call needs beyond what is there before it."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _roof(case: Case, rates: dict[str, float]) -> tuple[str, float]:
    if case.roof[0] == "copy":
        return "copy", rates["copy"]
    M, N, K = case.roof[1:]
    name = f"matmul {M}³" if M == N == K else f"matmul {M}×{N}×{K}"
    if name not in rates:
        rates[name] = roofs.matmul_rate(M, N, K)
    return name, rates[name]


def _codegen_rows() -> list[Row]:
    from kernels._launch import architecture

    arch = architecture(torch.device("cuda"))
    return [row for row in records.load(records.RESULTS / "codegen.json") if row["arch"] == arch]


def _shape(row: Row) -> str:
    return " ".join(f"{name}={value}" for name, value in row["shape"].items())

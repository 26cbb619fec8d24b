"""`python -m benchmarks training`: steps of pretraining, ours beside Transformers' own model and nanoGPT's.

All begin with the same weights, read the same batches, and multiply in the same precision; AdamW, clipping and the
constant rate are the same too. So their losses must coincide (BAND): where they do not, one of them does other work,
and nothing is written. They take turns, a few steps at a time, so that what disturbs the machine disturbs all.

    MFU = FLOPs a token · tokens a second / rate of a large product, measured in the same run
    FLOPs a token = 6 N + 12 · A · w · S    (minillm.preflight.flops_per_token)

Peak memory is that of a process of its own: on a CPU what it grew by, on a GPU what PyTorch had allocated.
"""

from __future__ import annotations

import multiprocessing
import resource
import sysconfig
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers, records, timing
from benchmarks.peers import Setting, Trainer
from benchmarks.records import Row
from minillm import ops, preflight
from minillm.config import merge
from minillm.machine import peak_bytes
from minillm.presets import MODELS, RUNS, settings
from minillm.training.plan import choose_device, choose_dtype
from minillm.training.roofs import matrix_rate

MEASURED = (
    "kernels", "minillm/model", "minillm/training", "minillm/ops.py", "minillm/cpu.py", "benchmarks/training.py",
    "benchmarks/peers.py",
)  # fmt: skip
BAND = {"fp32": 0.01, "bf16": 0.05}
"""Nats by which the losses of any step may differ: rounding, which AdamW's first steps make larger."""
ROUNDS, STEPS, WARM = 5, (4, 40), 3
"""Rounds, fewest and most timed steps of each in a round, and untimed ones before the first."""
ROUND = 2.0
"""Seconds that a round of one of them takes, within those bounds."""

_GPT2 = {**MODELS["gpt2"], "mlp": {"kind": "gelu", "bias": True}}  # nanoGPT's GELU is the exact one, so all have it
CASES: dict[str, tuple[dict[str, Any], int, str]] = {  # model, batch, device
    "default": ({**MODELS["llama-5m"], "vocab_size": 4096}, 8, "cpu"),
    "shakespeare-char": (
        merge(_GPT2, {"layers": 4, "heads": 4, "dim": 128, "context": 64, "vocab_size": 65}),
        12,
        "cpu",
    ),
    "gpt2, 2 layers": (merge(_GPT2, {"layers": 2, "context": 256}), 4, "cpu"),
    "gpt2": (_GPT2, 32, "cuda"),
    "llama-350m": (MODELS["llama-350m"], 16, "cuda"),
    "speedrun": ({**RUNS["speedrun"]["model"], "vocab_size": 4096}, 128, "cuda"),
}
TINY = (merge(_GPT2, {"layers": 2, "heads": 2, "dim": 32, "context": 16, "vocab_size": 65}), 4)


def run(names: Sequence[str], nanogpt: Path | None, out: Path, *, quick: bool) -> int:
    """Measures, prints, and writes out/<device>/training.json; 1 where the losses of a case do not coincide.

    Raises ValueError for an unknown name and for a folder without nanoGPT.
    """
    device = choose_device("auto")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise ValueError(f"--model {unknown[0]}: there are {', '.join(CASES)}")
    names = names or [name for name, (_, _, where) in CASES.items() if where == device.type]
    about = records.provenance("transformers") | {"sources": records.sources(places=MEASURED), "quick": quick}
    about["threads"] = torch.get_num_threads()
    path = out / records.slug(about["device"]) / "training.json"
    for name in names:
        of = setting(name, device, quick=quick)
        case = described(name, of, quick)
        if records.case_key(case) in records.finished(records.load(path), about["sources"], about["device"]):
            print(f"{case['kernel']}: measured before, with these sources")
            continue
        providers = trainers(of, nanogpt)
        found = measured(providers, of, quick=quick)
        gap = max(row["gap"] for row in found.values())
        if gap > BAND[of.dtype]:
            print(f"{case['kernel']}: the losses differ by {gap:.4f}, more than {BAND[of.dtype]}: nothing is written")
            return 1
        memory = {who: peak_memory(of, who, nanogpt) for who in providers}
        rows = [{**case, "provider": who, **row, "peak_bytes": memory[who], **about} for who, row in found.items()]
        records.save(path, records.merge(records.load(path), rows))
        print(report(rows), flush=True)
    print(f"written to {path}")
    return 0


def setting(name: str, device: torch.device, *, quick: bool) -> Setting:
    model, batch = TINY if quick else CASES[name][:2]
    dtype = choose_dtype(settings("default", {"model": model}), device)
    return peers.setting(model, batch, device, dtype)


def described(name: str, of: Setting, quick: bool) -> Row:
    model = of.settings.model
    shape = {"batch": of.settings.train.batch, "context": model.context, "layers": model.layers, "dim": model.dim}
    return {"kernel": f"training {name}", "shape": shape, "dtype": of.dtype, "dir": "step", "quick": quick}


def makers(of: Setting, nanogpt: Path | None) -> dict[str, Callable[[Any], Trainer]]:
    """By provider, what makes its trainer out of the first weights.

    On a GPU ours once more on PyTorch's kernels (SDPA, the compiler's own); nanoGPT has GPT-2's shape alone, and for
    n-gram tables there is no peer.
    """
    found: dict[str, Callable[[Any], Trainer]] = {"minillm": partial(peers.minillm, of, on=nullcontext)}
    if of.device.type == "cuda":
        found["minillm, --kernels torch"] = partial(peers.minillm, of, on=ops.on_torch)
    if not of.settings.model.speedrun.ngrams:
        found["transformers"] = partial(peers.transformers, of)
    if nanogpt is not None and of.settings.model.position.kind == "learned":
        found["nanogpt"] = partial(peers.nanogpt, of, checkout=nanogpt)
    return found


def trainers(of: Setting, nanogpt: Path | None) -> dict[str, Trainer]:
    first = peers.start(of)
    return {who: make(first) for who, make in makers(of, nanogpt).items()}


def text() -> Tensor:
    """Bytes of the standard library's own source, the same on every call."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def batch(source: Tensor, of: Setting, step: int) -> tuple[Tensor, Tensor]:
    """ids, targets [B, T] of a step, on the device; bytes beyond a small vocabulary begin it anew."""
    model, rows = of.settings.model, of.settings.train.batch
    at = torch.randint(len(source) - model.context - 1, (rows,), generator=torch.Generator().manual_seed(step))
    window = torch.stack([source[i : i + model.context + 1] for i in at.tolist()]) % model.vocab_size
    return window[:, :-1].contiguous().to(of.device), window[:, 1:].contiguous().to(of.device)


def measured(providers: dict[str, Trainer], of: Setting, *, quick: bool) -> dict[str, Row]:
    """By provider: ms and tokens a second (p20, p50, p80), MFU, losses, and the largest gap to ours."""
    source, rounds = text(), 2 if quick else ROUNDS
    data = [batch(source, of, step) for step in range(WARM + rounds * max(STEPS))]
    wait = torch.cuda.synchronize if of.device.type == "cuda" else (lambda: None)
    times: dict[str, list[float]] = {who: [] for who in providers}
    losses: dict[str, list[float]] = {who: [] for who in providers}

    def take(who: str, count: int) -> None:
        for ids, targets in data[len(losses[who]) : len(losses[who]) + count]:
            wait()
            start = time.perf_counter()
            losses[who].append(providers[who](ids, targets))
            wait()
            times[who].append(1e3 * (time.perf_counter() - start))

    for who in providers:
        take(who, WARM)
    rate = matrix_rate(of.device, {"bf16": torch.bfloat16}.get(of.dtype, torch.float32))
    slowest = max(times[who][-1] for who in providers) / 1e3
    steps = 2 if quick else min(max(STEPS), max(min(STEPS), int(ROUND / slowest)))
    for _ in range(rounds):
        for who in providers:
            take(who, steps)
    found = {}
    for who in providers:
        timed = times[who][WARM:]
        middle = timing.quantile(timed, 0.5)
        spread = {f"ms_{name}": value for name, value in timing.summary(timed).items()}
        found[who] = {
            **spread,
            **timing.summary_of_rates(of.tokens, timed, "tokens"),
            "mfu": preflight.flops_per_token(of.settings.model) * of.tokens / (middle / 1e3) / rate,
            "matrix_rate": rate,
            "compile_seconds": (times[who][0] - middle) / 1e3 if of.compile else None,
            "losses": [round(loss, 6) for loss in losses[who]],
            "gap": max(abs(a - b) for a, b in zip(losses[who], losses["minillm"], strict=True)),
        }
    return found


def peak_memory(of: Setting, who: str, nanogpt: Path | None) -> int:
    """Bytes that training takes at its peak, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(_peak, (of, who, nanogpt, torch.get_num_threads()))


def _peak(of: Setting, who: str, nanogpt: Path | None, threads: int) -> int:
    torch.set_num_threads(threads)
    tiny = setting("", torch.device(of.device), quick=True)
    source = text()
    makers(tiny, nanogpt)[who](peers.start(tiny))(*batch(source, tiny, 0))  # what is imported once is no part of it
    make, first = makers(of, nanogpt)[who], peers.start(of)
    size = sum(p.nbytes for p in first.parameters())
    if of.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() - size
    train = make(first)
    del first
    for step in range(3):
        train(*batch(source, of, step))
    if of.device.type == "cuda":
        return torch.cuda.max_memory_allocated() - before
    return peak_bytes() - before


def report(rows: Sequence[Row]) -> str:
    return "\n".join(
        f"{row['kernel']:26} {row['provider']:13}{row['tokens_p50']:9,.0f} tokens/s "
        f"({row['tokens_p20']:,.0f} to {row['tokens_p80']:,.0f})  MFU {row['mfu']:6.1%}  "
        f"{row['peak_bytes'] / 2**20:7,.0f} MiB  loss {row['losses'][0]:.4f} to {row['losses'][-1]:.4f}, "
        f"gap {row['gap']:.1e}"
        for row in rows
    )

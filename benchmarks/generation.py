"""`python -m benchmarks generation`: tokens a second, greedy, with and without KV cache, beside Transformers' generate.

The peer is Transformers' model of a preset's shape with random weights, and ours has the very same weights, read
through `minillm.interop`; in fp32 both must generate the same texts, else nothing is timed. What is timed is fp32 and
bf16 on a CPU, on a GPU bf16 alone (there a rounding may turn a greedy choice, which costs no time). Ours and the peer
take turns, the time is the wall's for the whole call: reading the prompts, every new token, the host's part included.

Without cache each token reads the whole text anew, so there the new tokens are few (`new_tokens` says how many). With
it a step reads every weight once for all rows: frac_roof is that rate, bytes of weights over seconds of a step, as a
share of a copy's (bytes read and written) in the same run. A model that no cache holds cannot pass it by much, whoever
runs it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import peers, records, timing
from benchmarks.records import Row
from minillm.inference.generate import generate
from minillm.inference.sampling import Sampling
from minillm.model.transformer import Transformer
from minillm.presets import MODELS, settings
from minillm.training.plan import cpu_multiplies_bf16
from minillm.training.roofs import copy_rate

BATCHES = (1, 8, 32)
FULL: dict[str, Any] = {"models": ("gpt2", "llama-5m"), "prompt": 32, "cached": 64, "uncached": 4, "rounds": 5}
QUICK: dict[str, Any] = {"models": ("gpt2-tiny",), "prompt": 8, "cached": 16, "uncached": 4, "rounds": 3}

Ids = list[list[int]]
Generator = Callable[[Ids, int, bool], Ids]  # prompts, new tokens, whether to use the cache -> the new ids


def run(names: Sequence[str], out: Path, *, quick: bool, batches: Sequence[int] = BATCHES) -> int:
    """Measure, print, and write out/<device>/generation.json; 1 where ours and the peer's texts differ.

    Raises ValueError for a model that is neither a preset nor a MODEL folder.
    """
    size = QUICK if quick else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = records.provenance("transformers") | {"quick": quick, "threads": torch.get_num_threads()}
    path = out / records.slug(about["device"]) / "generation.json"
    roof = copy_rate(device)
    for name in names or size["models"]:
        models = {who: model.to(device).eval() for who, model in pair(name).items()}
        vocab_size = models["minillm"].embedding.num_embeddings
        torch.manual_seed(0)
        cases = [
            (
                torch.randint(vocab_size, (batch, size["prompt"])).tolist(),
                size["cached" if cached else "uncached"],
                cached,
            )
            for batch in batches
            for cached in (True, False)
        ]
        providers = generators(models, device)
        for prompts, new, cached in cases:
            if not coincide(providers, prompts, new, cached):
                print(f"{name}: ours and {'/'.join(providers)} differ at batch {len(prompts)}: nothing is timed")
                return 1
        for dtype in dtypes(device):
            providers = generators({who: model.to(dtype) for who, model in models.items()}, device)
            weights = sum(p.nbytes for p in models["minillm"].parameters())
            for prompts, new, cached in cases:
                shape = {"B": len(prompts), "prompt": size["prompt"], "new_tokens": new, "cache": cached}
                case = {"kernel": f"generate {name}", "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
                found = measure(providers, prompts, new, cached, size["rounds"])
                for row in found.values():
                    if cached and "tokens_p50" in row:
                        row["frac_roof"] = weights * row["tokens_p50"] / len(prompts) / roof
                rows = [case | {"provider": who, "roof": roof} | row | about for who, row in found.items()]
                records.save(path, records.merge(records.load(path), rows))
                print(report(rows), flush=True)
    print(f"written to {path}")
    return 0


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """What is timed there, the widest first."""
    if device.type == "cuda":
        return (torch.bfloat16,)
    return (torch.float32, torch.bfloat16) if cpu_multiplies_bf16() else (torch.float32,)


def pair(name: str) -> dict[str, Any]:
    """By provider: ours, and for a preset's decoder Transformers' with the same weights, where it is installed."""
    if name in MODELS:
        changes = {} if MODELS[name].get("vocab_size") else {"model": {"vocab_size": 4096}}
        config = settings(name, changes).model
        if config.shape == "decoder" and not config.speedrun.ngrams and importlib.util.find_spec("transformers"):
            theirs = peers.random_model(config)
            return {"minillm": peers.same_weights(theirs), "transformers": theirs}
        return {"minillm": Transformer(config)}
    if Path(name).is_dir():
        from minillm import load

        return {"minillm": load(name)[0]}
    raise ValueError(f"--model {name}: no such folder, and no preset of that name; presets: {', '.join(MODELS)}")


def generators(models: dict[str, nn.Module], device: torch.device) -> dict[str, Generator]:
    return {who: ours(model) if who == "minillm" else theirs(model, device) for who, model in models.items()}


def ours(model: Transformer) -> Generator:
    def call(prompts: Ids, new: int, cached: bool) -> Ids:
        return generate(model, prompts, max_new_tokens=new, sampling=Sampling(temperature=0.0), use_cache=cached)

    return call


def theirs(model: Any, device: torch.device) -> Generator:
    def call(prompts: Ids, new: int, cached: bool) -> Ids:
        ids = torch.tensor(prompts, device=device)
        with torch.no_grad():
            answer = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new,
                use_cache=cached, pad_token_id=0,
            )  # fmt: skip
        return answer[:, ids.shape[1] :].tolist()

    return call


def coincide(providers: dict[str, Generator], prompts: Ids, new: int, cached: bool) -> bool:
    """Whether all generate the same ids."""
    answers = [call(prompts, new, cached) for call in providers.values()]
    return all(answer == answers[0] for answer in answers)


def measure(providers: dict[str, Generator], prompts: Ids, new: int, cached: bool, rounds: int) -> dict[str, Row]:
    """By provider: tokens_p20, tokens_p50, tokens_p80 (new tokens a second, all rows together), samples."""
    for call in providers.values():  # to warm up
        call(prompts, new, cached)
    measures = {
        name: lambda call=call: timing.wall(lambda: call(prompts, new, cached)) for name, call in providers.items()
    }
    samples, failed = timing.interleaved(measures, rounds=rounds, pause=0)
    return {name: timing.summary_of_rates(len(prompts) * new, times, "tokens") for name, times in samples.items()} | {
        name: {"failed": reason} for name, reason in failed.items()
    }


def report(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        case = f"{row['kernel']}  {row['dtype']:9} batch {row['shape']['B']:<3} "
        case += f"{'cache' if row['shape']['cache'] else 'no cache':9}"
        figures = row.get("failed") or (
            f"{row['tokens_p50']:9.1f} tokens/s ({row['tokens_p20']:.1f} to {row['tokens_p80']:.1f})"
            + (f"  {row['frac_roof']:.0%} of the memory's rate" if "frac_roof" in row else "")
        )
        lines.append(f"{case} {row['provider']:14}{figures}")
    return "\n".join(lines)

"""`python -m benchmarks generation`: tokens a second, greedy, with and without KV cache, beside Transformers' generate.

For a GPT-2-shaped preset the peer is GPT2LMHeadModel with random weights, and ours has the very same weights, read
through `minillm.interop`; what both generate must coincide, else nothing is timed. Ours and the peer take turns, the
time is the wall's for the whole call: reading the prompts, every new token, the host's part included.

Without cache each token reads the whole text anew, so there the new tokens are few (`new_tokens` says how many).
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import records, timing
from benchmarks.records import Row
from minillm.inference.generate import generate
from minillm.inference.sampling import Sampling
from minillm.model.transformer import Transformer
from minillm.presets import MODELS, settings

BATCHES = (1, 8, 32)
FULL = {"model": "gpt2", "prompt": 32, "cached": 64, "uncached": 4, "rounds": 5}
QUICK = {"model": "gpt2-tiny", "prompt": 8, "cached": 16, "uncached": 4, "rounds": 3}

Ids = list[list[int]]
Generator = Callable[[Ids, int, bool], Ids]  # prompts, new tokens, whether to use the cache -> the new ids


def run(model: str | None, out: Path, *, quick: bool, batches: Sequence[int] = BATCHES) -> int:
    """Measure, print, and write out/<device>/generation.json; 1 where ours and the peer's texts differ.

    Raises ValueError for a model that is neither a preset nor a MODEL folder.
    """
    size = QUICK if quick else FULL
    name = model or size["model"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    providers, vocab_size = generators(name, device)
    about = records.provenance("transformers") | {"quick": quick, "threads": torch.get_num_threads()}
    path = out / records.slug(about["device"]) / "generation.json"
    torch.manual_seed(0)
    for batch in batches:
        prompts = torch.randint(vocab_size, (batch, size["prompt"])).tolist()
        for cached in (True, False):
            new = size["cached" if cached else "uncached"]
            if not coincide(providers, prompts, new, cached):
                print(f"{name}: ours and {'/'.join(providers)} differ at batch {batch}: nothing is timed")
                return 1
            case = {"B": batch, "prompt": size["prompt"], "new_tokens": new, "cache": cached}
            found = measure(providers, prompts, new, cached, size["rounds"])
            rows = [
                {"kernel": f"generate {name}", "shape": case, "dtype": "float32", "provider": who} | row | about
                for who, row in found.items()
            ]
            records.save(path, records.merge(records.load(path), rows))
            print(report(rows), flush=True)
    print(f"written to {path}")
    return 0


def generators(name: str, device: torch.device) -> tuple[dict[str, Generator], int]:
    """Ours, and Transformers' where it is installed and the model is GPT-2-shaped; and the vocabulary's size."""
    if name.startswith("gpt2") and name in MODELS and importlib.util.find_spec("transformers"):
        model, peer = gpt2_pair(name)
        pair = {"minillm": ours(model.to(device)), "transformers": theirs(peer.to(device), device)}
        return pair, model.embedding.num_embeddings
    if name in MODELS:
        changes = {} if MODELS[name].get("vocab_size") else {"model": {"vocab_size": 4096}}
        model = Transformer(settings(name, changes).model)
    elif Path(name).is_dir():
        from minillm import load

        model, _ = load(name)
    else:
        raise ValueError(f"--model {name}: no such folder, and no preset of that name; presets: {', '.join(MODELS)}")
    return {"minillm": ours(model.eval().to(device))}, model.embedding.num_embeddings


def gpt2_pair(name: str) -> tuple[Transformer, Any]:
    """A GPT2LMHeadModel with random weights in the preset's shape, and ours with the same ones."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from minillm.interop.hf import build, read_hf

    config = settings(name).model
    torch.manual_seed(0)
    peer = GPT2LMHeadModel(
        GPT2Config(
            n_layer=config.layers, n_head=config.heads, n_embd=config.dim, n_positions=config.context,
            vocab_size=config.vocab_size, bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        return build(read_hf(folder)), peer


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
    """Whether all generate the same ids; the first call of each, so that it is also the warm-up."""
    answers = [call(prompts, new, cached) for call in providers.values()]
    return all(answer == answers[0] for answer in answers)


def measure(providers: dict[str, Generator], prompts: Ids, new: int, cached: bool, rounds: int) -> dict[str, Row]:
    """By provider: tokens_p20, tokens_p50, tokens_p80 (new tokens a second, all rows together), samples."""
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
        case = f"{row['kernel']}  batch {row['shape']['B']:<3} {'cache' if row['shape']['cache'] else 'no cache':9}"
        figures = row.get("failed") or (
            f"{row['tokens_p50']:9.1f} tokens/s ({row['tokens_p20']:.1f} to {row['tokens_p80']:.1f})"
        )
        lines.append(f"{case} {row['provider']:14}{figures}")
    return "\n".join(lines)

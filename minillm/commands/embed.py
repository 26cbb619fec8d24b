"""`minillm embed MODEL --input FILE`: a vector for each text, one line of JSON each: {"text", "embedding"}."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from minillm.commands.running import say
from minillm.commands.tasks import opened_means
from minillm.config import UserError
from minillm.data.batch import Batch
from minillm.data.labels import TextData, read_classify
from minillm.data.records import read_records
from minillm.loading import open_model
from minillm.model.heads import POOLS
from minillm.model.transformer import Transformer
from minillm.tasks.task import outputs
from minillm.training.plan import choose_device


@dataclass(frozen=True)
class Args:
    model: tyro.conf.Positional[Path]
    """A run folder, a checkpoint folder, or a folder in Hugging Face's format."""
    input: Path
    """.jsonl with "text" (.csv, .tsv, .json too), or .txt with one text a line (empty lines are none)."""
    pool: Literal["mean", "cls", "last"] = "mean"
    """The mean of all states, that of the first token (an encoder's [CLS]), or of the last (a decoder's)."""
    normalize: bool = False
    """Vectors of length 1, so that dot products are cosines."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


def main(argv: list[str]) -> int:
    args = tyro.cli(Args, prog="minillm embed", description=__doc__, args=argv)
    device = choose_device(args.device)
    records = [r for r in read_records(args.input) if args.input.suffix.lower() != ".txt" or r.fields["text"].strip()]
    if not records:
        raise UserError(f"{args.input} is empty: give one text a line")
    examples = read_classify(records, labelled=False)
    opened = open_model(args.model, device=device)
    means = opened_means(opened)
    data = TextData(examples, None, means.tokenizer, context=means.room, token_types=means.config.token_types > 1)

    if data.truncated:
        say(f"note: the context of {means.room} tokens cuts the end of {data.truncated} of {len(data)} texts")

    def compute(model: Any, batch: Batch) -> Tensor:
        return embed(model, batch, args.pool, normalize=args.normalize)

    for example, vector in zip(examples, outputs(opened.transformer, data, compute), strict=True):
        print(json.dumps({"text": example.text, "embedding": vector.tolist()}, ensure_ascii=False), flush=True)
    return 0


def embed(model: Transformer, batch: Batch, pool: str, *, normalize: bool) -> Tensor:
    """[B, dim] the states of the last block (of an encoder-decoder: of its encoder), pooled over what is no padding."""
    if model.config.shape == "encoder-decoder":
        states = model.encode(batch.ids, batch.segments)
    else:
        states = model.states(batch.ids, **batch.inputs())
    real = torch.ones_like(batch.ids, dtype=torch.bool) if batch.segments is None else batch.segments >= 0
    vectors = POOLS[pool](states, real).float()
    return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors

"""`minillm import HF_DIR --out DIR`: a model in Hugging Face's format becomes a run folder of ours."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from minillm import __version__
from minillm.config import UserError, to_dict
from minillm.interop.folder import refuse_adapter
from minillm.interop.hf import build, is_hf, load_hf
from minillm.peft.config import MethodConfig
from minillm.training import checkpoint
from minillm.training.run import new_run, write_json


@dataclass(frozen=True)
class Args:
    folder: tyro.conf.Positional[Path]
    """config.json, model.safetensors (or shards with their index), tokenizer files: GPT-2, Llama, Qwen3, BERT, BART."""
    out: Path
    """The run folder to write; every command opens it as MODEL."""
    overwrite: bool = False
    """Replace the run that --out holds."""
    json: bool = False
    """The result as one JSON object."""


def main(argv: list[str]) -> int:
    args = tyro.cli(Args, prog="minillm import", description=__doc__, args=argv)
    if not args.folder.is_dir():
        raise UserError(f"{args.folder} is no folder; give one with config.json, model.safetensors and a tokenizer")
    refuse_adapter(args.folder)
    if (args.folder / "config.json").is_file() and not is_hf(args.folder):
        raise UserError(f"{args.folder} is no model in Hugging Face's format: its config.json names no model_type")
    found, tokenizer = load_hf(args.folder)
    run = new_run(str(args.out), args.out.name, overwrite=args.overwrite)
    settings = {"format": 1, "settings": {"model": to_dict(found.config)}, "versions": {"minillm": __version__}}
    settings["imported"] = {"from": str(args.folder), "notes": found.notes, "start": found.start}
    if found.task is not None:
        settings |= {"task": found.task, "method": asdict(MethodConfig())}
    state = {} if found.pooler is None else {"pooler": found.pooler}
    weights = build(found).state_dict()
    write_json(run / "config.json", settings)
    tokenizer.save(run / "tokenizer")
    saved = checkpoint.save(run, 0, weights=weights, state=state, config=settings, tokenizer=run / "tokenizer", keep=1)
    parameters = sum(weight.numel() for weight in found.weights.values())
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.json:
        print(
            json.dumps({"run": str(run), "parameters": parameters, "shape": found.config.shape, "notes": found.notes})
        )
    else:
        print(f"{saved}: {found.config.shape}, {parameters:,} parameters, vocabulary {found.config.vocab_size}")
    return 0

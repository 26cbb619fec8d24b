"""`minillm import HF_DIR --out DIR`: a model in Hugging Face's format becomes a run folder of ours."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from minillm import __version__
from minillm.config import UserError, to_dict
from minillm.interop.hf import POOLER, check_vocabulary, is_hf, read_hf
from minillm.interop.hf_tokenizer import HFTokenizer
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
    if (args.folder / "config.json").is_file() and not is_hf(args.folder):
        raise UserError(f"{args.folder} is no model in Hugging Face's format: its config.json names no model_type")
    config, weights, notes = read_hf(args.folder)
    tokenizer = HFTokenizer.from_folder(args.folder)
    check_vocabulary(tokenizer, config, args.folder)
    run = new_run(str(args.out), args.out.name, overwrite=args.overwrite)
    settings = {"format": 1, "settings": {"model": to_dict(config)}, "versions": {"minillm": __version__}}
    settings["imported"] = {"from": str(args.folder), "notes": notes}
    pooler = {name: weights.pop(name) for name in POOLER if name in weights}
    write_json(run / "config.json", settings)
    tokenizer.save(run / "tokenizer")
    saved = checkpoint.save(run, 0, weights=weights, state=pooler, config=settings, tokenizer=run / "tokenizer", keep=1)
    parameters = sum(weight.numel() for weight in weights.values())
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if args.json:
        print(json.dumps({"run": str(run), "parameters": parameters, "shape": config.shape, "notes": notes}))
    else:
        print(f"{saved}: {config.shape}, {parameters:,} parameters, vocabulary {config.vocab_size}")
    return 0

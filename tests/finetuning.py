"""Small models to finetune, and commands as they are typed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.cli import run as command
from minillm.config import Settings, from_dict, to_dict
from minillm.model.transformer import Transformer
from minillm.training import checkpoint
from minillm.training.run import write_json
from tests.training.running import WORDS, Result
from tokenizer import train as train_tokenizer

FAST = ["--train.threads", "1", "--train.batch", "4", "--optim.lr", "5e-3"]
COLOURS = {"red": ["fox", "lazy", "jumps"], "blue": ["rain", "hills", "trees"]}


def base(folder: Path, shape: str = "decoder", **model: Any) -> Path:
    """A run folder with a model that nobody trained: two blocks, 32 wide, context 48."""
    torch.manual_seed(3)
    tokenizer = train_tokenizer(
        [" ".join(WORDS) + " red blue what colour is it ? .\n"] * 40, type="bpe", vocab_size=340
    )
    values = {"shape": shape, "layers": 2, "heads": 2, "dim": 32, "context": 48, "vocab_size": tokenizer.vocab_size}
    settings = from_dict(Settings, {"model": {**values, **model}, "steps": 1})
    folder.mkdir(parents=True)
    config = {"format": 1, "settings": to_dict(settings), "versions": {}}
    write_json(folder / "config.json", config)
    tokenizer.save(folder / "tokenizer")
    (folder / "metrics.jsonl").write_text("")
    weights = Transformer(settings.model).state_dict()
    checkpoint.save(folder, 1, weights=weights, state={}, config=config, tokenizer=folder / "tokenizer", keep=1)
    return folder


def minillm(capsys: pytest.CaptureFixture[str], name: str, *argv: Any) -> Result:
    """`minillm NAME ARGV` in this process; the parser's own exit counts as the command's."""
    capsys.readouterr()
    try:
        code = command(name, [str(arg) for arg in argv])
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return Result(code, captured.out, captured.err)


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def colour(number: int) -> tuple[str, str]:
    """(text, label) of the n-th example: the label hangs on the one word that its colour has."""
    label = ("red", "blue")[number % 2]
    return f"the {COLOURS[label][number // 2 % 3]} is over {WORDS[number % len(WORDS)]}", label


def classify_file(path: Path, count: int = 40) -> Path:
    return lines(path, [dict(zip(("text", "label"), colour(n), strict=True)) for n in range(count)])


def records(task: str, count: int = 40) -> list[dict[str, Any]]:
    """Examples of a task that a tiny model learns within seconds."""
    made = []
    for n in range(count):
        text, label = colour(n)
        words = text.split()
        made.append(
            {
                "classify": {"text": text, "label": label},
                "regress": {"text": text, "label": 3.5 if label == "red" else -1.0},
                "tag": {"tokens": words, "tags": ["O", f"B-{label.upper()}", *["O"] * (len(words) - 2)]},
                "span-qa": {
                    "id": str(n),
                    "question": "what is it ?",
                    "context": text,
                    "answers": [{"text": words[1], "answer_start": 4}],
                },
                "seq2seq": {"source": text, "target": label},
                "chat": {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": label}]},
                "preference": {"prompt": text, "chosen": label, "rejected": "red" if label == "blue" else "blue"},
            }[task]
        )
    return made

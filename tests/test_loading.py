"""load(): every way to name a model, every position scheme, and the tokenizer that travels with it."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minillm import load
from minillm.cli import run as command
from minillm.config import DamagedFile, UserError
from minillm.loading import Opened
from minillm.training import checkpoint
from tests.training.running import TINY, train, write_text
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    text = write_text(folder / "text.txt")
    argv = [
        "--data",
        text,
        "--out",
        folder / "run",
        *TINY,
        "--steps",
        "6",
        "--train.save-every",
        "2",
        "--train.keep",
        "9",
    ]
    assert command("train", [str(arg) for arg in argv]) == 0
    return folder / "run"


def test_a_run_a_checkpoint_and_the_best(run: Path) -> None:
    best = (run / "checkpoints" / "best").read_text().strip()
    for path, name in [
        (run, "step-6"),
        (str(run / "checkpoints" / "step-2"), "step-2"),
        (run / "checkpoints" / "best", best),
    ]:
        model, tokenizer = load(path)
        saved = checkpoint.load_weights(run / "checkpoints" / name)
        found = model.state_dict()
        assert found.keys() == saved.keys() and all(torch.equal(found[key], saved[key]) for key in saved)
        assert not model.training and model.config.vocab_size == tokenizer.vocab_size
        assert tokenizer.hash == Tokenizer.load(run / "tokenizer").hash
        assert tokenizer.decode(tokenizer.encode("the quick\n\tfox ☃")) == "the quick\n\tfox ☃"
    two = checkpoint.load_weights(run / "checkpoints" / "step-2")
    assert not torch.equal(two["embedding.weight"], load(run)[0].embedding.weight)


@pytest.mark.parametrize("position", ["none", "learned", "sinusoidal", "rope", "alibi"])
def test_tables_that_are_not_saved_are_made_again(run: Path, tmp_path: Path, position: str) -> None:
    """What a position scheme computes once must not stay empty where weights are put in place of undrawn ones."""
    from dataclasses import replace

    from minillm.config import PositionConfig, to_dict
    from minillm.model.transformer import Transformer

    config = replace(load(run)[0].config, position=PositionConfig(kind=position))
    torch.manual_seed(3)
    model = Transformer(config).eval()
    settings = {"settings": {"model": to_dict(config)}}
    checkpoint.save(
        tmp_path, 1, weights=model.state_dict(), state={}, config=settings, tokenizer=run / "tokenizer", keep=1
    )
    ids = torch.arange(12)[None]
    assert torch.equal(load(tmp_path)[0](ids), model(ids))


@pytest.mark.parametrize(
    ("config", "start", "frame"),
    [
        ({}, [7], ([], [])),
        ({"task": {"name": "classify", "frame": [[3], [4]]}}, [7], ([], [])),
        ({"task": {"name": "seq2seq"}}, [7], ([7], [8])),
        ({"task": {"name": "seq2seq", "start": [1, 2], "frame": [[3], []]}}, [1, 2], ([3], [])),
        ({"imported": {"start": [5]}, "task": {"name": "seq2seq", "start": [1]}}, [5], ([0], [2, 2])),
        ({"imported": {"start": None}, "task": {"start": [1]}}, [1], ([0], [2, 2])),
    ],
)
def test_what_an_encoder_decoder_reads_between_and_begins_with(config: dict[str, Any], start: Any, frame: Any) -> None:
    words = SimpleNamespace(document_id=7, end_id=8, encode=lambda text: [9], wrap=lambda text: [0, 9, 2, 2])
    opened = Opened(torch.nn.Identity(), words, Path(), config)
    assert (opened.start, opened.frame) == (start, frame)


def test_what_is_no_model_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(UserError, match="neither a run folder nor a checkpoint folder"):
        load(tmp_path)


def test_a_damaged_checkpoint_is_named_with_the_newest_valid_one(capsys, tmp_path: Path) -> None:
    """Through the command: exit code 3, one line, the file and what to take instead."""
    text, run = write_text(tmp_path / "t.txt"), tmp_path / "run"
    assert train(capsys, "--data", text, "--out", run, *TINY, "--steps", "4", "--train.save-every", "2").code == 0
    file = run / "checkpoints" / "step-4" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 64
    file.write_bytes(raw)
    assert command("generate", [str(run), "--prompt", "the"]) == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(file) in err and f"{run / 'checkpoints' / 'step-2'}" in err
    with pytest.raises(DamagedFile, match=r"model\.safetensors is damaged"):
        load(run)
    assert load(run / "checkpoints" / "step-2")[0].config.dim == 32


def test_loading_needs_no_compiler(run: Path) -> None:
    """Weights that are drawn without memory import torch's compiler, which takes longer than all the rest."""
    script = (
        "import sys; from minillm import load; load(sys.argv[1]); print({'sympy', 'torch._inductor'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script, run], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr

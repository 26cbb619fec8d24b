"""`minillm train` as a person uses it: what it prints, what it takes, what it refuses and how."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.training import checkpoint
from minillm.training.checkpoint import manifest
from tests.training.running import (
    ENCODER,
    ENCODER_DECODER,
    ROOT,
    TINY,
    events,
    lines,
    losses,
    metrics,
    train,
    write_text,
)


def test_what_a_person_reads(capsys, text: Path, tmp_path: Path) -> None:
    """Plan with reasons, baselines, lines, and at the end the verdict, the report and what to do next."""
    run = tmp_path / "run"
    result = train(capsys, "--data", text, "--out", run, *TINY, "--steps", "5")
    assert result.code == 0
    config = json.loads((run / "config.json").read_text())
    corpus = config["corpus"]
    for part in (
        f"{sum(x.numel() for x in checkpoint.load_weights(checkpoint.resolve(run)).values()):,} parameters",
        "cpu, 1 threads, fp32",
        "kernels  torch (auto: no GPU (cpu))",
        "             attention  F.scaled_dot_product_attention\n",
        "MiB as an estimate, with 4 of 4 sequences at a time",
        f"{corpus['train_bytes']:,} bytes = {corpus['train_tokens']:,} tokens to train on",
        f"{corpus['val_bytes']:,} bytes held out by position",
        f"5 of 64 tokens = {320 / corpus['train_tokens']:.2f} epochs",
        "  time     ",
    ):
        assert part in result.err
    (found,) = events(run, "baselines")
    for name, words in (("unigram", "unigram"), ("gzip", "gzip -9"), ("xz", "xz -9")):
        assert f"{words} {found[name]:.3f}" in result.err
    for line in lines(run, "val"):
        assert f"loss {line['loss']:.4f}  {line['bits_per_byte']:.3f} bits/byte" in result.err
    assert f"report: {run / 'report.html'}" in result.out and "bits per byte on held-out text" in result.out
    assert len(re.findall(r"^  (?:minillm|python) ", result.out, re.MULTILINE)) == 3
    assert (run / "report.html").stat().st_size > 5000


def test_bits_per_byte_are_nats_over_bytes(capsys, tmp_path: Path) -> None:
    """Against a loop over windows written out: every token of the validation text but the first is a target, once."""
    import math

    import torch
    import torch.nn.functional as F

    from minillm import load
    from minillm.data.shards import open_shards

    text, run = write_text(tmp_path / "t.txt", sentences=40, seed=4), tmp_path / "run"
    assert train(capsys, "--data", text, "--out", run, *TINY, "--data.validation", "0.4", "--steps", "2").code == 0
    model, tokenizer = load(run)
    shards = open_shards(run / "data")
    ids = torch.tensor(shards.val.window(0, len(shards.val)).tolist())
    raw = text.read_bytes()
    held_out = raw[int(len(raw) * 0.6) :]
    assert b"".join(shards.val_text()) == held_out and ids.tolist() == tokenizer.encode(held_out.decode())
    total = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        with torch.no_grad():
            total += F.cross_entropy(model(window[None, :-1])[0].double(), window[1:], reduction="sum").item()
    line = lines(run, "val")[-1]
    assert line["targets"] == len(ids) - 1 > 32 * 16, "more than one batch of validation rows"
    assert line["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert line["bits_per_byte"] == pytest.approx(total / math.log(2) / len(held_out), rel=1e-5)
    (found,) = events(run, "baselines")
    assert (found["val_bytes"], found["val_targets"]) == (len(held_out), len(ids) - 1)
    info = shards.info
    for line in lines(run, "train"):
        per_byte = line["loss"] / math.log(2) * info["train_tokens"] / info["train_bytes"]
        assert line["bits_per_byte"] == pytest.approx(per_byte, rel=1e-12)


def test_validation_does_not_depend_on_its_batches(capsys, text: Path, tmp_path: Path, monkeypatch) -> None:
    for model, name in ((TINY, "next"), (ENCODER, "masked"), (ENCODER_DECODER, "span")):
        found = []
        for rows in (32, 5):
            monkeypatch.setattr("minillm.training.pretrain.VALIDATION_ROWS", rows)
            run = tmp_path / f"{name}-{rows}"
            assert train(capsys, "--data", text, "--out", run, *model, "--steps", "1").code == 0
            found.append(lines(run, "val"))
        for a, b in zip(*found, strict=True):
            assert a["targets"] == b["targets"] and a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "muon"])
def test_each_optimizer_learns(capsys, text: Path, tmp_path: Path, optimizer: str) -> None:
    rate = ["--optim.lr", "0.1"] if optimizer == "sgd" else ["--optim.lr", "0.01"]
    argv = ["--data", text, "--out", tmp_path / "run", *TINY, "--steps", "30", "--optim.name", optimizer, *rate]
    assert train(capsys, *argv).code == 0
    first, last = (lines(tmp_path / "run", "val")[i]["loss"] for i in (0, -1))
    assert last < first - 1


@pytest.mark.parametrize("model", [ENCODER, ENCODER_DECODER], ids=["masked", "span"])
def test_encoders_and_encoder_decoders_learn(capsys, text: Path, tmp_path: Path, model: list[str]) -> None:
    run = tmp_path / "run"
    result = train(capsys, "--data", text, "--out", run, *model, "--optim.lr", "0.01", "--steps", "30")
    assert result.code == 0
    scored = lines(run, "val")
    assert scored[-1]["loss"] < scored[0]["loss"] - 0.5 and scored[0]["bits_per_byte"] is None
    assert [event["step"] for event in events(run, "sample")] == [0, 8, 30]
    assert all("⟦" in event["text"] for event in events(run, "sample"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_trains_like_fp32(capsys, text: Path, tmp_path: Path, dtype: str) -> None:
    ends = {}
    for name in ("fp32", dtype):
        argv = ["--data", text, "--out", tmp_path / name, *TINY, "--steps", "20", "--optim.lr", "0.01", "--dtype", name]
        assert train(capsys, *argv).code == 0
        ends[name] = lines(tmp_path / name, "val")
    assert ends[dtype][-1]["loss"] == pytest.approx(ends["fp32"][-1]["loss"], rel=0.03)
    assert ends[dtype][0]["loss"] != ends["fp32"][0]["loss"], "the products ran in another type"


def test_minutes_become_steps(capsys, text: Path, tmp_path: Path, monkeypatch) -> None:
    """Steps of 0.2 s: what six seconds leave after three samples and six validations, or one where they are dear."""
    for for_row, validations in ((0.001, 6), (0.04, 1)):
        monkeypatch.setattr("minillm.training.plan.measure", lambda *_, for_row=for_row, **__: (0.2, for_row))
        run = tmp_path / f"run-{validations}"
        assert train(capsys, "--data", text, "--out", run, *TINY, "--minutes", "0.1").code == 0
        config = json.loads((run / "config.json").read_text())
        rows = -(-config["corpus"]["val_tokens"] // 16)
        left = 6 - 3 * config["plan"]["seconds_per_sample"] - validations * rows * for_row
        assert config["plan"]["steps"] == int(left / 0.2) > 2 and config["plan"]["seconds_per_sample"] > 0
        assert len(lines(run, "val")) == validations
        assert config["plan"]["save_every"] == -(-config["plan"]["steps"] // 5)
        assert config["settings"]["minutes"] == 0.1 and config["settings"]["steps"] is None
    monkeypatch.setattr("minillm.training.plan.measure", lambda *_, **__: (0.2, 0.01))
    often = tmp_path / "often"
    argv = ["--data", text, "--out", often, *TINY, "--minutes", "0.1", "--train.eval-every", "2"]
    assert train(capsys, *argv).code == 0
    steps = json.loads((often / "config.json").read_text())["plan"]["steps"]
    validations = 1 + -(-steps // 2)
    assert steps * 0.2 + validations * rows * 0.01 <= 6 < (steps + 2) * 0.2 + (validations + 1) * rows * 0.01


def test_preset_then_config_then_command_line(capsys, text: Path, tmp_path: Path) -> None:
    toml, text_json = tmp_path / "a.toml", tmp_path / "a.json"
    toml.write_text("steps = 2\nseed = 5\n[optim]\nlr = 0.5\nclip = 0.25\n[model]\nsoftcap = 9\n")
    text_json.write_text('{"steps": 2, "seed": 5, "optim": {"lr": 0.5, "clip": 0.25}, "model": {"softcap": 9}}')
    found = []
    for path in (toml, text_json):
        run = tmp_path / path.suffix
        argv = ["--data", text, "--out", run, "--config", path, *TINY, "--optim.lr", "0.02", "--model.no-tied"]
        assert train(capsys, *argv).code == 0
        settings = json.loads((run / "config.json").read_text())["settings"]
        assert (settings["steps"], settings["seed"], settings["model"]["softcap"]) == (2, 5, 9.0)
        assert (settings["optim"]["lr"], settings["optim"]["clip"]) == (0.02, 0.25)
        assert settings["model"]["tied"] is False and settings["model"]["attention"]["qk_norm"] is True
        found.append(losses(run))
    assert found[0] == found[1]


def test_options_of_a_tokenizer_that_is_not_trained_are_said_to_be_unread(capsys, text: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    result = train(capsys, "--data", text, "--out", first, *TINY, "--steps", "1")
    assert result.code == 0 and "is not read" not in result.err
    more = ["--tokenizer.path", first / "tokenizer", "--tokenizer.vocab-size=999"]
    result = train(capsys, "--data", text, "--out", second, *TINY, "--steps", "1", *more)
    assert result.code == 0 and result.err.count("note: --tokenizer.vocab-size is not read: there is a") == 1
    vocabularies = [json.loads((run / "config.json").read_text())["settings"]["model"] for run in (first, second)]
    assert vocabularies[0]["vocab_size"] == vocabularies[1]["vocab_size"]


def one_line(result, *parts: str, code: int = 2) -> None:
    assert result.code == code, result.err
    assert result.err.count("\n") == 1 and result.err.startswith("error: ") and result.out == ""
    for part in parts:
        assert part in result.err


@pytest.mark.parametrize(
    "content, argv, parts",
    [
        (b"", [], ["text.txt is empty; give a file with text"]),
        (b"caf\xe9 au lait", [], ["text.txt is not UTF-8: byte 0xE9 at offset 3", "iconv"]),
        (None, ["--data", "nowhere.txt"], ["nowhere.txt does not exist; give a file, a folder"]),
        (None, ["--preset", "lama-tiny"], ["unknown preset lama-tiny; did you mean llama-tiny?"]),
        (None, ["--minutes", "1"], ["--steps and --minutes contradict each other"]),
        (None, ["--log", "mlflow"], ["--log mlflow: there are tb, wandb"]),
        (None, ["--config", "nowhere.toml"], ["--config nowhere.toml: there is no such file"]),
        (None, ["--device", "cuda"], ["--device cuda: this machine has none", "--device auto"]),
    ],
    ids=lambda value: str(value[-1])[:20] if isinstance(value, list) and value else None,
)
def test_refused_at_once(capsys, text: Path, tmp_path: Path, content, argv, parts) -> None:
    """One line, exit code 2, and no folder of a run."""
    own = tmp_path / "text.txt"
    own.write_bytes(text.read_bytes() if content is None else content)
    base = [arg for arg in TINY if "--preset" not in argv or arg not in TINY[:2]]
    result = train(capsys, "--data", own, "--out", tmp_path / "run", "--steps", "2", *base, *argv)
    one_line(result, *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, argv, parts",
    [
        (
            "the quick brown fox. " * 9,
            ["--model.context", "4000"],
            ["text.txt: the training text has", "fewer than one sample", "smaller --model.context"],
        ),
        ("the quick brown fox. " * 40, ["--tokenizer.vocab-size", "5000"], ["text.txt: ", "--tokenizer.vocab-size"]),
        ("the quick brown fox. " * 99, ["--model.vocab-size", "100"], ["model.vocab_size (100) is smaller than"]),
        ("abc\n" * 500, ["--tokenizer.type", "char", "--train.sample-prompt", "Ü"], ["train.sample_prompt 'Ü'"]),
    ],
    ids=["short", "vocabulary", "model", "prompt"],
)
def test_refused_before_training_leaves_nothing_behind(capsys, tmp_path: Path, content, argv, parts) -> None:
    own, run = tmp_path / "text.txt", tmp_path / "run"
    own.write_text(content)
    result = train(capsys, "--data", own, "--out", run, "--steps", "2", *TINY, *argv)
    assert result.code == 2 and "Traceback" not in result.err
    for part in parts:
        assert part in result.err.splitlines()[-1]
    assert not run.exists()


def test_where_it_cannot_write(capsys, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text('{"not": "a run"}')
    (mine / "data").mkdir()
    for out, part in [
        (file, f"--out {file} is a file; name a folder"),
        (file / "run", f"cannot write to {file / 'run'}: Not a directory; name another folder with --out"),
        (mine, f"{mine} is not empty and holds no run"),
    ]:
        one_line(train(capsys, "--data", text, "--out", out, "--overwrite", *TINY, "--steps", "1"), part)
    assert file.read_text() == "mine" and sorted(p.name for p in mine.iterdir()) == ["config.json", "data"]


def test_a_folder_that_holds_a_run(capsys, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = ["--data", text, "--out", run, *TINY, "--steps", "1"]
    assert train(capsys, *argv).code == 0
    before = metrics(run)
    one_line(
        train(capsys, *argv), f"{run} already holds a run; --resume {run} goes on with it, --overwrite replaces it"
    )
    assert metrics(run) == before
    one_line(train(capsys, *argv, "--overwrite", "--device", "cuda"), "this machine has none")
    assert metrics(run) == before, "what is refused replaces nothing"
    assert train(capsys, *argv, "--overwrite", "--seed", "9").code == 0
    assert losses(run) != [(x["split"], x["step"], x["loss"], x["targets"]) for x in before if "split" in x]
    (run / "config.json").unlink()
    one_line(train(capsys, *argv), f"{run} holds a run without its config.json; put it back, or --overwrite replaces")
    assert (
        train(capsys, *argv, "--overwrite").code == 0
        and losses(run)[:1] == [(x["split"], x["step"], x["loss"], x["targets"]) for x in before if "split" in x][:1]
    )


def test_the_parser_names_what_it_does_not_know(capsys, text: Path, tmp_path: Path) -> None:
    result = train(capsys, "--data", text, "--out", tmp_path / "run", *TINY, "--optim.learning-rate", "1")
    assert result.code == 2 and "--optim.learning-rate" in result.err and "Traceback" not in result.err
    result = train(capsys, "--data", text, "--out", tmp_path / "run", *TINY, "--steps", "0")
    assert result.code == 2 and "steps must be at least 1, not 0" in result.err and "Traceback" not in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("a.toml", "steps = ", "a.toml is no TOML"),
        ("a.json", '{"steps": ', "a.json is no JSON"),
        ("a.json", "[1]", "a.json must be a table of settings"),
        ("a.toml", "[optim]\nlearning = 1", "a.toml: unknown setting optim.learning"),
        ("a.toml", "[model]\nlayer = 1", "unknown setting model.layer; did you mean model.layers?"),
        ("a.toml", '[optim]\nlr = "high"', "a.toml: optim.lr must be of type float, not 'high'"),
        ("a.toml", "preset = 5", "preset must be the name of one, not 5"),
        ("a.toml", "steps = 5\nminutes = 5", "steps and minutes contradict each other"),
    ],
)
def test_a_broken_config_file(capsys, text: Path, tmp_path: Path, name: str, content: str, part: str) -> None:
    (tmp_path / name).write_text(content)
    one_line(train(capsys, "--data", text, "--out", tmp_path / "run", "--config", tmp_path / name), part)
    assert not (tmp_path / "run").exists()


def test_triton_without_a_gpu_or_the_interpreter(text: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    argv = ["--data", text, "--out", tmp_path / "run", *TINY, "--kernels", "triton"]
    result = subprocess.run(
        [sys.executable, "train.py", *map(str, argv)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "error: kernels=triton needs a GPU" in result.stderr and not (tmp_path / "run").exists()


def test_a_full_disk_keeps_the_former_checkpoints(capsys, text: Path, tmp_path: Path, monkeypatch) -> None:
    run, real, calls = tmp_path / "run", manifest.write, []

    def full(*args):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    argv = [*TINY, "--steps", "8", "--train.save-every", "2"]
    monkeypatch.setattr(manifest, "write", full)
    result = train(capsys, "--data", text, "--out", run, *argv)
    error = result.err.splitlines()[-1]
    assert result.code == 2 and error.startswith("error: a checkpoint needs") and "the disk is full" in error
    assert checkpoint.steps(run) == [2, 4] and checkpoint.resolve(run).name == "step-4"
    assert not list((run / "checkpoints").glob("*.tmp"))
    assert train(capsys, "--resume", run).code == 0
    whole = tmp_path / "whole"
    assert train(capsys, "--data", text, "--out", whole, *argv).code == 0
    assert losses(run) == losses(whole)


def test_compile_falls_back_with_one_warning(capsys, text: Path, tmp_path: Path, monkeypatch) -> None:
    def none(function, **options):
        def broken(*_):
            raise RuntimeError("Failed to find C compiler.\nmore lines")

        return broken

    monkeypatch.setattr("torch.compile", none)
    argv = ["--data", text, *TINY, "--steps", "4"]
    result = train(capsys, *argv, "--out", tmp_path / "on", "--compile", "on")
    assert result.code == 0 and result.err.count("warning: torch.compile does not work here (Failed to find C") == 1
    assert json.loads((tmp_path / "on" / "config.json").read_text())["plan"]["compile"] is False
    assert train(capsys, *argv, "--out", tmp_path / "off").code == 0
    assert losses(tmp_path / "on") == losses(tmp_path / "off")


@pytest.mark.prove
@pytest.mark.filterwarnings("ignore")
def test_compiled_is_eager(capsys, text: Path, tmp_path: Path) -> None:
    argv = ["--data", text, *TINY, "--steps", "20"]
    for choice in ("on", "off"):
        result = train(capsys, *argv, "--out", tmp_path / choice, "--compile", choice)
        assert result.code == 0 and "warning" not in result.err
    assert json.loads((tmp_path / "on" / "config.json").read_text())["plan"]["compile"] is True
    for a, b in zip(losses(tmp_path / "on"), losses(tmp_path / "off"), strict=True):
        assert a[2] == pytest.approx(b[2], rel=1e-4)

"""Finetuning where it is less usual: several labels at once, pairs, a model of another house, forgotten data."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.loading import open_model
from minillm.training.verdict import next_commands
from tests.finetuning import COLOURS, FAST, base, classify_file, lines, minillm, records
from tests.training.running import WORDS


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("more") / "encoder", "encoder", token_types=2)


def test_several_labels_at_once_each_with_its_threshold(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    for n in range(60):
        labels = [label for place, label in enumerate(COLOURS) if n >> place & 1]
        words = [COLOURS[label][n % 3] for label in labels]
        made.append({"text": " ".join(["the", *words, "is"]), "label": labels})
    data, run = lines(tmp_path / "data.jsonl", made), tmp_path / "run"
    argv = ["--task", "classify", "--data", data, "--out", run, "--steps", 120, *FAST, "--train.patience", 20]
    done = minillm(capsys, "finetune", encoder, *argv)
    assert done.code == 0, done.err
    model: Any = open_model(run).model
    assert ((model.threshold > 0) & (model.threshold < 1)).all()
    found = [json.loads(line) for line in minillm(capsys, "predict", run, "--input", data).out.splitlines()]
    right = [sorted(answer["label"]) == sorted(record["label"]) for answer, record in zip(found, made, strict=True)]
    assert sum(right) / len(right) > 0.6
    evaluated = json.loads(minillm(capsys, "evaluate", run, "--data", data, "--json").out)
    assert evaluated["accuracy"] == pytest.approx(sum(right) / len(right)) and evaluated["micro_f1"] > 0.75


def test_pairs_are_told_apart(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The label says which of the two texts holds the fox; both orders hold the same words."""
    texts = ("the fox is", "the rain is")
    made = [
        {"text": texts[n % 2], "text_pair": texts[1 - n % 2], "label": ("first", "second")[n % 2]} for n in range(40)
    ]
    data, run = lines(tmp_path / "data.jsonl", made), tmp_path / "run"
    argv = ["--task", "classify", "--data", data, "--out", run, "--steps", 80, *FAST, "--train.patience", 20]
    assert minillm(capsys, "finetune", encoder, *argv).code == 0
    assert json.loads(minillm(capsys, "evaluate", run, "--data", data, "--json").out)["accuracy"] == 1.0


def test_a_label_that_the_model_does_not_know_is_named_with_its_line(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = classify_file(tmp_path / "data.jsonl"), tmp_path / "run"
    argv = ["--task", "classify", "--data", data, "--out", run, "--steps", 2, *FAST]
    assert minillm(capsys, "finetune", encoder, *argv).code == 0
    other = lines(tmp_path / "other.jsonl", [{"text": "a", "label": "red"}, {"text": "b", "label": "green"}])
    done = minillm(capsys, "evaluate", run, "--data", other)
    assert done.code == 2 and f"{other}:2: the label 'green' is not one that the model knows" in done.err
    wrong = minillm(capsys, "evaluate", run, "--task", "tag", "--data", other)
    assert wrong.code == 2 and "was finetuned for classify" in wrong.err


def test_changed_data_is_no_way_to_go_on(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = classify_file(tmp_path / "data.jsonl"), tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    files = ["--data", data.name, "--val", data.name, "--test", data.name]
    argv = ["--task", "classify", *files, "--out", run, "--steps", 2, *FAST]
    assert minillm(capsys, "finetune", encoder, *argv).code == 0
    monkeypatch.chdir("/")
    assert minillm(capsys, "finetune", "--resume", run, "--steps", 3).code == 0
    assert minillm(capsys, "finetune", "--resume", run).code == 0  # finished: nothing is left to do
    data.write_text(data.read_text().replace("fox", "dog"))
    done = minillm(capsys, "finetune", "--resume", run, "--steps", 4)
    assert done.code == 2 and "have changed since the run began" in done.err


@pytest.mark.parametrize(("task", "name"), [("classify", "accuracy"), ("tag", "entity_f1"), ("span-qa", "f1")])
def test_a_bert_in_hugging_faces_format_learns_a_task(
    task: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its WordPieces know where in the text they stand; the run opens without the folder that it came from."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    shape = transformers.BertConfig(vocab_size=80, max_position_embeddings=48, **sizes)
    transformers.BertModel(shape).save_pretrained(tmp_path / "bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *sorted({*WORDS, "is", "what", "it", "?"})]
    pieces.remove("hills")  # is then three pieces
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join([*pieces, "hi", "##ll", "##s"]) + "\n")
    data, run = lines(tmp_path / "data.jsonl", records(task)), tmp_path / "run"
    argv = ["--task", task, "--data", data, "--out", run, "--method", "lora", "--steps", 60, *FAST]
    done = minillm(capsys, "finetune", tmp_path / "bert", *argv, "--train.patience", 20)
    assert done.code == 0, done.err
    shutil.rmtree(tmp_path / "bert")
    assert json.loads(minillm(capsys, "evaluate", run, "--data", data, "--json").out)[name] >= 0.7


def test_what_to_do_next_names_commands_that_fit_a_finetuned_run() -> None:
    config = {"settings": {"preset": "chat-full"}, "task": {"name": "chat"}}
    broken = {"event": "nonfinite", "step": 1, "what": "loss", "layer": "head", "samples": [0]}

    def commands(last: dict[str, Any]) -> list[str]:
        return [command for command, _ in next_commands(Path("runs/a"), config, [last])]

    assert commands({"event": "end", "reason": "finished", "step": 4}) == [
        "minillm chat runs/a",
        "minillm predict runs/a --input FILE",
        "minillm evaluate runs/a --data FILE",
    ]
    assert commands({"event": "end", "reason": "signal", "step": 2})[0] == "minillm finetune --resume runs/a"
    assert commands(broken) == ["minillm doctor runs/a", "minillm plot runs/a"]


def test_the_default_data_takes_no_longer_than_it_may(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four epochs of 720 examples are 720 steps; --epochs, and data of one's own, are run to their end."""
    monkeypatch.setattr("minillm.commands.finetuning.DEFAULT_MINUTES", 0.01)
    data, steps = classify_file(tmp_path / "data.jsonl", 800), {}
    cases = [("cut", True, []), ("asked", True, ["--epochs", 0.05]), ("steps", True, ["--steps", 9])]
    for name, default, more in [*cases, ("own", False, ["--steps", 9])]:
        monkeypatch.setattr("minillm.commands.finetuning.is_default", lambda source, default=default: default)
        argv = ["--task", "classify", "--data", data, "--out", tmp_path / name, *FAST, *more]
        done = minillm(capsys, "finetune", encoder, *argv)
        assert done.code == 0 and ("4 epochs would take" in done.err) == (name == "cut")
        steps[name] = json.loads((tmp_path / name / "config.json").read_text())["plan"]["steps"]
    assert steps["cut"] < 300 and steps["asked"] == steps["steps"] == steps["own"] == 9

"""`minillm finetune … --test FILE`: examples that nothing is chosen by, scored once with the best weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.commands import comparing, series
from minillm.config import UserError
from minillm.data.records import Record
from minillm.loading import load
from minillm.tasks.catalogue import TASKS
from minillm.tasks.division import divide, remarks
from tests.finetuning import FAST, base, classify_file, lines, minillm, records
from tests.test_comparing import Here
from tests.training.running import events
from tests.training.running import lines as metric_lines


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("split") / "encoder", "encoder")


def held_out(path: Path, count: int = 15, wrong: int = 5) -> Path:
    """Texts that no training example has; the last few with the other label, so that nobody is right on all."""
    made = [{"text": f"again {r['text']}", "label": r["label"]} for r in records("classify", count)]
    for record in made[count - wrong :]:
        record["label"] = {"red": "blue", "blue": "red"}[record["label"]]
    return lines(path, made)


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def test_the_test_file_is_what_the_figures_are_of_and_chooses_nothing(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, test = classify_file(tmp_path / "data.jsonl"), held_out(tmp_path / "test.jsonl")
    argv = ["--task", "classify", "--data", data, "--steps", 30, *FAST, "--train.eval-every", 10]
    done = minillm(capsys, "finetune", encoder, *argv, "--test", test, "--out", tmp_path / "run")
    assert done.code == 0 and "36 examples to train on, 4 to validate, 15 to test in the end\n" in done.err
    found = result(tmp_path / "run")
    words = f"on the 15 test examples of {test}, which nothing was chosen by"
    assert found["scored_on"] == {"part": "test", "source": str(test), "examples": 15, "words": words}
    assert f"; {words}:\n" in done.out

    scored = json.loads(minillm(capsys, "evaluate", tmp_path / "run", "--data", test, "--json").out)
    assert found["metrics"]["loss"] == pytest.approx(scored["loss"], rel=1e-4)
    for name in ("accuracy", "macro_f1"):
        assert found["metrics"][name] == scored[name] < 1.0
    assert metric_lines(tmp_path / "run", "val")[-1]["macro_f1"] == 1.0  # what would have been said without
    labels = [json.loads(line)["label"] for line in test.read_text().splitlines()]
    share = labels.count("red") / 15
    assert events(tmp_path / "run", "baselines")[0]["accuracy"] in (pytest.approx(share), pytest.approx(1 - share))
    against = found["against"]
    assert against["value"] == scored["macro_f1"] and f"macro f1 {against['trivial']:.4f}) by" in done.out
    report = (tmp_path / "run" / "report.html").read_text()
    assert f"With its best weights, {words}: loss " in report and f"macro f1 {scored['macro_f1']:.4f}" in report
    assert "It beats the trivial answer" in report

    assert minillm(capsys, "finetune", encoder, *argv, "--out", tmp_path / "without").code == 0
    assert result(tmp_path / "without")["scored_on"]["part"] == "validation"
    assert [(line["loss"], line["macro_f1"]) for line in metric_lines(tmp_path / "run", "val")] == [
        (line["loss"], line["macro_f1"]) for line in metric_lines(tmp_path / "without", "val")
    ]
    weights, others = (load(tmp_path / name)[0].state_dict() for name in ("run", "without"))
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_where_nothing_is_trivial_the_model_as_it_was_is_scored_on_the_test_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = base(tmp_path / "decoder")
    data = lines(tmp_path / "data.jsonl", records("chat"))
    test = lines(tmp_path / "test.jsonl", [*records("chat", 3), {"instruction": "rain", "output": "jumps over hills"}])
    argv = ["--task", "chat", "--data", data, "--test", test, "--steps", 4, *FAST, "--out", tmp_path / "run"]
    done = minillm(capsys, "finetune", decoder, *argv)
    before = json.loads(minillm(capsys, "evaluate", decoder, "--task", "chat", "--data", test, "--json").out)
    against = result(tmp_path / "run")["against"]
    assert against["what"] == "the model as it was" and against["trivial"] == pytest.approx(before["loss"], rel=1e-4)
    assert metric_lines(tmp_path / "run", "val")[0]["loss"] != pytest.approx(before["loss"], rel=1e-3)
    assert against["value"] == result(tmp_path / "run")["metrics"]["loss"]
    assert f"to beat   the model as it was: loss {against['trivial']:.4f}\n" in done.err
    assert "warning: 3 of 4 test examples stand in the training or validation data too: their figures" in done.err


def test_going_on_keeps_the_test_file_and_notices_another(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, test, run = classify_file(tmp_path / "data.jsonl"), held_out(tmp_path / "test.jsonl"), tmp_path / "run"
    argv = ["--task", "classify", "--data", data, "--test", test, "--out", run, "--steps", 2, *FAST]
    assert minillm(capsys, "finetune", encoder, *argv).code == 0
    more = minillm(capsys, "finetune", "--resume", run, "--steps", 4)
    assert more.code == 0 and result(run)["scored_on"]["examples"] == 15 and "test examples of" in more.out
    assert "note: the test examples were scored before" in more.err and len(events(run, "baselines")) == 1

    kept = test.read_text()
    for change in (kept.replace("fox", "dog"), kept.replace("red", "blue", 1), "".join(kept.splitlines(True)[1:])):
        test.write_text(change)
        done = minillm(capsys, "finetune", "--resume", run, "--steps", 6)
        assert done.code == 2 and f"the examples of {test} have changed since the run began" in done.err
    test.unlink()
    done = minillm(capsys, "finetune", "--resume", run, "--steps", 6)
    assert done.code == 2 and f"{test} does not exist" in done.err
    test.write_text(kept)
    data.write_text(data.read_text().replace("fox", "dog"))
    done = minillm(capsys, "finetune", "--resume", run, "--steps", 6)
    assert done.code == 2 and f"the examples of {data} have changed since the run began" in done.err


def test_what_is_wrong_with_a_test_file_is_said_before_there_is_a_run(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, test = classify_file(tmp_path / "data.jsonl"), held_out(tmp_path / "test.jsonl")
    green = lines(tmp_path / "green.jsonl", [{"text": "a", "label": "red"}, {"text": "b", "label": "green"}])
    common = ["--task", "classify", "--data", data, "--out", tmp_path / "run", *FAST]
    for wrong, words in (
        (["--test", test, "--folds", 3], "--test goes without --folds and --fold"),
        (["--test", test, "--fold", "1/3"], "--test goes without --folds and --fold"),
        (["--test", tmp_path / "no.jsonl"], "no.jsonl does not exist"),
        (["--test", green], f"{green}:2: the label 'green' never occurs in the training data"),
        (["--test", green, "--val", test], f"{green}:2: the label 'green' never occurs in the training data"),
    ):
        done = minillm(capsys, "finetune", encoder, *common, *wrong)
        assert done.code == 2 and words in done.err and done.err.count("error: ") == 1, done.err
        assert not (tmp_path / "run").exists()


def test_test_examples_that_say_nothing_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder, data = base(tmp_path / "decoder"), lines(tmp_path / "data.jsonl", records("preference"))
    alike = lines(tmp_path / "alike.jsonl", [{"prompt": "the", "chosen": "fox", "rejected": "fox"}])
    argv = ["--task", "preference", "--data", data, "--out", tmp_path / "run", "--steps", 2, *FAST]
    done = minillm(capsys, "finetune", decoder, *argv, "--test", alike)
    assert done.code == 2 and f"{alike}: chosen and rejected are equal in every pair" in done.err
    assert "validation" not in done.err and not (tmp_path / "run").exists()


def test_every_method_is_scored_on_the_test_file(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "get_args", lambda method: ("freeze",))
    monkeypatch.setattr(series.subprocess, "Popen", Here)
    Here.codes, Here.begun = {}, []
    data, test = classify_file(tmp_path / "data.jsonl"), held_out(tmp_path / "test.jsonl")
    argv = ["--task", "classify", "--data", data, "--test", test, "--method", "all", "--steps", 1, *FAST]
    done = minillm(capsys, "finetune", encoder, *argv, "--out", tmp_path / "all")
    assert done.code == 0 and f"\nMeasured on the 15 test examples of {test}, which nothing was chosen by" in done.out
    for name in ("from-scratch", "freeze"):
        assert result(tmp_path / "all" / name)["scored_on"]["part"] == "test"


def test_what_the_parts_share_is_counted() -> None:
    task = TASKS["classify"]()

    def examples(*texts: str) -> list[Any]:
        return task.examples(
            [Record(f"f.jsonl:{n}", {"text": t, "label": "ab"[n % 2]}) for n, t in enumerate(texts, 1)]
        )

    parts = divide(task, examples("a", "b", "c"), seed=1, val=examples("c", "d"), test=examples("d", "b", "b", "e"))
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [3, 2, 4]
    assert list(remarks(task, parts)) == [
        "warning: 1 of 2 validation examples stand in the training data too: their figures flatter",
        "warning: 3 of 4 test examples stand in the training or validation data too: their figures flatter",
    ]
    other = task.examples([Record("t.jsonl:9", {"text": "x", "label": "z"})])
    for given in ({"val": other}, {"test": other}):
        with pytest.raises(UserError, match=r"t\.jsonl:9: the label 'z' never occurs in the training data"):
            divide(task, examples(*map(str, range(20))), seed=1, **given)

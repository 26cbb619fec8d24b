"""What is held out chooses nothing: how examples are divided, what is learnt from which part, and `--folds`."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from minillm.commands import series
from minillm.commands.folding import parse_fold, runs, summary
from minillm.config import UserError
from minillm.data.records import Record
from minillm.loading import open_model
from minillm.tasks.catalogue import TASKS
from minillm.tasks.division import divide, remarks
from tests.finetuning import FAST, base, classify_file, lines, minillm, records
from tests.test_comparing import Here
from tests.training.running import events
from tests.training.running import lines as metric_lines


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("folding") / "encoder", "encoder")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> type[Here]:
    monkeypatch.setattr(series.subprocess, "Popen", Here)
    Here.codes, Here.begun = {}, []
    return Here


def examples(task: Any, rows: list[dict[str, Any]]) -> list[Any]:
    return task.examples([Record(f"f.jsonl:{n}", row) for n, row in enumerate(rows, 1)])


def test_folds_hold_out_everything_once_and_the_rest_is_divided_again() -> None:
    task = TASKS["classify"]()
    found = examples(task, [{"text": f"t {n}", "label": "ab"[n % 4 == 0]} for n in range(60)])
    held: list[str] = []
    for k in range(1, 6):
        parts = divide(task, found, seed=3, fold=(k, 5))
        texts = [[example.text for example in part] for part in (parts.train, parts.val, parts.test)]
        assert sorted(text for part in texts for text in part) == sorted(example.text for example in found)
        assert list(map(len, texts)) == [43, 5, 12]
        assert sum(e.label == ("b",) for e in parts.test) == 3
        held += texts[2]
    assert len(set(held)) == 60
    assert divide(task, found, seed=3, fold=(1, 5)) == divide(task, found, seed=3, fold=(1, 5))
    assert divide(task, found, seed=4).val != divide(task, found, seed=3).val


def test_equal_inputs_are_on_one_side_where_enough_of_them_differ() -> None:
    task = TASKS["classify"]()
    found = examples(task, [{"text": f"t {n % 100}", "label": "ab"[n % 2]} for n in range(150)])
    parts = divide(task, found, seed=1)
    assert not {e.text for e in parts.train} & {e.text for e in parts.val} and len(parts.val) >= 10
    assert not list(remarks(task, parts))
    few = divide(task, examples(task, [{"text": f"t {n % 6}", "label": "ab"[n % 2]} for n in range(60)]), seed=1)
    assert len(few.val) == 6
    assert list(remarks(task, few)) == [
        "warning: 6 of 6 validation examples stand in the training data too: their figures flatter"
    ]


@pytest.mark.parametrize("lists", [False, True])
def test_a_label_that_one_example_has_is_learnt_and_said_to_be_unmeasured(lists: bool) -> None:
    task = TASKS["classify"]()
    names = ["ab"[n % 2] for n in range(40)] + [f"rare{n}" for n in range(12)]
    found = examples(task, [{"text": f"t {n}", "label": [name] if lists else name} for n, name in enumerate(names)])
    for k in range(1, 5):
        parts = divide(task, found, seed=2, fold=(k, 4))
        task.fit(parts.train)
        assert set(task.labels.names) == set(names)
    told = list(remarks(task, parts))
    assert told[0].startswith("note: no validation example has rare0, rare1, rare10")
    assert " and 4 more: nothing" in told[0]
    assert told[1].startswith("note: no test example has rare0")


def test_tags_that_one_sentence_has_are_learnt() -> None:
    task = TASKS["tag"]()
    rows = [{"tokens": [f"w{n}", "x"], "tags": ["B-A", "O"]} for n in range(30)]
    rows += [{"tokens": [f"v{n}", "x"], "tags": [f"B-R{n}", f"I-R{n}"]} for n in range(10)]
    for seed in range(5):
        parts = divide(task, examples(task, rows), seed=seed)
        assert {tag for e in parts.val for tag in e.tags} == {"B-A", "O"}


def test_nothing_left_to_hold_out_is_refused() -> None:
    task = TASKS["classify"]()
    found = examples(task, [{"text": f"t {n}", "label": f"only {n}"} for n in range(12)])
    with pytest.raises(UserError, match=r"f\.jsonl: 12 examples cannot be divided so that every label occurs"):
        divide(task, found, seed=1)
    with pytest.raises(UserError, match=r"f\.jsonl: one example cannot be divided"):
        divide(task, found[:1], seed=1)


def test_a_label_of_one_example_does_not_keep_few_from_being_divided() -> None:
    """Where it would be the one held out, another is."""
    task = TASKS["classify"]()
    found = examples(task, [{"text": f"t {n}", "label": "rare" if n == 3 else "often"} for n in range(10)])
    held = []
    for seed in range(30):
        parts = divide(task, found, seed=seed)
        assert len(parts.train) == 9 and {e.label for e in parts.val} == {("often",)}
        held += parts.val
    assert len({e.text for e in held}) > 5


def test_the_scale_is_that_of_the_training_part(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One label is far away: with the seed that holds it out, it must not be in the mean."""
    task = TASKS["regress"]()
    rows = [{"text": f"the {n} fox", "label": 1000.0 if n == 7 else float(n % 3)} for n in range(20)]
    seed = next(s for s in range(99) if 1000.0 in [e.label for e in divide(task, examples(task, rows), seed=s).val])
    argv = ["--task", "regress", "--data", lines(tmp_path / "d.jsonl", rows), "--seed", seed, "--steps", 1, *FAST]
    assert minillm(capsys, "finetune", encoder, *argv, "--out", tmp_path / "run").code == 0
    info = json.loads((tmp_path / "run" / "config.json").read_text())["task"]["info"]
    assert 0.5 < info["mean"] < 1.5 and 0 < info["std"] < 1


def test_counts_are_those_of_training_and_validation_shows_the_metric(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = classify_file(tmp_path / "data.jsonl"), tmp_path / "run"
    argv = ["--task", "classify", "--data", data, "--steps", 8, *FAST, "--train.eval-every", 4, "--train.patience", 9]
    done = minillm(capsys, "finetune", encoder, *argv, "--out", run)
    assert json.loads((run / "config.json").read_text())["task"]["info"]["counts"] == [18, 18]
    for line in metric_lines(run, "val"):
        shown = f"{line['step']:>6}/8  loss {line['loss']:.4f}  macro f1 {line['macro_f1']:.4f}\n"
        assert f"validation {shown}" in done.err
    best = min(metric_lines(run, "val"), key=lambda line: (-line["macro_f1"], line["step"]))
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    assert metrics["loss"] == pytest.approx(best["loss"], rel=1e-6) and metrics["macro_f1"] == best["macro_f1"]


def test_a_validation_label_that_training_lacks_is_named_with_its_line(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = lines(tmp_path / "val.jsonl", [{"text": "a", "label": "red"}, {"text": "b", "label": "green"}])
    argv = ["--task", "classify", "--data", classify_file(tmp_path / "data.jsonl"), "--val", val, *FAST]
    done = minillm(capsys, "finetune", encoder, *argv, "--out", tmp_path / "run")
    assert done.code == 2 and f"{val}:2: the label 'green' never occurs in the training data" in done.err


def test_folds_give_mean_and_deviation_and_go_on_where_they_were_stopped(
    encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    here: type[Here],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, out = classify_file(tmp_path / "data.jsonl"), tmp_path / "cv"
    monkeypatch.chdir(tmp_path)
    argv = ["--task", "classify", "--data", data.name, "--folds", 3, "--out", out, "--steps", 6, *FAST]
    here.codes = {"fold-2": 143}
    stopped = minillm(capsys, "finetune", encoder, *argv)
    assert stopped.code == 143 and f"minillm finetune --resume {out}" in stopped.err
    here.codes, here.begun = {}, []
    monkeypatch.chdir("/")
    done = minillm(capsys, "finetune", "--resume", out)
    assert done.code == 0 and [Path(command[-1]).name for command in here.begun] == ["fold-2", "fold-3"]

    found = json.loads((out / "folds.json").read_text())["summary"]
    results = [json.loads((out / f"fold-{k}" / "result.json").read_text())["metrics"] for k in (1, 2, 3)]
    for name in ("loss", "accuracy", "macro_f1"):
        values = [result[name] for result in results]
        assert found[name]["values"] == values
        assert found[name]["mean"] == pytest.approx(sum(values) / 3)
        assert found[name]["std"] == pytest.approx(statistics.stdev(values))
        assert f"  {name:<22}{found[name]['mean']:.4f} ± {found[name]['std']:.4f}\n" in done.out

    task = TASKS["classify"]()
    all_of_them = task.examples([Record("d:1", record) for record in records("classify")])
    test = divide(task, all_of_them, seed=1, fold=(2, 3)).test
    part = lines(tmp_path / "part.jsonl", [{"text": e.text, "label": e.names[0]} for e in test])
    scored = json.loads(minillm(capsys, "evaluate", out / "fold-2", "--data", part, "--json").out)
    assert scored["examples"] == len(test) in (13, 14)
    assert {name: scored[name] for name in results[1] if name in ("accuracy", "macro_f1")} == {
        name: results[1][name] for name in ("accuracy", "macro_f1")
    }
    assert scored["loss"] == pytest.approx(results[1]["loss"], rel=1e-4)
    best = max(sum(e.names == (colour,) for e in test) for colour in ("red", "blue")) / len(test)
    assert events(out / "fold-2", "baselines")[0]["accuracy"] in (pytest.approx(best), pytest.approx(1 - best))


def test_what_is_wrong_with_all_folds_is_said_once_and_leaves_nothing(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], here: type[Here]
) -> None:
    common = ["--task", "classify", "--data", classify_file(tmp_path / "data.jsonl"), "--out", tmp_path / "cv"]
    for wrong, words in (
        (["--folds", 1], "--folds must be at least 2, not 1"),
        (["--folds", 3, "--method", "all"], "--folds goes with one --method"),
        (["--folds", 99, *FAST], "99 folds of 40 examples cannot be made"),
        (["--fold", "6/5"], "--fold 6/5: write which fold of how many"),
        (["--balance", "--class-weights", "on"], "would make up for rare classes twice"),
    ):
        done = minillm(capsys, "finetune", encoder, *common, *wrong)
        assert done.code == 2 and words in done.err and done.err.count("error: ") == 1, done.err
        assert not (tmp_path / "cv").exists()


def test_a_fold_is_a_number_of_so_many() -> None:
    assert parse_fold("2/5") == {"number": 2, "of": 5} and parse_fold(None) is None
    for wrong in ("0/5", "6/5", "1/1", "2", "a/b", "-1/5"):
        with pytest.raises(UserError, match="--fold"):
            parse_fold(wrong)
    argv = ["m", "--folds", "2", "--overwrite", "--out=x", "--steps", "3"]
    assert runs({"argv": argv, "folds": 2})["fold-2"] == ["m", "--steps", "3", "--fold", "2/2"]
    one, two = {"metrics": {"a": 1.0, "b": None, "c": "x"}}, {"metrics": {"a": 2.0, "b": 1.0}}
    assert summary({"1": one, "2": two}) == {"a": {"mean": 1.5, "std": pytest.approx(0.5**0.5), "values": [1.0, 2.0]}}


@pytest.mark.parametrize("option", [["--balance"], ["--class-weights", "off"], ["--threshold", "off"], []])
def test_rare_classes_are_made_up_for_once(
    option: list[str], encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [r for n, r in enumerate(records("classify", 120)) if r["label"] == "red" or n % 10 == 1]
    data, run = lines(tmp_path / "data.jsonl", made), tmp_path / "run"
    argv = ["--task", "classify", "--data", data, "--out", run, "--steps", 2, *FAST, *option]
    done = minillm(capsys, "finetune", encoder, *argv)
    assert done.code == 0 and ("weights " in done.err) == (option in ([], ["--threshold", "off"]))
    threshold = open_model(run).model.threshold
    assert threshold.isnan().all().item() == (option == ["--threshold", "off"])
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    (found, missed), (false, _) = metrics["confusion"]  # blue comes first, and is the rare one
    assert metrics["rare_f1"] == pytest.approx(2 * found / max(1, 2 * found + missed + false))

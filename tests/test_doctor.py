"""The doctor names planted faults, and finds nothing in a healthy run."""

import json
import math

import pytest

from minillm import doctor, machine, presets
from minillm.commands import doctor as command
from minillm.config import DamagedFile, UserError, merge, to_dict
from minillm.training.pretrain import resolved
from tests.training.saving import save_example

V, STEPS = 4096, 100
PARTS = ("embedding", "decoder.blocks.0.attention", "decoder.blocks.0.mlp", "decoder.blocks.1.attention", "decoder")
BITS = math.log2(math.e) / 3.2  # bits per byte of a nat per token of 3.2 bytes


def healthy_metrics():
    """What a run of 100 steps writes whose loss falls from ln V to 3.5."""

    def loss(step):
        return 3.5 + (math.log(V) - 3.5) * math.exp(-step / 20)

    baselines = {"uniform_loss": math.log(V), "unigram_loss": 6.2, "bigram_loss": 3.74}
    baselines |= {"uniform": math.log(V) * BITS, "unigram": 6.2 * BITS, "bigram": 3.74 * BITS, "gzip": 1.93, "xz": 1.6}
    lines = [{"event": "baselines", **baselines, "val_bytes": 463047, "val_targets": 142802}]
    for step in range(0, STEPS + 1, 5):
        both = {"step": step, "tokens": 4096 * step, "seconds": 0.5 * step, "loss": loss(step)}
        both["bits_per_byte"] = both["loss"] * BITS
        if step:
            lines.append({**both, "split": "train", "lr": 1e-3, "grad_norm": 0.7, "tokens_per_second": 8000.0 + step})
            lines[-1] |= {"targets": 5 * 4096, "epoch": step / 1000}
        if step % 20 == 0:
            if step:
                norms, active = {part: 0.1 + step / 1000 for part in PARTS}, {"decoder.blocks.0.mlp": 0.97}
                lines.append({"event": "layers", "step": step, "grad_norms": norms, "active": active})
            lines.append({**both, "split": "val", "targets": 142802})
    end = {"step": STEPS, "seconds": 50.0, "reason": "finished", "best_step": STEPS, "best_loss": loss(STEPS)}
    return [*lines, {"event": "end", **end}]


def write_run(folder, metrics, **config):
    settings = {"preset": "default", "source": "stdlib", "model": {"vocab_size": V, "init": "normal"}}
    whole = merge({"format": 1, "settings": settings, "plan": {"steps": STEPS}, "versions": {}}, config)
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(whole))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


def lines_of(metrics, split):
    return [line for line in metrics if line.get("split") == split]


def kinds(run):
    return [problem.kind for problem in doctor.examine(run)]


def only(run, kind):
    """The message of the one problem that the run has."""
    problems = doctor.examine(run)
    assert [problem.kind for problem in problems] == [kind], problems
    return problems[0].message


def test_a_healthy_run_has_nothing(tmp_path, capsys):
    run = write_run(tmp_path, healthy_metrics())
    assert doctor.examine(run) == []
    assert command.main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run} is healthy\n"
    folder = save_example(run, 100)
    assert doctor.examine(run) == []
    folder.rename(folder.with_name("step-100.replaced"))  # where a kill between two renames left it
    assert doctor.examine(run) == []


@pytest.mark.parametrize("shift, cause", [(0.6, "start too large"), (-0.6, "sees its targets")])
def test_a_first_loss_far_from_uniform(tmp_path, shift, cause):
    metrics = healthy_metrics()
    lines_of(metrics, "val")[0]["loss"] += shift
    message = only(write_run(tmp_path, metrics), "first-loss")
    assert f"{math.log(V) + shift:.3f}" in message and "ln V = 8.318" in message and cause in message
    lines_of(metrics, "val")[0]["loss"] -= shift / 2  # 3.6 %: within what initialisations do
    assert kinds(write_run(tmp_path, metrics)) == []


def test_a_first_loss_of_a_run_without_a_first_validation(tmp_path):
    metrics = healthy_metrics()
    metrics.remove(lines_of(metrics, "val")[0])
    assert kinds(write_run(tmp_path, metrics)) == []  # step 5 is no untrained model any more
    lines_of(metrics, "train")[0] |= {"step": 1, "loss": math.log(V) - 0.6}
    message = only(write_run(tmp_path, metrics), "first-loss")
    assert f"the first training loss is {math.log(V) - 0.6:.3f}" in message and "sees its targets" in message
    lines_of(metrics, "train")[0]["loss"] += 0.3
    assert kinds(write_run(tmp_path, metrics)) == []


def test_a_first_loss_that_may_be_elsewhere(tmp_path):
    metrics = healthy_metrics()
    lines_of(metrics, "val")[0]["loss"] += 0.9
    assert kinds(write_run(tmp_path, metrics)) == ["first-loss"]
    assert kinds(write_run(tmp_path, metrics, settings={"model": {"init": "xavier"}})) == []
    lines_of(metrics, "val")[0]["loss"] = 3.0
    assert kinds(write_run(tmp_path, metrics, base="runs/other")) == []  # went on from a trained model


def test_never_below_the_unigram_baseline(tmp_path):
    metrics = healthy_metrics()
    for line in metrics:
        if line.get("step", 0) > 0 and "loss" in line:
            line["loss"] = 6.3
            line["bits_per_byte"] = 6.3 * BITS
    message = only(write_run(tmp_path, metrics), "no-learning")
    assert f"{6.2 * BITS:.3f} bits per byte" in message and f"{6.3 * BITS:.3f} in 100 steps" in message

    for line in metrics:  # as a masked-LM run: no bits per byte, no unigram baseline
        line["bits_per_byte"] = None
        line.pop("unigram_loss", None)
    assert kinds(write_run(tmp_path, metrics)) == []  # 6.3 is below 0.9 · ln 4096 = 7.49
    for line in metrics:
        if line.get("step", 0) > 0 and "loss" in line:
            line["loss"] = 7.6
    assert "90 % of ln V, 7.486" in only(write_run(tmp_path, metrics), "no-learning")


def test_a_rise_without_a_line_of_training_is_not_judged(tmp_path):
    metrics = [line for line in healthy_metrics() if line.get("split") != "train"]
    lines_of(metrics, "val")[-1]["bits_per_byte"] *= 1.2
    assert kinds(write_run(tmp_path, metrics)) == []


def test_a_run_that_has_only_begun_may_still_learn(tmp_path):
    metrics = [line for line in healthy_metrics() if line.get("step", 0) <= 20 and line.get("event") != "end"]
    lines_of(metrics, "val")[-1]["bits_per_byte"] = 3.0
    message = only(write_run(tmp_path, metrics), "unfinished")
    assert "step 20 of 100" in message and f"--resume {tmp_path}" in message


def test_nan_and_where_it_came_from(tmp_path):
    metrics = [line for line in healthy_metrics() if line.get("step", 0) <= 60]
    event = {"step": 61, "what": "gradient", "layer": "decoder.blocks.1.mlp", "samples": [960, 961]}
    run = write_run(tmp_path, [*metrics, {"event": "nonfinite", **event}])
    found = doctor.examine(run)
    assert [problem.kind for problem in found] == ["nonfinite", "unfinished"]
    for part in ("step 61", "gradient", "decoder.blocks.1.mlp", "960, 961"):
        assert part in found[0].message
    metrics = healthy_metrics()
    lines_of(metrics, "val")[3]["loss"] = math.nan
    assert "step 60: the validation loss is nan" in only(write_run(tmp_path, metrics), "nonfinite")


def test_masked_out_batches(tmp_path):
    metrics = healthy_metrics()
    for line in lines_of(metrics, "train")[4:9]:
        line |= {"targets": 0, "loss": 0.0, "bits_per_byte": 0.0}
    message = only(write_run(tmp_path, metrics), "masked-out")
    assert "training at step 25, training at step 30, training at step 35 and 2 more" in message


@pytest.mark.parametrize("key, part, value", [("grad_norms", PARTS[3], 0.0), ("active", "decoder.blocks.0.mlp", 0.004)])
def test_dead_layers(tmp_path, key, part, value):
    metrics = healthy_metrics()
    last = [line for line in metrics if line.get("event") == "layers"][-1]
    last[key][part] = value
    message = only(write_run(tmp_path, metrics), "dead-layer")
    assert part in message and "step 100" in message
    assert all(other not in message.replace(part, "") for other in PARTS[:4] if other != part)


def test_overfitting_and_diverging(tmp_path):
    metrics = healthy_metrics()
    for line in lines_of(metrics, "val")[-2:]:
        line["bits_per_byte"] *= 1.4
    message = only(write_run(tmp_path, metrics), "overfitting")
    assert "at step 60" in message and "at step 100" in message
    for line in lines_of(metrics, "train")[-7:]:
        line["bits_per_byte"] *= 1.6
    assert "lower --optim.lr" in only(write_run(tmp_path, metrics), "diverging")


def usual_run(folder, loss, *, text=doctor.TINY_SHAKESPEARE, steps=2000, reason="finished", **layer):
    """shakespeare-char with `layer` on top, whose last validation has so many nats a character."""
    chosen = resolved(presets.settings("shakespeare-char", {"model": {"vocab_size": 65}}, layer), 65)
    points = [(0, math.log(65)), (250, (math.log(65) + loss) / 2), (2000, loss)]
    metrics = [
        {"step": step, "split": "val", "loss": y, "bits_per_byte": y * math.log2(math.e), "targets": 9}
        for step, y in points
    ]
    metrics.append({"event": "end", "step": 2000, "reason": reason})
    config = {"settings": to_dict(chosen), "plan": {"steps": steps}, "corpus": {"hash": text}}
    return write_run(folder, metrics, **config)


@pytest.mark.parametrize("loss, cause", [(1.668, None), (1.72, None), (1.80, "curves of loss"), (1.5, "held-out text")])
def test_what_is_normal_for_a_preset(tmp_path, loss, cause):
    run = usual_run(tmp_path, loss)
    if cause is None:
        assert doctor.examine(run) == []
        return
    message = only(run, "unusual")
    assert f"ended at {loss / math.log(2):.3f} bits per byte" in message and cause in message
    assert "shakespeare-char on tiny Shakespeare usually ends between 2.283 and 2.526" in message


@pytest.mark.parametrize(
    "changed",
    [
        {"optim": {"lr": 3e-3}},
        {"model": {"dim": 64}},
        {"data": {"validation": 0.2}},
        {"tokenizer": {"path": "tokenizers/other"}},
        {"train": {"batch": 16}},
        {"train": {"label_smoothing": 0.1}},
        {"text": "another"},
        {"steps": 4000},
    ],
)
def test_what_is_normal_says_nothing_of_other_settings(tmp_path, changed):
    assert doctor.examine(usual_run(tmp_path, 1.9, **changed)) == []


def test_settings_that_change_nothing_learned_leave_a_run_normal(tmp_path):
    same = {"seed": 7, "train": {"threads": 1, "eval_every": 50}, "data": {"workers": 1}}
    only(usual_run(tmp_path / "same", 1.9, **same), "unusual")
    assert kinds(usual_run(tmp_path / "begun", 1.9, reason="signal")) == ["unfinished"]
    run = usual_run(tmp_path / "older", 1.9)
    config = json.loads((run / "config.json").read_text())
    config["settings"]["model"]["long_gone"] = 1
    (run / "config.json").write_text(json.dumps(config))
    assert kinds(run) == []


@pytest.mark.parametrize("name", ["mlm-tiny", "seq2seq-tiny"])
def test_what_is_normal_without_bits_per_byte(tmp_path, name):
    chosen = resolved(presets.settings(name, {"model": {"vocab_size": V}}), V)
    ends = doctor.NORMAL[name, "stdlib"]
    assert len(ends) > 1 and max(ends) < 1.01 * min(ends)
    for loss, found in [(min(ends), []), (1.06 * max(ends), ["unusual"]), (0.94 * min(ends), ["unusual"])]:
        points = [(0, math.log(V)), (300, (math.log(V) + loss) / 2), (600, loss)]
        metrics = [{"step": step, "split": "val", "loss": y, "bits_per_byte": None, "targets": 9} for step, y in points]
        metrics.append({"event": "end", "step": 600, "reason": "finished"})
        run = write_run(tmp_path / f"{loss}", metrics, settings=to_dict(chosen), plan={"steps": 600})
        assert kinds(run) == found
    assert "nats per target" in doctor.examine(run)[0].message


def test_every_normal_run_is_one_of_a_preset_in_steps():
    for (name, _), ends in doctor.NORMAL.items():
        assert presets.settings(name).steps and ends and all(0.5 < end < 10 for end in ends)


def test_a_collapse_of_the_speed(tmp_path):
    metrics = healthy_metrics()
    for line in lines_of(metrics, "train")[-5:]:
        line["tokens_per_second"] = 3000.0
    assert "to 3,000 tokens/s" in only(write_run(tmp_path, metrics), "slow")
    lines_of(metrics, "train")[-1]["tokens_per_second"] = lines_of(metrics, "train")[-2]["tokens_per_second"] = 8000.0
    lines_of(metrics, "train")[-3]["tokens_per_second"] = 8000.0
    assert kinds(write_run(tmp_path, metrics)) == []  # a short dip is none


def test_damaged_and_missing_files(tmp_path):
    run = write_run(tmp_path, healthy_metrics())
    (save_example(run, 90) / "state.json").write_text("{}")
    save_example(run, 100)
    message = only(run, "damaged")
    assert "step-90/state.json is damaged" in message
    for path in (run / "tokenizer").iterdir():
        path.unlink()
    (run / "tokenizer").rmdir()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:3], '{"step": 1', *lines[3:], '{"half']))
    assert kinds(run) == ["damaged"] * 3
    assert "lines 4 are no JSON" in doctor.examine(run)[0].message
    (run / "metrics.jsonl").unlink()
    assert "missing or empty" in doctor.examine(run)[0].message


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        doctor.examine(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DamagedFile, match=r"config\.json is damaged"):
        doctor.examine(tmp_path)


def test_the_command_on_a_sick_run(tmp_path, capsys):
    metrics = healthy_metrics()
    lines_of(metrics, "val")[0]["loss"] = 20.0
    run = write_run(tmp_path, metrics)
    assert command.main([str(run), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["run"] == str(run) and answer["healthy"] is False
    assert [problem["kind"] for problem in answer["problems"]] == ["first-loss"]
    assert command.main([str(run)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("first-loss: ") and out[1] == "1 problem found"


def test_the_machine(capsys):
    assert command.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cores"] >= 1 and found["memory_free"] > 0 and found["disk_free"] > 0
    assert found["packages"]["torch"] == machine._version("torch") and found["device"] in ("cpu", "cuda", "mps")
    assert found["dtype"] in ("fp32", "bf16") and found["kernels"][0] in ("torch", "triton")
    assert command.main([]) == 0
    out = capsys.readouterr().out
    for heading in ("python", "device", "memory", "kernels", "compiler", "disk", "extras"):
        assert f"\n{heading} " in "\n" + out


def test_a_compiler_is_only_trusted_when_it_works(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no room for this >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    found = machine.compiler()
    assert not found["works"] and found["command"] == str(broken) and "no room for this" in found["why"]
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "Python.h is missing" in machine.compiler()["why"]
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert "install g++" in machine.compiler()["why"]


def test_advice_follows_from_the_facts():
    good = {
        "device": "cuda", "gpus": [{"name": "X"}], "nvidia_driver": True, "memory_free": 80 * machine.GIB,
        "dtype": "bf16", "disk_free": 500 * machine.GIB, "packages": {"triton": "3.7.1"},
        "compiler": {"works": True, "why": None}, "extras": {"data": True, "plots": True},
    }  # fmt: skip
    cpu = {"device": "cpu", "gpus": []}
    cases = {
        "CUDA build": cpu,
        "no GPU": {**cpu, "nvidia_driver": False},
        "smaller micro-batches": {**cpu, "memory_free": 2**28},
        "make room": {**cpu, "disk_free": 2**28},
        "fall back to eager: no g++": {**cpu, "compiler": {"works": False, "why": "no g++"}},
        "[plots]": {**cpu, "extras": {"data": True, "plots": False}},
    }
    for words, change in cases.items():
        lines = machine.advice({**good, **change})
        assert sum(words in line for line in lines) == 1, (words, lines)
        others = [other for other in cases if other not in (words, "CUDA build", "no GPU")]
        assert not any(other in line for line in lines for other in others), (words, lines)

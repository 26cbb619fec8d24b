"""A step that meets NaN or Inf leaves the weights alone and says where: layer, step, samples."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillm.training import nonfinite
from minillm.training.job import TrainingFailed
from minillm.training.objectives import likelihood
from tests.training.jobs import go, job, rows, weights
from tests.training.running import TINY, events, lines, train


def broken(tmp_path: Path, plant) -> tuple[dict, str, dict, dict]:
    """Runs a job whose third step meets what `plant` does to it; the event, the message, weights before and after."""
    work, kept = job(tmp_path, steps=5), {}
    plain = work.batch

    def batch(step: int):
        if step == 2:
            plant(work)
            kept.update(weights(work))
        return plain(step)

    with pytest.raises(TrainingFailed) as raised:
        go(replace(work, batch=batch))
    (event,) = events(tmp_path, "nonfinite")
    assert [line["step"] for line in lines(tmp_path, "train")] == [1, 2], "what came before is still there to be read"
    assert event["step"] == 3
    return event, str(raised.value), kept, weights(work)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)) for name in a)  # NaN equals NaN


def test_a_weight(tmp_path: Path) -> None:
    def plant(work) -> None:
        with torch.no_grad():
            work.model.decoder.blocks[1].mlp.up_proj.weight[0, 0] = float("nan")

    event, message, before, after = broken(tmp_path, plant)
    assert same(before, after)
    assert (event["what"], event["layer"]) == ("loss", "decoder.blocks.1.mlp.up_proj.weight (weight)")
    assert event["samples"] == [12, 13, 14, 15, 16, 17]
    assert message.startswith("step 3: the loss is not finite, first at decoder.blocks.1.mlp.up_proj.weight (weight), ")
    assert "samples 12, 13, 14, 15, 16, 17; the weights are unchanged" in message


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_activation_of_two_rows(tmp_path: Path, value: float) -> None:
    """One token's embedding overflows inside a layer: that layer is named, and the rows that hold the token."""
    batch = rows(12, 6)
    token = int(batch.ids[3, 0])
    holds = [sample for sample, ids in zip(batch.samples, batch.ids, strict=True) if token in ids]

    def plant(work) -> None:
        def overflow(module, inputs, output):
            return torch.where((work.seen == token).unsqueeze(-1), value, output)

        def see(module, inputs):
            object.__setattr__(work, "seen", inputs[0])

        work.model.embedding.register_forward_pre_hook(see)
        work.model.embedding.register_forward_hook(overflow)

    event, _, before, after = broken(tmp_path, plant)
    assert same(before, after)
    assert (event["what"], event["layer"]) == ("loss", "embedding (output)")
    assert 15 in event["samples"] and event["samples"] == holds and len(holds) < 6


@pytest.mark.parametrize("broken_one", [0, 1])
def test_a_layer_with_two_outputs_is_looked_at_in_both(tmp_path: Path, broken_one: int) -> None:
    """A norm gives the stream on as well, where a sum may overflow that the norm hides."""

    def overflow(module, inputs, outputs):
        return tuple(x * float("inf") if i == broken_one else x for i, x in enumerate(outputs))

    work = job(tmp_path)
    work.model.decoder.blocks[0].mlp_norm.register_forward_hook(overflow)
    found = nonfinite.locate(work.model, rows(0, 2), work.objective)
    assert found == ("decoder.blocks.0.mlp_norm (output)", [0, 1])


def test_a_gradient(tmp_path: Path) -> None:
    def plant(work) -> None:
        weight = work.model.decoder.blocks[0].attention.v_proj.weight
        weight.register_hook(lambda grad: torch.full_like(grad, float("inf")))

    event, message, before, after = broken(tmp_path, plant)
    assert same(before, after)
    assert (event["what"], event["layer"]) == ("gradient", "decoder.blocks.0.attention.v_proj.weight (gradient)")
    assert "the gradient is not finite" in message


def test_the_objective_alone(tmp_path: Path) -> None:
    work, calls = job(tmp_path, steps=2), []

    def objective(model, batch):
        calls.append(batch)
        return likelihood(model, batch) + (float("nan") if 3 in batch.samples else 0.0)

    with pytest.raises(TrainingFailed, match="first at loss, samples 3;"):
        go(replace(work, objective=objective))
    assert events(tmp_path, "nonfinite")[0]["samples"] == [3]


def test_locating_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    work = job(tmp_path, model={"dropout": 0.2})
    work.model.train()
    state = torch.get_rng_state()
    assert nonfinite.locate(work.model, rows(0, 3), work.objective) == ("loss", [0, 1, 2])
    assert work.model.training and torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in work.model.modules())


def test_endless_overflow_in_fp16_ends_the_run(tmp_path: Path) -> None:
    """The scaler halves its scale at each infinite gradient; once below 1 it is not the scale's fault."""
    work = job(tmp_path, steps=40)
    work.model.embedding.weight.register_hook(lambda grad: grad * float("inf"))
    before = weights(work)
    with pytest.raises(TrainingFailed, match=r"step 18: the gradient is not finite"):  # 2^16 halved 17 times is 1/2
        go(replace(work, plan=replace(work.plan, dtype="fp16")))
    assert same(before, weights(work))


def test_the_command_says_so_and_leaves_a_report(capsys, text: Path, tmp_path: Path, monkeypatch) -> None:
    def objective(config):
        return lambda model, batch: likelihood(model, batch) * (float("nan") if batch.samples[0] >= 8 else 1.0)

    monkeypatch.setattr("minillm.training.pretrain.training_objective", objective)
    run = tmp_path / "run"
    result = train(capsys, "--data", text, "--out", run, *TINY, "--steps", "9", "--train.save-every", "1")
    assert result.code == 1 and "Traceback" not in result.err
    error, report = result.err.splitlines()[-2:]
    assert error.startswith("error: step 3: the loss is not finite, first at loss, samples 8, 9, 10, 11; the weights")
    assert report == f"report: {run / 'report.html'}" and "broke down at step 3" in (run / "report.html").read_text()
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["event"] == "nonfinite"
    assert (run / "checkpoints" / "step-2").is_dir()

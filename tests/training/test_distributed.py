"""Two and four processes train as one does: the same losses, and a checkpoint of any of them is one of all."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minillm import load
from minillm.config import Settings, UserError, from_dict, merge
from minillm.data.batch import IGNORED
from minillm.data.corpus import NextToken
from minillm.data.loader import validation
from minillm.training import checkpoint
from minillm.training.distributed import ALONE, micro_batch
from minillm.training.group import Group
from minillm.training.muon import SharedMuon
from tests.training.ranks import Ranks, answered, commanded, exchanged, overtaken, resumed, trained
from tests.training.running import TINY, events, lines, losses, train
from tests.training.saving import same

FSDP = {"train": {"parallel": "fsdp"}}
HYBRID = {"train": {"parallel": "fsdp", "shard_ranks": 2, "reshard": False}}
MUON = {"optim": {"name": "muon", "muon_lr": 0.002}}


def values(*changes: dict[str, Any]) -> dict[str, Any]:
    """Twenty steps of eight rows, in two passes on each of two ranks; a checkpoint in the middle and one at the end."""
    chosen: dict[str, Any] = {"steps": 20, "micro": 2, "train": {"batch": 8, "eval_every": 10, "save_every": 10}}
    for change in changes:
        chosen = merge(chosen, change)
    return chosen


def of_the_lead(size: int, function: Callable[..., Any], *args: Any) -> Any:
    """What `function` returns on rank 0 of `size` processes; of one: on this one."""
    return function(0, *args) if size == 1 else Ranks(size, function, *args).results()[0]


def run(folder: Path, size: int, *changes: dict[str, Any]) -> list[tuple]:
    return of_the_lead(size, trained, folder, values(*changes))


def norms(run: Path) -> list[float]:
    return [line["grad_norm"] for line in lines(run, "train")]


def assert_close(found: list[tuple], expected: list[tuple]) -> None:
    """The same lines with the same numbers of targets, and losses within a relative 1e-5."""
    assert [line[:2] + line[3:] for line in found] == [line[:2] + line[3:] for line in expected]
    assert [line[2] for line in found] == pytest.approx([line[2] for line in expected], rel=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """Losses, and norms of the gradients, of one process by optimizer."""
    folder = tmp_path_factory.mktemp("alone")
    found = {name: run(folder / name, 1, *change) for name, change in {"adamw": (), "muon": (MUON,)}.items()}
    return found | {f"norms of {name}": norms(folder / name) for name in found}


@pytest.mark.parametrize(
    "size, optimizer, changes",
    [
        (2, "muon", ()),
        (4, "adamw", ({"train": {"patience": 9}},)),
        (2, "muon", (FSDP,)),
        (4, "adamw", (HYBRID,)),
    ],
    ids=["ddp on 2", "ddp on 4", "fsdp on 2", "fsdp in pairs on 4"],
)
def test_losses_are_those_of_one_process(tmp_path: Path, alone, size: int, optimizer: str, changes) -> None:
    chosen = (*changes, MUON) if optimizer == "muon" else changes
    found = run(tmp_path, size, *chosen)
    assert_close(found, alone[optimizer])
    assert norms(tmp_path) == pytest.approx(alone["norms of " + optimizer], rel=1e-4)  # Adam would forgive any factor
    if FSDP not in changes and HYBRID not in changes:  # gathered weights may lie otherwise in memory, and round so
        assert found[0] == alone[optimizer][0], "a validation adds up to the same number, whoever scored what"
    folders = [checkpoint.resolve(tmp_path / "checkpoints" / f"step-{step}") for step in (10, 20)]
    assert [(folder / "parts").is_dir() for folder in folders] == [any("parallel" in c["train"] for c in changes)] * 2
    assert (tmp_path / "logs" / "rank-1.log").read_text().count("validation") == 3
    assert not (tmp_path / "logs" / "rank-0.log").exists()


@pytest.mark.parametrize("changes, sizes", [((MUON, FSDP), (4, 1)), ((MUON,), (4,))], ids=["fsdp", "ddp"])
def test_a_checkpoint_of_two_is_read_by_one_and_by_four(tmp_path: Path, alone, changes, sizes) -> None:
    """What is loaded is what was saved, bit for bit, and what follows is what would have followed."""
    run(tmp_path, 2, *changes)
    for size in sizes:
        shorten(tmp_path, 10)
        folder = checkpoint.resolve(tmp_path)
        assert folder.name == "step-10"
        state = checkpoint.load_state(folder)
        weights, moments, random, wrote = of_the_lead(size, resumed, tmp_path, values(*changes))
        assert same(weights, checkpoint.load_weights(folder))
        assert same(moments, [each["state"] for each in state["optimizers"]])
        saved = [each["cpu"] for each in state["random_of_ranks"]]
        assert same(random[:2], saved[:size])
        assert len({tuple(each.tolist()) for each in random}) == size, "no two ranks may drop out the same"
        assert_close(wrote, alone["muon"])


@pytest.mark.parametrize(
    "changes, held, mesh, gathered",
    [
        ((), "its own", None, True),
        ((FSDP,), "nobody's", (2,), False),
        ((HYBRID, {"train": {"shard_ranks": 1}}), "nobody's", (2, 1), True),
    ],
    ids=["ddp", "fsdp", "fsdp, whole on each"],
)
def test_gradients_are_exchanged_once_a_step(tmp_path: Path, changes, held: str, mesh, gathered: bool) -> None:
    """Of three passes only the last one's backward talks; what fsdp has until then, it keeps elsewhere.

    Weights are divided as they should be, and between forward and backward given back or kept.
    """
    chosen = values({"steps": 1, "micro": 1, "train": {"batch": 6, "eval_every": 1, "save_every": 1}}, *changes)
    found = Ranks(2, exchanged, tmp_path, chosen).results()[0]
    assert found == (["nobody's", held, held], mesh, {gathered})


@pytest.mark.parametrize("what", ["gather_dtype", "reduce_dtype"])
def test_weights_and_gradients_travel_in_the_dtype_that_was_asked_for(tmp_path: Path, alone, what: str) -> None:
    """Either rounds the gradients a little; what is kept stays fp32."""
    found = run(tmp_path, 2, FSDP, {"steps": 1, "train": {"eval_every": 1, "save_every": 1, what: "bf16"}})
    assert found[0][2] == pytest.approx(alone["adamw"][0][2], rel=1e-4)
    (norm,), exact = norms(tmp_path), alone["norms of adamw"][0]
    assert norm == pytest.approx(exact, rel=1e-2) and norm != pytest.approx(exact, rel=1e-5)
    assert {x.dtype for x in checkpoint.load_weights(checkpoint.resolve(tmp_path)).values()} == {torch.float32}


def test_ranks_answer_each_other(tmp_path: Path) -> None:
    expected = [3, 0.5, 1.0, [True, True, False], [0, 1], 0, True]
    found = Ranks(2, answered, tmp_path / "made").results()
    assert found == [expected, expected] and [type(x) for x in found[1][:2]] == [int, float]


def test_training_may_go_on_while_parts_are_written(tmp_path: Path) -> None:
    """Though only the lead puts the folder into its place, all find it there once they have asked."""
    assert Ranks(2, overtaken, tmp_path).results() == [[1], [1]]
    assert torch.equal(checkpoint.load_weights(checkpoint.resolve(tmp_path))["x"], torch.ones(100_000))


def test_the_best_step_and_the_last_are_those_of_one_process(tmp_path: Path) -> None:
    """Either half of the validation would choose another best step, and one of them end long before."""
    chosen = values({"steps": 14, "optim": {"lr": 0.02}, "train": {"patience": 5, "eval_every": 1, "save_every": 14}})
    expected, found = (of_the_lead(size, trained, tmp_path / name, chosen) for size, name in ((1, "one"), (2, "two")))
    assert_close(found, expected)
    ends = [events(tmp_path / name, "end")[0] for name in ("one", "two")]
    assert [(end["reason"], end["step"], end["best_step"]) for end in ends] == [("early stop", 12, 7)] * 2
    weights = [checkpoint.load_weights(checkpoint.resolve(tmp_path / name)) for name in ("one", "two")]
    assert all(torch.allclose(weights[1][name], x, rtol=1e-4, atol=1e-5) for name, x in weights[0].items())


def shorten(run: Path, step: int) -> None:
    """Takes away the checkpoints behind `step`."""
    for each in checkpoint.steps(run):
        if each > step:
            (run / "checkpoints" / f"step-{each}").rename(run / f"away-{each}-{len(list(run.iterdir()))}")


def test_parts_are_noticed_when_they_are_damaged_or_gone(tmp_path: Path) -> None:
    run(tmp_path, 2, FSDP)
    folder = checkpoint.resolve(tmp_path)
    part = sorted((folder / "parts").iterdir())[0]
    whole = part.read_bytes()
    for content, what in ((whole[:-1] + bytes([whole[-1] ^ 1]), "SHA-256"), (whole[:-9], "bytes")):
        part.write_bytes(content)
        with pytest.raises(UserError, match=f"{part.name}.*{what}"):
            checkpoint.verify(folder)
    part.write_bytes(whole)
    part.rename(tmp_path / "away")
    with pytest.raises(UserError, match="missing"):
        checkpoint.verify(folder)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_weights(folder)
    (tmp_path / "away").rename(part)
    (folder / "parts" / "more.safetensors").write_bytes(whole)
    with pytest.raises(UserError, match="does not list parts/more"):
        checkpoint.verify(folder)


def test_the_command_by_two_is_the_command_by_one(capsys, text: Path, tmp_path: Path) -> None:
    """Data, plan, samples, report, the finished model: all of a run, with weights in parts and Muon."""
    argv = ["--data", text, *TINY, "--steps", "6", "--optim.name", "muon", "--train.micro-batch", "2"]
    assert train(capsys, "--out", tmp_path / "one", *argv).code == 0
    options = ["--out", tmp_path / "two", *argv, "--train.parallel", "fsdp"]
    assert Ranks(2, commanded, [str(option) for option in options]).results() == [0, 0]
    assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"))
    for name in ("sample", "layers", "end", "baselines"):
        ours, theirs = events(tmp_path / "two", name), events(tmp_path / "one", name)
        assert [event.get("step") for event in ours] == [event.get("step") for event in theirs]
    assert [e["text"] for e in events(tmp_path / "two", "sample")] == [
        e["text"] for e in events(tmp_path / "one", "sample")
    ]
    assert events(tmp_path / "two", "layers")[-1]["active"] == events(tmp_path / "one", "layers")[-1]["active"]
    layers = [events(tmp_path / name, "layers")[-1]["grad_norms"] for name in ("two", "one")]
    assert layers[0] == pytest.approx(layers[1], rel=1e-3)
    random = checkpoint.load_state(checkpoint.resolve(tmp_path / "two"))["random_of_ranks"]
    assert not torch.equal(random[0]["cpu"], random[1]["cpu"]), "no two ranks may drop out the same"
    assert (tmp_path / "two" / "report.html").exists()
    ids = torch.arange(12)[None]
    (ours, _), (theirs, _) = load(tmp_path / "two"), load(tmp_path / "one")
    assert torch.allclose(ours(ids), theirs(ids), atol=1e-4)


@dataclass
class Stream:
    """A text that counts."""

    length: int

    def __len__(self) -> int:
        return self.length

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        return (starts[:, None] + np.arange(length)) % self.length


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("tokens", [9, 57, 130])
def test_validation_is_dealt_out_without_rest_or_repetition(tokens: int, ranks: int) -> None:
    def deal(rank: int, size: int) -> list:
        objective = NextToken(document_id=10**9, separate=False)
        return list(validation(Stream(tokens), objective, context=8, rows=3, rank=rank, ranks=size))

    hands = [deal(rank, ranks) for rank in range(ranks)]
    assert len({len(hand) for hand in hands}) == 1, (
        "a rank with another number of batches would leave the others waiting"
    )
    dealt = [hand[i] for i in range(len(hands[0])) for hand in hands]
    for mine, whole in zip(dealt, deal(0, 1), strict=False):
        assert torch.equal(mine.ids, whole.ids) and torch.equal(mine.targets, whole.targets)
    assert all((batch.targets == IGNORED).all() for batch in dealt[len(deal(0, 1)) :])
    assert sum(batch.counted for batch in dealt) == tokens - 1


def group(rank: int, size: int) -> Group:
    """Without the processes: for what a rank knows by itself."""
    found = object.__new__(Group)
    found.rank, found.size = rank, size
    return found


def test_a_step_reads_the_same_rows_on_any_number_of_ranks() -> None:
    for size in (2, 3, 4, 12):
        shares = [group(rank, size).rows(12) for rank in range(size)]
        assert [row for first, count in shares for row in range(first, first + count)] == list(range(12))
        assert len({count for _, count in shares}) == 1
    assert (micro_batch(8, 8), micro_batch(8, 4), micro_batch(6, 4), micro_batch(3, 4)) == (8, 4, 2, 1)


def test_each_rank_takes_up_its_own_random_state() -> None:
    """One that was not there when the others saved begins its own; a checkpoint of one process knows one state."""
    state = {"random": "first", "random_of_ranks": ["first", "second"]}
    assert [group(rank, 4).random_of(state) for rank in range(4)] == ["first", "second", None, None]
    assert [group(rank, 2).random_of({"random": "only"}) for rank in range(2)] == ["only", None]
    assert ALONE.random_of(state) == "first"


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"train": {"batch": 6}}, r"train.batch \(6\) cannot be shared out evenly by 4 processes; take 8"),
        ({"train": {"parallel": "fsdp", "shard_ranks": 3}}, "train.shard_ranks .3. must divide"),
        ({"train": {"parallel": "fsdp"}, "dtype": "fp16"}, "take bf16"),
        ({"train": {"parallel": "fsdp"}, "compile": "on"}, "--compile on"),
        ({"train": {"reduce_dtype": "bf16"}, "device": "cpu"}, "train.reduce_dtype=bf16 needs GPUs"),
    ],
)
def test_what_processes_cannot_do_is_said_in_one_line(changes: dict[str, Any], line: str) -> None:
    group(1, 4).check(from_dict(Settings, {"train": {"batch": 8}}))
    with pytest.raises(UserError, match=line) as raised:
        group(1, 4).check(from_dict(Settings, changes))
    assert "\n" not in str(raised.value)


def test_settings_of_fsdp_need_fsdp() -> None:
    for name, value in (("shard_ranks", 2), ("reshard", False), ("gather_dtype", "bf16")):
        with pytest.raises(UserError, match=f"train.{name} needs train.parallel=fsdp"):
            from_dict(Settings, {"train": {name: value}})
        from_dict(Settings, {"train": {name: value, "parallel": "fsdp"}})


def test_shared_muon_is_muon() -> None:
    """Its state and settings are torch.optim.Muon's, so that either reads the other's checkpoints."""
    ours, theirs = (kind([torch.nn.Parameter(torch.ones(2, 3))]) for kind in (SharedMuon, torch.optim.Muon))
    assert ours.state_dict() == theirs.state_dict()

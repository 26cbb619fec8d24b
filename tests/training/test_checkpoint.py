"""Checkpoints: what goes in comes out bit for bit, and the right ones stay."""

import json
import math
import random
import shutil

import pytest
import torch
from torch import nn

from minillm.config import DamagedFile, UserError
from minillm.training import checkpoint, manifest, shelf
from minillm.training.state import pack, unpack
from tests.training.saving import advance, same, save_example, state_of, trained


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_resumed_optimizer_goes_on_bit_for_bit(tmp_path):
    model, optimizer = trained()
    folder = checkpoint.save(
        tmp_path, 3, weights=model.state_dict(), state=state_of(optimizer), config={}, tokenizer=None, keep=1
    )
    advance(model, optimizer, 5)
    uninterrupted = model.state_dict()

    other, fresh = trained(seed=9, steps=0)
    other.load_state_dict(checkpoint.load_weights(folder))
    state = checkpoint.load_state(folder)
    fresh.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"]["torch"])
    advance(other, fresh, 5)  # dropout and the noise come from the restored random state
    assert all(torch.equal(uninterrupted[name], x) for name, x in other.state_dict().items())
    assert same(optimizer.state_dict()["state"], fresh.state_dict()["state"])

    version, internal, gauss = state["random"]["python"]
    assert (version, tuple(internal), gauss) == random.getstate()
    assert state["position"] == {"epoch": 2, "sample": 12345, "loss": 0.1 + 0.2}


def test_every_kind_of_value_survives():
    state = {
        "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan],
        "integers": [0, -1, 2**80, True, False, None],
        "strings": ["", "ü\0\n", "\ud800", "$tensor"],
        "empty": [{}, [], ()],
        "nested": ({"a": [({0: "zero", "0": "text"},)]},),
        "tags": [{"$tensor": "x"}, {"$items": []}, {"$float": 1, "other": 2}],
        0: {"exp_avg": torch.tensor(math.nan)},
        "0": torch.empty(0, 3),
        "like": {"a": {"b": torch.tensor([1])}, "a.b": torch.tensor([2])},
        "types": [torch.tensor([1, 0], dtype=t) for t in (torch.bool, torch.uint8, torch.float64, torch.int16)],
        "half": [torch.tensor([1.5, math.inf], dtype=t) for t in (torch.bfloat16, torch.float16)],
        "views": [torch.arange(6).view(2, 3).T, torch.arange(6)[2:4], torch.ones(1).expand(3), torch.arange(9)[::2]],
    }
    packed, tensors = pack(state)
    assert same(state, unpack(json.loads(json.dumps(packed)), tensors))
    assert all(x.is_contiguous() for x in tensors.values())


def test_tied_and_overlapping_tensors_come_back_apart_and_equal(tmp_path):
    memory = torch.arange(12.0).view(3, 4)
    weights = {"embedding": memory, "head": memory, "row": memory[1], "columns": memory[:, 1:3]}
    state = {"one": memory, "two": memory.T}
    folder = save_example(tmp_path, 1, weights=weights, state=state)
    loaded = checkpoint.load_weights(folder)
    assert same(weights, loaded)
    assert same(state, checkpoint.load_state(folder))
    loaded["head"].zero_()
    assert loaded["embedding"].sum() == 66


def test_loaded_tensors_may_be_changed_without_changing_the_file(tmp_path):
    folder = save_example(tmp_path, 1)
    for tensor in checkpoint.load_weights(folder).values():
        tensor.fill_(7.0)
    checkpoint.verify(folder)
    assert all(not (x == 7.0).any() for x in checkpoint.load_weights(folder).values())


@pytest.mark.parametrize(
    "leaf, place",
    [
        ({"a": [1, {"b": object()}]}, r"state\.a\[1\]\.b"),
        ({"loop": {1: {2, 3}}}, r"state\.loop\.1"),
        ({"x": b"bytes"}, r"state\.x"),
        ({("a", "b"): 1}, r"\('a', 'b'\)"),
        ({True: 1}, "True"),
        ({"c": torch.zeros(2, dtype=torch.complex128)}, r"state\.c"),
        ({"s": torch.zeros(2, 2).to_sparse()}, r"state\.s"),
        ({"m": torch.zeros(2, device="meta")}, r"state\.m"),
    ],
)
def test_what_cannot_come_back_is_refused_before_anything_is_written(tmp_path, leaf, place):
    with pytest.raises(TypeError, match=place):
        save_example(tmp_path, 1, state=leaf)
    with pytest.raises(TypeError, match="head"):
        save_example(tmp_path, 1, weights={"head": torch.zeros(2, device="meta")})
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_holds_all_it_needs(tmp_path):
    folder = save_example(tmp_path, 7)
    assert folder == tmp_path / "checkpoints" / "step-7"
    listed = checkpoint.verify(folder)
    assert listed["step"] == 7
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(listed["files"]) == files - {"MANIFEST.json"}
    assert (folder / "tokenizer" / "tokenizer.model").read_bytes() == bytes(range(256))
    assert checkpoint.load_config(folder) == {"format": 1, "settings": {"seed": 7}}
    assert same(dict(trained(7)[0].state_dict()), checkpoint.load_weights(folder))


def test_the_newest_and_the_best_stay(tmp_path):
    save_example(tmp_path, 10, keep=2)
    save_example(tmp_path, 20, keep=2, best=20)
    for step in (30, 40, 100):
        save_example(tmp_path, step, keep=2)
    assert names(tmp_path) == ["best", "step-100", "step-20", "step-40"]
    assert checkpoint.steps(tmp_path) == [20, 40, 100]
    assert checkpoint.resolve(tmp_path) == tmp_path / "checkpoints" / "step-100"
    assert checkpoint.resolve(tmp_path / "checkpoints" / "best") == tmp_path / "checkpoints" / "step-20"
    save_example(tmp_path, 110, keep=2, best=110)
    assert names(tmp_path) == ["best", "step-100", "step-110"]
    save_example(tmp_path, 120, keep=2, best=20)  # a best one that is gone is not pointed at
    assert (tmp_path / "checkpoints" / "best").read_text() == "step-110\n"


def test_all_is_on_the_disk_before_it_has_a_name(tmp_path, monkeypatch):
    synced, sync = [], manifest.sync
    monkeypatch.setattr(manifest, "sync", lambda path: (synced.append(path), sync(path)))
    folder = save_example(tmp_path, 1, best=1)
    checkpoints, written = folder.parent, folder.with_name("step-1.tmp")
    named = synced.index(checkpoints)  # its list of names, after the rename
    assert {written, *(written / path.relative_to(folder) for path in folder.rglob("*"))} <= set(synced[:named])
    assert synced[named + 1 :] == [checkpoints / "best.tmp", checkpoints]


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save_example(tmp_path, 5)
    folder = save_example(tmp_path, 5, weights={"w": torch.ones(2)})
    assert checkpoint.load_weights(folder)["w"].tolist() == [1, 1]
    assert names(tmp_path) == ["step-5"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    folder = save_example(tmp_path, 5)
    folder.rename(folder.with_name("step-5.replaced"))
    (tmp_path / "checkpoints" / "step-5.tmp").mkdir()
    assert checkpoint.steps(tmp_path) == [5]
    assert checkpoint.load_config(checkpoint.newest_valid(tmp_path, pytest.fail))["settings"]["seed"] == 5
    save_example(tmp_path, 6)
    assert names(tmp_path) == ["step-5", "step-6"]
    checkpoint.verify(folder)


@pytest.mark.parametrize("first", ["step-5", "step-5.replaced"])
def test_of_two_of_one_step_the_newer_counts(tmp_path, monkeypatch, first):
    """A kill after the second rename; a folder lists its names in any order."""
    folder = save_example(tmp_path, 5)
    aside = shutil.copytree(folder, folder.with_name("step-5.replaced"))
    listed = sorted((folder, aside), key=lambda path: path.name != first)
    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "iterdir", lambda _: iter(listed))
        assert shelf.folders(folder.parent) == {5: folder}
    save_example(tmp_path, 6)
    assert names(tmp_path) == ["step-5", "step-6"]


def test_what_a_kill_left_is_ignored_and_then_removed(tmp_path):
    save_example(tmp_path, 5)
    half = tmp_path / "checkpoints" / "step-6.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoints" / "best.tmp").write_text("step-")
    assert checkpoint.steps(tmp_path) == [5]
    assert checkpoint.resolve(tmp_path).name == "step-5"
    save_example(tmp_path, 6)
    assert names(tmp_path) == ["step-5", "step-6"]


def test_damaged_ones_ahead_of_a_resumed_run_are_cleared_away(tmp_path):
    for step in (1, 2, 3):
        save_example(tmp_path, step)
    (tmp_path / "checkpoints" / "step-3" / "state.json").write_text("{}")
    warnings = []
    assert checkpoint.newest_valid(tmp_path, warnings.append).name == "step-2"
    assert len(warnings) == 1 and "step-3/state.json" in warnings[0]
    save_example(tmp_path, 2, keep=2)  # of which the damaged one is none
    assert names(tmp_path) == ["step-1", "step-2"]


def test_no_deletion_begins_under_a_checkpoints_name(tmp_path, monkeypatch):
    deleted, remove = [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: (deleted.append(path.name), remove(path, **options)))
    for step in (1, 2, 2, 3):
        save_example(tmp_path, step, keep=1)
    assert deleted == ["step-1.tmp", "step-2.replaced", "step-2.tmp"]  # a kill in between leaves no half of a step-N


def test_resolve_says_what_is_wrong_and_what_is_left(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.resolve(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a run folder nor a checkpoint folder"):
        checkpoint.resolve(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="neither a run folder"):  # a run begins with its config.json
        checkpoint.resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no checkpoint yet.*--resume"):
        checkpoint.resolve(tmp_path)
    assert checkpoint.steps(tmp_path) == [] and checkpoint.newest_valid(tmp_path, pytest.fail) is None

    first, second = save_example(tmp_path, 1), save_example(tmp_path, 2, best=2)
    assert checkpoint.resolve(first) == first
    (second / "tokenizer" / "tokenizer.model").write_bytes(b"")
    for path in (tmp_path, second, tmp_path / "checkpoints" / "best"):
        with pytest.raises(DamagedFile, match=r"step-2/tokenizer/tokenizer\.model.*valid checkpoint is .*step-1"):
            checkpoint.resolve(path)
    (first / manifest.NAME).unlink()
    with pytest.raises(DamagedFile, match=r"step-1/MANIFEST\.json is missing.*no valid checkpoint"):
        checkpoint.resolve(first)


def test_a_checkpoint_moved_elsewhere_opens(tmp_path, monkeypatch):
    folder = save_example(tmp_path, 1)
    moved = folder.rename(tmp_path / "mine")
    assert checkpoint.resolve(moved) == moved
    monkeypatch.chdir(moved)
    assert checkpoint.load_config(checkpoint.resolve(type(moved)(".")))["settings"] == {"seed": 1}


@pytest.mark.parametrize("text", ["", "step-", "../step-1", "step-1/../../x", "step-01", "\ud800", "x" * 5000])
def test_a_best_file_that_names_no_checkpoint_is_refused(tmp_path, text):
    save_example(tmp_path, 1, best=1)
    best = tmp_path / "checkpoints" / "best"
    best.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DamagedFile, match="best is damaged"):
        checkpoint.resolve(best)
    save_example(tmp_path, 2, keep=1)  # and nothing is pruned while it is unknown which one is the best
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_modules_with_buffers_and_no_tokenizer(tmp_path):
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(4, 3))
    folder = save_example(tmp_path, 0, weights=norm.state_dict(), tokenizer=None)
    assert same(dict(norm.state_dict()), checkpoint.load_weights(folder))
    assert not (folder / "tokenizer").exists()

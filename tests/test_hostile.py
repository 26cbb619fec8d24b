"""Folders that somebody made to do harm: every loader refuses them in one line and runs nothing."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest

from minillm import loading, tensors
from minillm.commands.tasks import task_of
from minillm.config import DamagedFile, UserError
from minillm.data.shards import open_shards
from minillm.data.tokens import read_header
from minillm.loading import load, load_tokenizer, open_model
from minillm.peft import files as adapters
from minillm.tensors import load_tensors
from minillm.training import checkpoint, manifest
from tests.finetuning import base, lines, minillm, records
from tests.interop.theirs import make, save
from tests.nests import mutated, places

TASKS = ("classify", "regress", "tag", "span-qa", "chat", "preference")


def prove(count):
    return pytest.param(count, marks=pytest.mark.prove)


def pickles(flag):
    """What a pickle that runs a command looks like, in the protocols 0 to 5."""
    by_hand = f"cos\nsystem\n(S'touch {flag}'\ntR.".encode()
    return [by_hand, *(bytes([0x80, protocol]) + by_hand for protocol in range(1, 6))]


def rehash(folder):
    """A manifest that fits: only the format of the files can save us."""
    (folder / manifest.NAME).unlink(missing_ok=True)
    manifest.write(folder, {"step": 1})


def planted_in_a_run(folder, name, payload):
    step = checkpoint.resolve(base(folder))
    (step / name).parent.mkdir(exist_ok=True)
    (step / name).write_bytes(payload)
    rehash(step)
    return folder


def planted_in_hf(folder, name, payload):
    save(make("llama", "LlamaForCausalLM"), folder)
    if name == "model-1.bin":
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif name.endswith((".bin", ".pt", ".pth")):
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(payload)
    return folder


PLACES = {
    "run: model.safetensors": (planted_in_a_run, "model.safetensors", load),
    "run: tokenizer.model": (planted_in_a_run, "tokenizer/tokenizer.model", load),
    "run: tokenizer.json": (planted_in_a_run, "tokenizer/tokenizer.json", load),
    "run: parts": (planted_in_a_run, "parts/model-00000.safetensors", load),
    "run: DCP's .metadata": (planted_in_a_run, "parts/.metadata", load),
    "hf: model.safetensors": (planted_in_hf, "model.safetensors", load),
    "hf: pytorch_model.bin": (planted_in_hf, "pytorch_model.bin", load),
    "hf: model.pt": (planted_in_hf, "model.pt", load),
    "hf: a shard that the index names": (planted_in_hf, "model-1.bin", load),
    "hf: tokenizer.json": (planted_in_hf, "tokenizer.json", load),
    "hf: tokenizer.pkl": (planted_in_hf, "tokenizer.pkl", load),
}


SAID = r"damaged|is a pickle|no weights|has no tokenizer|is no model|do not fit"


@pytest.mark.parametrize("place", PLACES)
def test_no_loader_executes_a_pickle(tmp_path, place):
    plant, name, opens = PLACES[place]
    for n, payload in enumerate(pickles(tmp_path / "executed")):
        folder = plant(tmp_path / f"{n}", name, payload)
        with pytest.raises(
            UserError, match=r"damaged|is a pickle|no weights|has no tokenizer|is no model|do not fit"
        ) as refused:
            opens(folder)
        assert "\n" not in str(refused.value) and str(folder) in str(refused.value)
        assert not (tmp_path / "executed").exists()


def test_no_file_of_tokens_adapter_or_data_executes_a_pickle(tmp_path, capsys):
    refused = 0
    for n, payload in enumerate(pickles(tmp_path / "executed")):
        folder = tmp_path / f"{n}"
        folder.mkdir()
        for name in ("train-00000.tokens", "index.json", "adapter_model.safetensors", "model.pt", "data.jsonl"):
            (folder / name).write_bytes(payload)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
        (folder / "adapter_model.bin").write_bytes(payload)
        model = open_model(base(folder / "run")).model
        for attempt in (
            lambda folder=folder: open_shards(folder),
            lambda folder=folder: read_header(folder / "train-00000.tokens"),
            lambda folder=folder, model=model: adapters.load(model, folder),
            lambda folder=folder: load(folder / "model.pt"),
            lambda folder=folder: load_tokenizer(folder),
        ):
            with pytest.raises(UserError):
                attempt()
            refused += 1
        done = minillm(capsys, "evaluate", folder / "run", "--task", "lm", "--data", folder / "data.jsonl")
        assert done.code == 2 and done.err.count("\n") == 1
        assert not (tmp_path / "executed").exists()
    assert refused == 6 * 5


def test_a_header_beyond_that_of_any_model_is_not_parsed(tmp_path):
    """The library reads up to 100 MB of it, and makes gigabytes of that."""
    folder = save(make("llama", "LlamaForCausalLM"), tmp_path / "hf")
    model = open_model(base(tmp_path / "run")).model
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    step = checkpoint.resolve(tmp_path / "run")
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(tensors.LARGEST_HEADER + 1)
    whole = len(header).to_bytes(8, "little") + header + bytes(8)
    (folder / "model.safetensors").write_bytes(whole)
    (adapter / "adapter_model.safetensors").write_bytes(whole)
    (step / "model.safetensors").write_bytes(whole)
    rehash(step)
    for opens in (lambda: load(folder), lambda: load(step), lambda: adapters.load(model, adapter)):
        with pytest.raises(DamagedFile, match="its header claims 10,485,761 bytes"):
            opens()
    (step / "model.safetensors").write_bytes(whole[:8].replace(b"\1", b"\0", 1) + header[:-1] + bytes(8))
    assert load_tensors(step / "model.safetensors")["a"].tolist() == [0.0, 0.0]  # one byte less is read


HOSTILE = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**40, 2**63, 10**400, 1e308, float("nan"), "", "x", "\0", [], {}, [1],
    {"type": "x"}, [[]], [None], "lora", "prefix", {"0": "a"}, ["a", "b"], "tag",
]  # fmt: skip


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """A checkpoint of each of some tasks."""
    from minillm.cli import run

    folder = tmp_path_factory.mktemp("finetuned")
    made = {}
    for task in TASKS:
        shape = "encoder" if task in ("classify", "regress", "tag", "span-qa") else "decoder"
        data = lines(folder / f"{task}.jsonl", records(task, 12))
        start = base(folder / f"base-{task}", shape)
        options = ["--task", task, "--data", data, "--out", folder / task, "--steps", 1, "--train.threads", 1]
        assert run("finetune", [str(start), *map(str, options), "--train.batch", "4"]) == 0
        made[task] = checkpoint.resolve(folder / task)
    return made


@pytest.mark.parametrize("count", [120, prove(500)])
def test_settings_that_fit_their_hash_and_make_no_sense(finetuned, tmp_path, count):
    draw, refused = random.Random(count), 0
    originals = {task: checkpoint.load_config(folder) for task, folder in finetuned.items()}
    ways = {
        task: [way for way in places(config, 5) if way[0] in ("task", "method") or way[:2] == ("settings", "model")]
        for task, config in originals.items()
    }
    for task, folder in finetuned.items():
        shutil.copytree(folder, tmp_path / task)
    for n in range(count):
        task = TASKS[n % len(TASKS)]
        (tmp_path / task / "config.json").write_text(json.dumps(mutated(draw, originals[task], ways[task], HOSTILE, 2)))
        rehash(tmp_path / task)
        begun = time.process_time()
        try:
            task_of(open_model(tmp_path / task), None)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600, str(error)
        assert time.process_time() - begun < 2
    assert count // 4 < refused < count


def test_a_model_that_is_told_to_be_larger_than_its_weights_is_not_allocated(finetuned, tmp_path, monkeypatch):
    shutil.copytree(finetuned["classify"], tmp_path / "step-1")
    config = checkpoint.load_config(tmp_path / "step-1")
    config["task"]["head"]["outputs"] = 10**8
    (tmp_path / "step-1" / "config.json").write_text(json.dumps(config))
    rehash(tmp_path / "step-1")
    monkeypatch.setattr(loading, "TaskModel", lambda *_: pytest.fail("the head was made"))
    with pytest.raises(DamagedFile, match=r"tells of a model of 3,200,\d+,\d+ parameters, and the weights are"):
        open_model(tmp_path / "step-1")


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("classify", {"info": {"labels": ["red"], "multi": False, "counts": [1]}}),
        ("tag", {"head": {"outputs": 3, "pool": "mean"}}),
        ("classify", {"info": {"labels": ["red", 3], "multi": False, "counts": [1, 1]}}),
        ("classify", {"info": None}),
        ("regress", {"info": {"mean": 1.0, "std": "2"}}),
        ("preference", {"info": {}}),
    ],
)
def test_what_a_finetuned_model_learned_is_checked(finetuned, tmp_path, capsys, task, change):
    shutil.copytree(finetuned[task], tmp_path / "step-1")
    config = checkpoint.load_config(tmp_path / "step-1")
    config["task"] |= change
    (tmp_path / "step-1" / "config.json").write_text(json.dumps(config))
    rehash(tmp_path / "step-1")
    data = Path(finetuned[task]).parent.parent.parent / f"{task}.jsonl"
    for command, option in (("evaluate", "--data"), ("predict", "--input")):
        done = minillm(capsys, command, tmp_path / "step-1", option, data)
        assert done.code == 3 and done.err.startswith("error: ") and done.err.count("\n") == 1, done.err

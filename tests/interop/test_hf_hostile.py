"""Folders in Hugging Face's format with a config.json or tokenizer.json that somebody spoilt."""

import copy
import json
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from minillm.config import UserError
from minillm.interop.hf import build, read_hf
from tests.interop.test_hf_tokenizer import MAKERS
from tests.interop.theirs import make, save

ROOT = Path(__file__).parents[2]

FAMILIES = [
    ("gpt2", "GPT2LMHeadModel"), ("llama", "LlamaForCausalLM"), ("qwen3", "Qwen3ForCausalLM"),
    ("bert", "BertForMaskedLM"), ("bart", "BartForConditionalGeneration"), ("bert", "BertForSequenceClassification"),
    ("bert", "BertForTokenClassification"),
]  # fmt: skip
HOSTILE = [
    None, True, False, -1, 0, 1, 2, 3, 2**31, 2**40, 2**63, 10**400, -1e308, 1e308, 1e-320, float("nan"),
    float("inf"), "", "x", "\0", "\ud800", "x" * 10**5, [], {}, [1], {"type": "x"}, [[]], [None], "gpt2", {"0": "a"},
    {"a": 0}, {"0": 5}, ["LlamaForCausalLM"], {"rope_type": "llama3"}, {"rope_type": 5},
    {"rope_type": "llama3", "rope_theta": 0, "factor": 0, "low_freq_factor": 1, "high_freq_factor": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = [save(make(*family), tmp_path_factory.mktemp(family[1])) for family in FAMILIES]
    for folder in made:
        build(read_hf(folder))  # imports what it needs: that is no memory of a config's
    return made


@pytest.mark.parametrize("count", [140, pytest.param(700, marks=pytest.mark.prove)])
def test_a_hostile_config_is_refused_in_one_line(folders, count):
    draw, refused = random.Random(count), 0
    originals = [json.loads((folder / "config.json").read_text()) for folder in folders]
    tracemalloc.start()
    for n in range(count):
        folder, original = folders[n % len(folders)], originals[n % len(folders)]
        values = copy.deepcopy(original)
        for name in draw.sample(list(original), draw.randint(1, 3)):
            if draw.randrange(6):
                values[name] = draw.choice(HOSTILE)
            else:
                values.pop(name)
        (folder / "config.json").write_text(json.dumps(values))
        try:
            build(read_hf(folder))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600 and str(folder) in str(error)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for folder, original in zip(folders, originals, strict=True):
        (folder / "config.json").write_text(json.dumps(original))
    assert count // 2 < refused < count
    assert peak < 100 * 2**20


@pytest.mark.parametrize("depth", [1000, 10**6])
def test_endless_nesting_is_damage(folders, depth):
    original = (folders[0] / "config.json").read_text()
    (folders[0] / "config.json").write_text('{"model_type": "gpt2", "x": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(UserError, match=r"config\.json is damaged: it is not JSON"):
        read_hf(folders[0])
    (folders[0] / "config.json").write_text(original)


# Loads and uses mutants of tokenizer.json in a process of its own: the library can end the one that it is in.
CHILD = """
import json, random, sys
from pathlib import Path
from minillm.config import UserError
from minillm.interop.hf_tokenizer import HFTokenizer
from tests.nests import mutated, places
HOSTILE = [None, True, -1, 0, 1, 2**31, 2**63, 1e308, "", "x", "\\0", [], {}, [1], {"type": "BPE"}, {"type": "nope"},
           "<s>", [["a", "b"]], -5.5, "<0x41>", 10**30]
folders, count = sorted(path for path in Path(sys.argv[1]).iterdir()), int(sys.argv[2])
originals = [json.loads((folder / "tokenizer.json").read_text()) for folder in folders]
ways, report = [places(original, 40) for original in originals], {"opened": 0, "refused": 0, "trouble": []}
for n in range(count):
    folder = folders[n % 3]
    values = mutated(random.Random(n), originals[n % 3], ways[n % 3], HOSTILE, 3)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    try:
        tokenizer = HFTokenizer.load(folder)
        report["opened"] += 1
        try:
            ids = tokenizer.encode("a small text \\u00e9\\u2581 <s>\\n")
            stream = tokenizer.stream_decoder()
            tokenizer.decode(ids), [stream.push(i) for i in ids], tokenizer.wrap("a", "b"), tokenizer.word_starts
        except ValueError:  # a text that this vocabulary takes for a special token
            pass
    except UserError as error:
        report["refused"] += str(folder) in str(error)
    except BaseException as error:
        report["trouble"].append(f"{n}: {error!r}")
print(json.dumps(report))
"""


@pytest.mark.parametrize("count", [150, pytest.param(2400, marks=pytest.mark.prove)])
def test_a_hostile_tokenizer_is_opened_or_refused(tmp_path, count):
    for name, maker in MAKERS.items():
        maker().save(tmp_path / name)
        (tmp_path / name / "roles.json").unlink()
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path, str(count)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"ended by {done.returncode}: {done.stderr[-2000:]}"
    report = json.loads(done.stdout)
    assert report["trouble"] == []
    assert report["opened"] + report["refused"] == count and 0 < report["opened"] < count


@pytest.mark.parametrize(
    ("kind", "way", "value", "said"),
    [
        ("byte-level", ("model", "continuing_subword_prefix"), "\0", "continuing_subword_prefix of a BPE model"),
        ("wordpiece", ("model", "unk_token"), "nowhere", "it is no tokenizer"),
        ("wordpiece", ("model", "vocab"), {}, "is damaged"),
    ],
)
def test_what_ends_the_library_is_refused_before(tmp_path, kind, way, value, said):
    from minillm.interop.hf_tokenizer import HFTokenizer

    MAKERS[kind]().save(tmp_path)
    (tmp_path / "roles.json").unlink()
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values[way[0]][way[1]] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    script = "import sys; from minillm.interop.hf_tokenizer import HFTokenizer; HFTokenizer.load(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr.splitlines()[-1], done.stderr[-500:]
    with pytest.raises(UserError, match=said):
        HFTokenizer.load(tmp_path)

"""The commands from end to end on a machine without a GPU: what can be measured there is, nothing else is written."""

import json

import pytest
import torch

from benchmarks import generation, kernels, records, tokenizer
from benchmarks.__main__ import main
from benchmarks.families import families

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def test_kernels_are_judged_and_compiled_but_not_timed(tmp_path, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr("benchmarks.codegen.run", lambda archs, out, quick: compiled.append((archs, quick)) or 0)
    assert main(["kernels", "--quick", "--family", "swiglu", "--out", str(tmp_path)]) == 0
    assert compiled == [(("sm_90",), True)]
    folder = tmp_path / records.slug(records.device_name())
    assert [path.name for path in folder.iterdir()] == ["correctness.json"]
    rows = records.load(folder / "correctness.json")
    assert [(row["dtype"], row["dir"], row["gate"]) for row in rows] == [
        ("float32", "forward", None), ("float32", "backward", None),
        ("float16", "forward", None), ("float16", "backward", None),
    ]  # fmt: skip
    assert all(row["kernel"] == "swiglu" and row["shape"] == {"M": 7, "F": 100} for row in rows)
    assert all(0 < row["err"]["output 0"]["max"] < 0.01 for row in rows)
    assert not any(name.startswith(("ms_", "frac", "gbps")) for row in rows for name in row)
    assert "No GPU here: nothing is timed" in capsys.readouterr().err
    assert main(["kernels", "--quick", "--family", "swiglu", "--out", str(tmp_path)]) == 0
    assert len(records.load(folder / "correctness.json")) == 4  # replaced, not added


def test_a_kernel_that_fails_its_gate_fails_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.codegen.run", lambda archs, out, quick: 0)
    monkeypatch.setattr("benchmarks.errors.gate", lambda *_: "output 0: wrong")
    assert kernels.run(["swiglu"], tmp_path, quick=True) == 1


def test_what_is_asked_wrongly_is_one_line(tmp_path, capsys):
    assert main(["kernels", "--family", "swigloo", "--out", str(tmp_path)]) == 2
    assert "no kernel family 'swigloo': choose from flash_attention" in capsys.readouterr().err
    assert main(["tune", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "benchmarks: tuning needs the GPU that it tunes for, and there is none here: run it on that machine\n"
    )
    assert main(["generation", "--model", "gpt5", "--out", str(tmp_path)]) == 2
    assert "--model gpt5: no such folder, and no preset" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_case_of_every_scale_counts_its_work():
    for scale in ("full", "quick", "small"):
        for name, cases in families().items():
            keys = []
            for case in cases(scale):
                assert case.work > 0 and case.roof[0] in ("copy", "matmul") and "minillm" in case.providers, name
                keys.append(json.dumps(kernels.identity(case)))
            assert len(keys) == len(set(keys)) > 0, (
                f"{name}: a case is there twice, so that one would never be measured"
            )


def test_generation_beside_transformers(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(generation, "QUICK", generation.QUICK | {"cached": 5, "uncached": 2, "rounds": 2})
    monkeypatch.setattr(generation, "copy_rate", lambda device: 1e9)
    monkeypatch.setattr(generation, "dtypes", lambda device: (torch.float32, torch.bfloat16))
    assert generation.run(["gpt2-tiny", "llama-5m"], tmp_path, quick=True, batches=(1, 3)) == 0
    rows = records.load(tmp_path / records.slug(records.device_name()) / "generation.json")
    tiny = [*generation.pair("gpt2-tiny")["minillm"].parameters()]
    found = [(row["kernel"], row["dtype"], row["shape"]["B"], row["shape"]["cache"], row["provider"]) for row in rows]
    assert found == [
        (f"generate {model}", dtype, batch, cache, who)
        for model in ("gpt2-tiny", "llama-5m")
        for dtype in ("float32", "bfloat16")
        for batch in (1, 3)
        for cache in (True, False)
        for who in ("minillm", "transformers")
    ]
    assert all(0 < row["tokens_p20"] <= row["tokens_p50"] <= row["tokens_p80"] and row["samples"] == 2 for row in rows)
    ours = rows[0]
    assert ours["frac_roof"] == pytest.approx(4 * sum(p.numel() for p in tiny) * ours["tokens_p50"] / 1e9)
    assert "frac_roof" not in rows[2] and rows[4]["frac_roof"] == pytest.approx(
        4 * sum(p.numel() for p in tiny) * rows[4]["tokens_p50"] / 3 / 1e9
    )


def test_texts_that_differ_are_not_timed(tmp_path, monkeypatch, capsys):
    both = {"minillm": lambda *_: [[1]], "transformers": lambda *_: [[2]]}
    monkeypatch.setattr(generation, "generators", lambda models, device: both)
    assert generation.run([], tmp_path, quick=True) == 1
    assert "differ at batch 1" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


def test_the_tokenizers_rows(tmp_path, monkeypatch):
    texts = tokenizer.corpus(60_000)
    size = sum(len(text.encode()) for text in texts)
    assert 60_000 <= size
    monkeypatch.setattr(tokenizer, "corpus", lambda limit: texts)
    assert tokenizer.run(tmp_path, quick=True) == 0
    rows = records.load(tmp_path / records.slug(records.device_name()) / "tokenizer.json")
    speeds = {row["kernel"]: row for row in rows if "mb_p50" in row}
    assert set(speeds) == {f"speed of {what}" for what in ("train", "encode", "encode, all cores", "decode")}
    assert all(row["mb_p20"] <= row["mb_p50"] <= row["mb_p80"] for row in speeds.values())
    whole = next(row for row in rows if row["kernel"] == "compression of its own corpus")
    assert whole["bytes"] == size and whole["bytes_per_token"] == size / whole["tokens"] > 1
    code = next(row for row in rows if row.get("kind") == "Python code")
    assert code["gpt2_bytes_per_token"] == pytest.approx(code["bytes"] / 335)

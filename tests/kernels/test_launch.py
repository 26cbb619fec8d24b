"""Where Triton runs and what it is launched with: the tuned tables, the tuner's override, a machine without Triton."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from kernels import _launch
from kernels._launch import TABLES, architecture, candidate, multiprocessors, runs_triton, shipped, tuned

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it fails, as on macOS
import torch
from kernels.layer_norm import layer_norm
from kernels.rms_norm import rms_norm
from kernels.rope import rope
from kernels.swiglu import geglu, swiglu
x, one = torch.tensor([[3.0, 4.0]]), torch.ones(2)
q, angle = x.view(1, 1, 1, 2), torch.zeros(1, 1)
print(rms_norm(x, one, eps=0.0).mul(12.5**0.5).tolist(), layer_norm(x, one, eps=0.0).tolist())
print(rope(q, q, angle.cos(), angle.sin())[0].tolist(), swiglu(x * 0, x).tolist(), geglu(x * 0, x).tolist())
"""


def test_without_triton_the_references_answer() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    norms, others = (json.loads(f"[{line.replace('] [', '], [')}]") for line in done.stdout.splitlines())
    assert norms[0][0] == pytest.approx([3.0, 4.0]) and norms[1] == [[-1.0, 1.0]]
    assert others == [[[[[3.0, 4.0]]]], [[0.0, 0.0]], [[0.0, 0.0]]]


def test_the_interpreter_takes_cpu_tensors_of_at_most_fp32() -> None:
    assert runs_triton(torch.ones(1), torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.int64))
    assert not runs_triton(torch.ones(1), torch.ones(1, dtype=torch.float64))
    assert not runs_triton(torch.ones(1, device="meta"))
    assert architecture(torch.device("cpu")) == "cpu"


def test_a_chip_is_known_by_its_compilers_name(monkeypatch) -> None:
    chip = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=304)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 1))
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.version, "hip", None)
    assert architecture.__wrapped__(cuda) == "sm_121"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert architecture.__wrapped__(cuda) == "gfx942"
    assert multiprocessors.__wrapped__(cuda) == 304 and multiprocessors.__wrapped__(cpu) == 4


def test_every_table_names_known_dtypes_and_has_a_default() -> None:
    tables = sorted(path.stem for path in TABLES.glob("*.json"))
    assert {"rms_norm_forward", "layer_norm_backward", "rope", "gated_forward"} <= set(tables)
    for kernel in tables:
        rows = json.loads((TABLES / f"{kernel}.json").read_text(encoding="utf-8"))
        assert rows["default"], kernel
        for arch, table in rows.items():
            assert {key.split("/")[-1] for key in table} <= set(_launch.POINTERS), f"{kernel} {arch}"
            assert all(choice["num_warps"] in (1, 2, 4, 8, 16, 32) for choice in table.values()), f"{kernel} {arch}"


def test_an_architecture_of_its_own_goes_before_the_default(tmp_path, monkeypatch) -> None:
    rows = {
        "default": {"n128/float32": {"BLOCK": 128}, "n256/float32": {"BLOCK": 256}},
        "sm_90": {"n128/float32": {"BLOCK": 64}},
    }
    (tmp_path / "toy.json").write_text(json.dumps(rows))
    monkeypatch.setattr(_launch, "TABLES", tmp_path)
    assert tuned("toy", "sm_90", "n128", torch.float32) == {"BLOCK": 64}
    assert tuned("toy", "sm_90", "n256", torch.float32) == {"BLOCK": 256}
    assert tuned("toy", "gfx942", "n128", torch.float32) == {"BLOCK": 128}
    assert shipped("toy", "sm_90") == {"n128/float32": {"BLOCK": 64}, "n256/float32": {"BLOCK": 256}}
    with pytest.raises(ValueError, match=r"toy.json has no row 'n512/float32' for sm_90"):
        tuned("toy", "sm_90", "n512", torch.float32)


def test_a_candidate_holds_for_its_kernel_inside_its_block() -> None:
    arguments = ("cpu", "n128", torch.float32)
    before, other = tuned("rms_norm_forward", *arguments), tuned("rms_norm_backward", *arguments)
    with candidate("rms_norm_forward", {"BLOCK": 1}):
        with candidate("rms_norm_forward", {"BLOCK": 2}):
            assert tuned("rms_norm_forward", *arguments) == {"BLOCK": 2}
        assert tuned("rms_norm_forward", *arguments) == {"BLOCK": 1}
        assert tuned("rms_norm_backward", *arguments) == other
    assert tuned("rms_norm_forward", *arguments) == before
    with pytest.raises(KeyError), candidate("rms_norm_forward", {}):  # a choice that the kernel cannot be launched with
        tuned("rms_norm_forward", *arguments)["BLOCK"]
    assert tuned("rms_norm_forward", *arguments) == before

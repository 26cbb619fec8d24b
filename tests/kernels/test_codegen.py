"""What the compiler makes of the kernels, without a GPU: nothing spills, all fit, wgmma where it must be."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.__main__ import main
from benchmarks.codegen import (
    ARCHITECTURES,
    ROOT,
    _compiled,
    amd_usage,
    collect,
    fault,
    listed,
    nvidia_usage,
    run,
    table,
)

REMEDY = "run `python -m benchmarks kernels --codegen` and commit what it writes"
SAMPLE = 10  # of about 400 for each chip: all of them take minutes
ROW = {
    "kernel": "flash_attention_forward", "case": "flash_attention_forward/d64/bfloat16/causal", "arch": "sm_90",
    "options": {"num_warps": 4, "num_stages": 2}, "registers": 142, "spills": 0, "shared": 40960, "matrix": "wgmma",
}  # fmt: skip


def kernel_names() -> set[str]:
    """Every kernel that has a tuned table."""
    return {path.stem for path in (ROOT / "kernels/tuned").glob("*.json")}


def test_one_configuration_of_each_kernel_compiles_for_sm_90():
    rows = list(collect(["sm_90"], quick=True))
    compiled = {row["kernel"] for row in rows}
    assert kernel_names() <= compiled, f"no case for {kernel_names() - compiled}"
    assert [row["case"] + ": " + row["fault"] for row in rows if row["fault"]] == []
    assert all(16 <= row["registers"] <= 255 and row["arch"] == "sm_90" for row in rows)
    matrix = {row["kernel"]: row["matrix"] for row in rows}
    assert all(matrix[name] == "wgmma" for name in matrix if name.startswith("flash_attention"))
    assert matrix["cross_entropy"] is None and matrix["decode_attention"] == "mma.sync"
    shared = {row["kernel"]: row["shared"] for row in rows}
    assert shared["decode_attention"] >= 64 * 64 * 2 * 2  # a tile of keys and one of values, in bf16


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"spills": 8}, "spills 8 bytes, allowed 0"),
        ({"spills": 64, "case": "flash_attention_forward/d128/float16/causal"}, "spills 64 bytes, allowed 0"),
        ({"spills": 64, "case": "flash_attention_forward/d256/float16/causal"}, None),
        ({"spills": 72, "case": "flash_attention_forward/d256/float16/causal"}, "spills 72 bytes, allowed 64"),
        ({"spills": 8, "kernel": "cross_entropy", "case": "cross_entropy/large/float32"}, "spills 8 bytes, allowed 0"),
        ({"spills": 8, "arch": "gfx942", "matrix": "mfma"}, None),
        ({"shared": 227 * 1024}, None),
        ({"shared": 227 * 1024 + 1}, "232449 bytes of shared memory, of 232448"),
        ({"shared": 164 * 1024, "arch": "sm_80"}, "167936 bytes of shared memory, of 166912"),
        ({"shared": 65 * 1024, "arch": "gfx942"}, "66560 bytes of shared memory, of 65536"),
        ({"matrix": "mma.sync"}, "no wgmma"),
        ({"matrix": "mma.sync", "arch": "sm_80"}, None),
        ({"matrix": "mma.sync", "case": "flash_attention_forward/d128/bfloat16/causal"}, "no wgmma"),
        ({"matrix": "mma.sync", "case": "flash_attention_backward_keys/d256/bfloat16/causal"}, None),
        ({"matrix": None, "case": "flash_attention_forward/d64/float32/causal"}, None),
        ({"matrix": None, "kernel": "rope", "case": "rope/d64/bfloat16"}, None),
    ],
    ids=str,
)
def test_the_rule(change, expected):
    assert fault(ROW | change) == expected


def test_figures_are_read_from_the_binarys_report():
    report = "Resource usage:\n Common:\n  GLOBAL:11\n Function _split:\n  REG:183 STACK:40 SHARED:1024 LOCAL:0\n"
    assert nvidia_usage(report) == {"registers": 183, "spills": 40, "shared": 1024}
    assembly = "  - .agpr_count: 4\n    .group_segment_fixed_size: 32\n    .private_segment_fixed_size: 8\n"
    assembly += "    .sgpr_spill_count: 35\n    .vgpr_count:     178\n    .vgpr_spill_count: 0\n"
    assert amd_usage(assembly) == {"registers": 178, "spills": 8, "shared": 32}


def test_a_row_with_a_fault_fails_the_run_and_is_seen(tmp_path, monkeypatch, capsys):
    good, bad = ROW | {"fault": None}, ROW | {"registers": 255, "spills": 8, "fault": "spills 8 bytes, allowed 0"}
    for rows, code in (([good], 0), ([good, bad], 1)):
        monkeypatch.setattr("benchmarks.codegen.collect", lambda archs, quick, rows=rows: iter(rows))
        assert run(["sm_90"], tmp_path) == code
        assert json.loads((tmp_path / "codegen.json").read_text()) == rows
    assert "2 configurations, 1 with a fault" in capsys.readouterr().out
    header, first, second = table([good, bad]).splitlines()
    assert header.split() == ["arch", "case", "warps", "stages", "registers", "spills", "shared", "matrix", "fault"]
    assert first.split() == ["sm_90", ROW["case"], "4", "2", "142", "0", "40960", "wgmma"]
    assert second.endswith("wgmma   spills 8 bytes, allowed 0")


def test_a_compiler_that_dies_is_not_an_empty_table(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="compiling for sm_90 stopped"):
        list(collect(["sm_90"]))


def test_a_case_that_does_not_compile_is_a_row_with_a_fault():
    row = _compiled(SimpleNamespace(name="rope/d64/bfloat16"), "sm_ninety")
    assert row["fault"] == "does not compile: invalid literal for int() with base 10: 'ninety'"
    assert row["registers"] == 0 and row["matrix"] is None


def test_the_command_hands_its_options_on(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("benchmarks.codegen.run", lambda archs, out, quick: calls.append((archs, out, quick)) or 0)
    assert main(["kernels", "--codegen", "--quick", "--arch", "sm_80", "--out", "somewhere"]) == 0
    assert main(["kernels", "--codegen"]) == 0
    assert calls == [(["sm_80"], Path("somewhere"), True), (ARCHITECTURES, ROOT / "benchmarks/results", False)]
    with pytest.raises(SystemExit, match="2"):
        main(["kernels", "--codegen", "--arch", "sm_1"])
    assert "invalid choice: 'sm_1'" in capsys.readouterr().err


def committed(arch):
    return [row for row in json.loads((ROOT / "benchmarks/results/codegen.json").read_text()) if row["arch"] == arch]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_committed_table_is_of_the_shipped_configurations(arch):
    assert listed(arch) == [(row["case"], row["options"]) for row in committed(arch)], REMEDY
    assert [row["case"] + ": " + row["fault"] for row in committed(arch) if row["fault"]] == []


@pytest.mark.prove
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_sample_compiles_to_the_committed_figures(arch):
    by_case = {row["case"]: row for row in committed(arch)}
    rows = list(collect([arch], sample=SAMPLE))
    assert len(rows) == SAMPLE and [by_case[row["case"]] for row in rows] == rows, REMEDY


def test_rows_of_other_chips_stay_in_the_table(tmp_path, monkeypatch):
    for arch in ("sm_90", "sm_80", "sm_90"):
        row = ROW | {"arch": arch, "fault": None}
        monkeypatch.setattr("benchmarks.codegen.collect", lambda archs, quick, row=row: iter([row]))
        run([arch], tmp_path)
    assert [row["arch"] for row in json.loads((tmp_path / "codegen.json").read_text())] == ["sm_80", "sm_90"]

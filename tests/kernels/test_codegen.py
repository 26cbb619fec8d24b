"""What the compiler makes of the kernels, without a GPU: nothing spills, all fit, wgmma where it must be."""

import json
import os
import subprocess
import sys
from collections import Counter
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
from benchmarks.loops import loops
from kernels._launch import shipped

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


# What a thread's loop may cost, in instructions; what it must and what it must not contain (the starts of their names).
# Each figure is a little above what Triton 3.6 and 3.7 need, and well below what was once spent on masks for whole
# tiles, on exp instead of exp2, on a division for each element, or on the same arithmetic in two layouts.
SPILLS = ("LDL", "STL")
FORWARD = (("HGMMA", "LDGSTS.E.BYPASS.128"), ("HMMA", "FSEL", "LDG.", *SPILLS))
BACKWARD = (("HGMMA", "LDGSTS.E.BYPASS.128", "REDG.E.ADD.F32x4"), ("HMMA", "FSEL", "BSSY", *SPILLS))
NORM = (("LDGSTS.E.BYPASS.128", "STG.E.128"), ("LDG.", *SPILLS))
LOOPS = {  # case, which of its loops -> the most instructions, wanted and unwanted ones
    ("flash_attention_forward/d64/bfloat16/causal", 0): (480, *FORWARD),
    ("flash_attention_forward/d128/bfloat16/causal", 0): (550, *FORWARD),
    ("flash_attention_backward/d64/bfloat16/causal", 0): (430, *BACKWARD),
    ("flash_attention_backward/d128/bfloat16/causal", 0): (380, *BACKWARD),
    ("cross_entropy/large/bfloat16/plain", 0): (150, ("LDG.E.128",), ("BAR", "FSETP.GEU", *SPILLS)),
    ("cross_entropy/large/bfloat16/plain", 1): (175, ("LDG.E.128", "STG.E.128"), ("BAR", "FSETP", *SPILLS)),
    ("rms_norm_backward/n1024/bfloat16", 0): (345, *NORM),
    ("layer_norm_backward/n1024/bfloat16", 0): (455, *NORM),
}


def test_the_loops_that_take_the_time_hold_what_they_must_and_little_else():
    names = dict.fromkeys(name for name, _ in LOOPS)
    command = [sys.executable, "-m", "benchmarks.loops", *names]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    found = {row["case"]: row for row in map(json.loads, answer.splitlines())}
    for (name, which), (most, wanted, unwanted) in LOOPS.items():
        loop = found[name]["loops"][which]
        assert 50 < sum(loop.values()) <= most, f"{name}: {sum(loop.values())} instructions, of {most}: {loop}"
        lacking = [start for start in wanted if not any(instruction.startswith(start) for instruction in loop)]
        beyond = [instruction for instruction in loop if instruction.startswith(unwanted)]
        assert (lacking, beyond) == ([], []), f"{name}: lacks {lacking}, has {beyond}"


def test_loops_are_told_apart_in_a_disassembly():
    assembly = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
    .L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;
    .L_x_0:
        /*0020*/                   FADD R4, R4, R5 ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   BRA `(.L_x_2) ;
        /*0050*/              @UP0 BRA `(.L_x_1) ;
    .L_x_2:
        /*0060*/                   EXIT ;
    .L_x_3:
        /*0070*/                   BRA `(.L_x_3);
    """
    whole, inner = loops(assembly)
    assert whole == Counter({"BRA": 4, "MOV": 1, "LDG.E.128": 1, "FADD": 1, "EXIT": 1})
    assert inner == [Counter({"FADD": 1, "BRA": 1})]


@pytest.mark.parametrize("kernel", ["rms_norm_backward", "layer_norm_backward"])
def test_the_programs_that_stay_resident_fit_a_multiprocessor_together(kernel):
    """Else the last of them start when the first have finished, and every program has as much to do as any other."""
    choices = shipped(kernel, "sm_90")
    for row in (row for row in committed("sm_90") if row["kernel"] == kernel):
        choice = choices[row["case"].removeprefix(f"{kernel}/")]
        registers = 32 * choice["num_warps"] * -(-row["registers"] // 8) * 8  # handed out by 8 to each thread
        assert choice["PER_MULTIPROCESSOR"] * registers <= 64 * 1024, row
        assert choice["PER_MULTIPROCESSOR"] * (row["shared"] + 1024) <= 228 * 1024, row

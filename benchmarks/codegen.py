"""What the compiler makes of every shipped kernel configuration: registers, spills, shared memory, matrix instructions.

Compiling needs no GPU, so a configuration that spills or does not fit is found on any machine. Whether it is right or
fast, this cannot say. Each chip's kernels are compiled in a process of their own, started with TRITON_INTERPRET=0, as
an interpreted kernel cannot be compiled; it reports a JSON line for each case. The figures are read from the binary:
NVIDIA's with cuobjdump, AMD's from the metadata at the end of the assembly.

A row: kernel (its tuned table), case, arch, options, registers (a thread), spills (bytes of stack a thread), shared
(bytes a program), matrix ("wgmma", "tcgen05", "mma.sync", "mfma" or None), fault (None, or what is wrong with it).
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # a program's most
ARCHITECTURES = tuple(SHARED_LIMIT)
WIDEST_WITHOUT_SPILLS = 128  # head width
SPILL_ALLOWANCE = 64  # bytes a thread, for wider heads
MATRIX = ("wgmma", "tcgen05", "mma.sync", "mfma")


def fault(row: Row) -> str | None:
    """What is wrong with a compiled case, in words; None if nothing.

    Shared memory must fit the chip. On NVIDIA nothing spills up to a head width of 128, beyond it at most
    SPILL_ALLOWANCE. On sm_90 flash attention's 16-bit products must be wgmma up to that width, as mma.sync reaches half
    of its rate; beyond it the key blocks of the deterministic backward are 32 rows high, and wgmma takes 64.
    """
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        return f"{row['shared']} bytes of shared memory, of {SHARED_LIMIT[row['arch']]}"
    width = re.search(r"/d(\d+)/", row["case"])
    wide = width is not None and int(width[1]) > WIDEST_WITHOUT_SPILLS
    allowed = SPILL_ALLOWANCE if wide else 0
    if row["arch"].startswith("sm_") and row["spills"] > allowed:
        return f"spills {row['spills']} bytes, allowed {allowed}"
    sixteen_bit = "float16" in row["case"]  # bfloat16 too
    if row["arch"] == "sm_90" and row["kernel"].startswith("flash_attention") and sixteen_bit and not wide:
        return None if row["matrix"] == "wgmma" else "no wgmma"
    return None


def nvidia_usage(report: str) -> dict[str, int]:
    """Registers, spills and static shared memory from `cuobjdump --dump-resource-usage`."""
    found = dict(re.findall(r"\b(REG|STACK|SHARED):(\d+)", report))
    return {"registers": int(found["REG"]), "spills": int(found["STACK"]), "shared": int(found["SHARED"])}


def amd_usage(assembly: str) -> dict[str, int]:
    """The same from AMDGCN assembly; spills are the scratch memory of a thread, registers the vector ones."""
    found = dict(re.findall(r"^\s*-?\s*\.(vgpr_count|private_segment_fixed_size|group_segment_fixed_size):\s*(\d+)",
                            assembly, re.MULTILINE))  # fmt: skip
    return {
        "registers": int(found["vgpr_count"]),
        "spills": int(found["private_segment_fixed_size"]),
        "shared": int(found["group_segment_fixed_size"]),
    }


def listed(arch: str) -> list[tuple[str, dict[str, int]]]:
    """Name and launch options of every shipped configuration, in the order of the table, without compiling any."""
    return [(case.name, case.options) for case in shipped_cases(arch)]


def collect(archs: Sequence[str], *, quick: bool = False, sample: int | None = None) -> Iterator[Row]:
    """Rows of every shipped configuration for each chip; `quick` takes one of each kernel, `sample` so many of all.

    What was compiled before, Triton finds again in its own cache. Raises RuntimeError with the compiling process's
    last words if it dies.
    """
    for arch in archs:
        some = "quick" if quick else "all" if sample is None else str(sample)
        command = [sys.executable, "-m", "benchmarks.codegen", arch, some]
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            ) as process,
        ):
            assert process.stdout is not None
            yield from map(json.loads, process.stdout)
            if process.wait():
                errors.seek(0)
                raise RuntimeError(f"compiling for {arch} stopped:\n{errors.read()[-4000:]}")


def run(archs: Sequence[str], out: Path, *, quick: bool = False) -> int:
    """Compile, print the table, write out/codegen.json; 1 if a row has a fault, else 0.

    Rows of other chips that stand in the file already stay there, so that it can be made chip by chip.
    """
    rows: list[Row] = []
    for row in collect(archs, quick=quick):
        rows.append(row)
        print(f"\r{len(rows)} compiled: {row['arch']} {row['case']:<70.70}", end="", file=sys.stderr)
    print(file=sys.stderr)
    print(table(rows))
    path = out / "codegen.json"
    out.mkdir(parents=True, exist_ok=True)
    kept = [row for row in _read(path) if row["arch"] not in archs]
    written = sorted(kept + rows, key=lambda row: ARCHITECTURES.index(row["arch"]))  # stable within a chip
    lines = ",\n".join(f"  {json.dumps(row)}" for row in written)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    faults = [row for row in rows if row["fault"]]
    print(f"\n{len(rows)} configurations, {len(faults)} with a fault. Written to {path}")
    return 1 if faults else 0


def _read(path: Path) -> list[Row]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def table(rows: list[Row]) -> str:
    """The rows as text, one line each."""
    names = ("arch", "case", "warps", "stages", "registers", "spills", "shared", "matrix", "fault")
    cells = [names] + [
        (
            row["arch"],
            row["case"],
            *(str(row["options"].get(name, "")) for name in ("num_warps", "num_stages")),
            *(str(row[name]) for name in ("registers", "spills", "shared")),
            row["matrix"] or "",
            row["fault"] or "",
        )
        for row in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    numbers = range(2, 7)

    def line(row: tuple[str, ...]) -> str:
        columns = zip(row, widths, strict=True)
        return "  ".join(
            cell.rjust(w) if i in numbers else cell.ljust(w) for i, (cell, w) in enumerate(columns)
        ).rstrip()

    return "\n".join(map(line, cells))


def _compile_all(arch: str, some: str) -> None:
    """The compiling process: a JSON line on stdout for each case; `some` is "all", "quick" or a number of them."""
    cases = _chosen(arch) if some == "quick" else list(shipped_cases(arch))
    if some.isdigit():
        cases = random.Random(0).sample(cases, min(int(some), len(cases)))
    for case in cases:
        row = {"kernel": case.name.split("/")[0], "case": case.name, "arch": arch, "options": case.options}
        print(json.dumps(row | _compiled(case, arch)), flush=True)


def shipped_cases(arch: str) -> Iterator[Any]:
    """Every case of every kernel file, in the order of the table: `AotCase`s of kernels/_launch.py."""
    import importlib

    for path in sorted((ROOT / "kernels").glob("[a-z]*.py")):
        module = importlib.import_module(f"kernels.{path.stem}")
        if hasattr(module, "aot_cases"):
            yield from module.aot_cases(arch)


def _chosen(arch: str) -> list[Any]:
    """One case of each kernel: bf16, and head width 64 where there are head widths."""
    chosen: dict[str, Any] = {}
    for case in sorted(shipped_cases(arch), key=lambda case: ("bfloat16" not in case.name, "/d64/" not in case.name)):
        chosen.setdefault(case.name.split("/")[0], case)
    return list(chosen.values())


def _compiled(case: Any, arch: str) -> Row:
    from kernels._launch import compile_ahead

    nothing = {"registers": 0, "spills": 0, "shared": 0, "matrix": None}
    try:
        compiled = compile_ahead(case, arch)
    except Exception as error:  # whatever the compiler raises is this row's finding
        return nothing | {"fault": f"does not compile: {str(error).strip().splitlines()[-1]}"}
    assembly = compiled.asm["amdgcn"] if "amdgcn" in compiled.asm else compiled.asm["ptx"]
    usage = amd_usage(assembly) if "amdgcn" in compiled.asm else nvidia_usage(_cuobjdump(compiled.asm["cubin"]))
    usage["shared"] = max(usage["shared"], compiled.metadata.shared)  # the launcher asks for most of it
    row = usage | {"matrix": next((name for name in MATRIX if name in assembly), None)}
    kernel = {"kernel": case.name.split("/")[0], "case": case.name, "arch": arch}
    return row | {"fault": fault(row | kernel)}


def _cuobjdump(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    _compile_all(*sys.argv[1:])

"""python -m benchmarks.loops CASE [CASE ...]: which instructions an sm_90 kernel spends its time on, without a GPU.

A kernel's time goes into its loops. For each shipped case named (`rms_norm_backward/n1024/bfloat16`: "case" of a row of
results/codegen.json) this compiles it, takes the binary apart with nvdisasm, and reports a JSON line:
{"case": …, "threads": of a program, "whole": {instruction: times it stands in the kernel}, "loops": [the same of each
innermost loop, in the order of the program]}. Instructions that a predicate skips count too.

Divided by the elements that a thread works on, a loop's sum is what an element costs; a multiprocessor starts four
instructions of 32 threads a cycle. As compiling needs the real compiler, start it without TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ARCH = "sm_90"


def loops(assembly: str) -> tuple[Counter[str], list[Counter[str]]]:
    """Instructions of the whole of nvdisasm's output, and of each loop that has no other one within it."""
    names: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in assembly.splitlines():
        if label := re.match(r"\.(L_x_\d+):", line.strip()):
            labels[label[1]] = len(names)
        if instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*);", line):
            target = re.search(r"`\(\.(L_x_\d+)\)", instruction[2])
            # Back over at least one instruction: a branch to itself fills up the end of every kernel.
            if instruction[1] == "BRA" and target and labels.get(target[1], len(names)) < len(names):
                spans.append((labels[target[1]], len(names) + 1))
            names.append(instruction[1])
    innermost = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return Counter(names), [Counter(names[start:stop]) for start, stop in innermost]


def disassembled(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout


def main(names: Sequence[str]) -> None:
    """Print a line for each case of these names. Raises ValueError for a name that no shipped case has."""
    from benchmarks.codegen import shipped_cases
    from kernels._launch import compile_ahead

    cases = {case.name: case for case in shipped_cases(ARCH)}
    for name in names:
        if name not in cases:
            raise ValueError(
                f"there is no case {name!r} for {ARCH}: the names stand in benchmarks/results/codegen.json"
            )
        whole, inner = loops(disassembled(compile_ahead(cases[name], ARCH).asm["cubin"]))
        row = {"case": name, "threads": 32 * cases[name].options["num_warps"], "whole": whole, "loops": inner}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

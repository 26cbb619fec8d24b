"""Kernel tests run under Triton's interpreter; what needs the real compiler runs in a subprocess (`ahead`)."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # counts only before triton is imported for the first time

import subprocess
import sys
from collections.abc import Callable

import pytest

COMPILE = """
import importlib, sys
from kernels._launch import compile_ahead
module, arch, *names = sys.argv[1:]
cases = [c for c in importlib.import_module(module).aot_cases(arch) if not names or c.name in names]
for case in cases:
    compiled = compile_ahead(case, arch)
    print(case.name, "ptx" in compiled.asm or "amdgcn" in compiled.asm)
"""


@pytest.fixture
def compile_ahead_of_time() -> Callable[..., list[str]]:
    """`f("kernels.rms_norm", "sm_90", *case_names)` compiles those cases (all without names); returns their names.

    Fails with the compiler's message where one does not compile, or where a case name does not exist.
    """

    def compile_cases(module: str, arch: str, *names: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, module, arch, *names],
            env={**os.environ, "TRITON_INTERPRET": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        lines = [line.split() for line in done.stdout.splitlines()]
        assert lines and all(compiled == "True" for _, compiled in lines), done.stdout
        assert not names or {name for name, _ in lines} == set(names), f"compiled {lines}, asked for {names}"
        return [name for name, _ in lines]

    return compile_cases

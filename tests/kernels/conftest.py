"""Kernel tests run under Triton's interpreter; what needs the real compiler runs in a subprocess."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # counts only before triton is imported for the first time

import subprocess
import sys
from collections.abc import Callable

import pytest

COMPILE = """
import importlib, sys
from kernels._launch import compile_ahead
module, arch, name = sys.argv[1:]
[case] = [case for case in importlib.import_module(module).aot_cases(arch) if case.name == name]
print(compile_ahead(case, arch).asm["ptx"])
"""


@pytest.fixture
def ptx() -> Callable[[str, str, str], str]:
    """`ptx("kernels.rms_norm", "sm_90", case_name)`: what NVIDIA's assembler gets for that shipped configuration."""

    def compile_case(module: str, arch: str, name: str) -> str:
        command = [sys.executable, "-c", COMPILE, module, arch, name]
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return compile_case

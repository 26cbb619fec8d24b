"""No kernel touches what lies beside its tensors: those around unreadable pages in tests/kernels/guarded.py."""

import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="guards pages with Linux's mprotect")
def test_no_operator_reads_or_writes_beside_its_tensors() -> None:
    command = [sys.executable, "-m", "tests.kernels.guarded"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "nothing beyond any tensor\n"), done.stderr

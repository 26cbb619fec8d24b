"""Where the `minillm` command's output goes: to a reader that has gone, to a full disk, nowhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.cli import run

FULL = "error: the disk is full (while writing); make room\n"


def helped(redirected: str, *, buffered: bool) -> subprocess.CompletedProcess[str]:
    """`minillm --help` in a shell that redirects its output."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    env |= {} if buffered else {"PYTHONUNBUFFERED": "1"}
    command = ["bash", "-c", redirected, "bash", sys.executable, "-m", "minillm.cli", "--help"]
    root = Path(__file__).parents[1]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=root, timeout=60)


@pytest.mark.parametrize("buffered", [True, False])
def test_output_that_nobody_takes_is_no_traceback(buffered: bool) -> None:
    gone = helped('{ sleep 0.2; "$@"; echo "ended with $?" >&2; } | true', buffered=buffered)
    assert gone.stderr == "ended with 0\n"
    full = helped('"$@" >/dev/full', buffered=buffered)
    assert (full.returncode, full.stderr) == (2, FULL)
    closed = helped('"$@" <&- >&-', buffered=buffered)
    assert (closed.returncode, closed.stdout, closed.stderr) == (0, "", "")


def test_a_locale_of_ascii_takes_names_and_texts_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "é").mkdir()
    command = [sys.executable, "-m", "minillm.cli", "doctor", f"{tmp_path}/é/漢"]
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, capture_output=True, env=env, cwd=Path(__file__).parents[1], timeout=60)
    assert done.returncode == 2 and f"error: {tmp_path}/é/漢 holds no run" in done.stderr.decode()


def test_what_is_no_utf8_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", ["--out", "r/x\udce9"]) == 2
    assert capsys.readouterr().err == (
        "error: the argument 'r/x\\udce9' is not UTF-8; rename the file, or write the text in UTF-8\n"
    )
    shown = helped('PYTHONIOENCODING=ascii "$@"', buffered=True)
    assert shown.returncode == 2 and shown.stderr == (
        "error: '\\u2026' cannot be shown in ascii; set PYTHONIOENCODING=utf-8\n"
    )

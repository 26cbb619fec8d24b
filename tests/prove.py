"""`python -m tests.prove`: runs the slow proofs and writes down what they were run on.

tests/proof.json then says which sources passed: a SHA-256 for each room over its tracked Python files. The ordinary
tests hold it against the sources as they are, so that a change to proven code asks for a new proof.
"""

import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROOF = ROOT / "tests" / "proof.json"
ROOMS = ("kernels", "tokenizer", "minillm", "benchmarks", "tests", "train.py")
REMEDY = "run `make prove` and commit tests/proof.json"


def sources(root: Path = ROOT) -> dict[str, str]:
    """SHA-256 of each room's Python files that git tracks, names and contents, as they stand in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *ROOMS], cwd=root, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    hashes: dict[str, Any] = {}
    for name in sorted(name for name in listed if name.endswith(".py") and (root / name).exists()):
        content = hashlib.sha256((root / name).read_bytes()).hexdigest()
        hashes.setdefault(name.split("/")[0], hashlib.sha256()).update(f"{name} {content}\n".encode())
    return {room: hashed.hexdigest() for room, hashed in sorted(hashes.items())}


def outdated(proof: dict[str, Any], now: dict[str, str]) -> list[str]:
    """The rooms that are not as they were proven: changed, new or gone."""
    then = proof["sources"]
    return sorted(room for room in {*then, *now} if then.get(room) != now.get(room))


def results(report: Path) -> dict[str, Any]:
    """Counts, and for each file its own, from pytest's JUnit report."""
    counts = Counter(passed=0, failed=0, skipped=0)
    files: dict[str, dict[str, Any]] = {}
    failures: list[str] = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        outcomes = {child.tag for child in case}
        outcome = "failed" if outcomes & {"failure", "error"} else "skipped" if "skipped" in outcomes else "passed"
        counts[outcome] += 1
        name = case.get("classname") or case.get("name") or "?"
        file = files.setdefault(name, {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0})
        file[outcome] += 1
        file["seconds"] += float(case.get("time", 0))
        if outcome == "failed":
            failures.append(f"{name}::{case.get('name')}")
    rounded = {name: {**file, "seconds": round(file["seconds"], 1)} for name, file in sorted(files.items())}
    return {**counts, "failures": failures, "files": rounded}


def main(argv: list[str]) -> int:
    """Runs `pytest -m prove`, arguments of `argv` added; 0 where everything passed."""
    begun, before = time.monotonic(), sources()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "prove", "--durations=25", "--timeout=3600"]
        code = subprocess.run([*command, f"--junitxml={report}", *argv], cwd=ROOT, check=False).returncode
        if not report.exists():
            print(f"error: pytest ended with {code} and no report; nothing was written", file=sys.stderr)
            return code or 1
        found = results(report)
    if argv:  # a selection proves nothing about the rest
        print("a selection ran; tests/proof.json is left as it was")
        return code
    if sources() != before:
        print("error: the sources changed while they were being proven; run it again", file=sys.stderr)
        return 1
    proof = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "triton", "numpy", "sentencepiece")},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "exit": code,
        "seconds": round(time.monotonic() - begun),
        **found,
        "sources": before,
    }
    PROOF.write_text(json.dumps(proof, indent=2) + "\n", encoding="utf-8")
    print(f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped: {PROOF.relative_to(ROOT)}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

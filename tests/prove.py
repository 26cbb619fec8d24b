"""`python -m tests.prove [PART …]`: runs the slow proofs that are out of date, and writes down what they were run on.

tests/proof.json says for each part which sources passed: a SHA-256 over the tracked files that the part covers. The
ordinary tests hold it against the files as they are, so that a change to proven code asks for that part's proof again.
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
REMEDY = "run `make prove` and commit tests/proof.json"

PARTS: dict[str, dict[str, list[str]]] = {
    "kernels": {"tests": ["tests/kernels"], "covers": ["kernels", "tests/kernels", "benchmarks/codegen.py"]},
    "model": {
        "tests": ["tests/model", "tests/test_ops.py"],
        "covers": ["minillm/model", "minillm/ops.py", "minillm/cpu.py", "tests/model", "tests/test_ops.py"],
    },
    "data": {"tests": ["tests/data"], "covers": ["minillm/data", "tests/data"]},
    "hostile": {
        "tests": ["tests/test_hostile.py", "tests/interop", "tests/tokenizer"],
        "covers": [
            *("tokenizer", "minillm/loading.py", "minillm/interop", "minillm/tasks", "minillm/config"),
            *("tests/test_hostile.py", "tests/nests.py", "tests/interop", "tests/tokenizer"),
        ],
    },
    "training": {
        "tests": ["tests/training", "tests/test_preflight.py"],
        "covers": ["minillm/training", "minillm/preflight.py", "tests/training", "tests/test_preflight.py"],
    },
}
"""Where the slow tests of each part are, and which files (Python and JSON) a change to makes them due again."""


def sources(part: str, root: Path = ROOT) -> str:
    """SHA-256 of the tracked files that the part covers, names and contents, as they stand in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *PARTS[part]["covers"]], cwd=root, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    whole = hashlib.sha256()
    for name in sorted(name for name in listed if name.endswith((".py", ".json")) and (root / name).exists()):
        whole.update(f"{name} {hashlib.sha256((root / name).read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def due(proofs: dict[str, Any], root: Path = ROOT) -> list[str]:
    """The parts that were never proven, failed, or have changed since."""
    return [
        part
        for part in PARTS
        if part not in proofs or proofs[part]["exit"] != 0 or proofs[part]["sources"] != sources(part, root)
    ]


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


def prove(part: str) -> dict[str, Any] | None:
    """Runs one part's slow tests; what proof.json says of it, or None where pytest did not get to its end."""
    begun, before = time.monotonic(), sources(part)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "prove",
            "--durations=15",
            "--timeout=3600",
            "-n",
            "auto",
            *PARTS[part]["tests"],
        ]
        code = subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, check=False).returncode
        if not report.exists():
            print(f"error: {part}: pytest ended with {code} and no report; nothing was written", file=sys.stderr)
            return None
        found = results(report)
    if sources(part) != before:
        print(f"error: {part}: the sources changed while they were being proven; run it again", file=sys.stderr)
        return None
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "triton", "numpy", "sentencepiece")},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "exit": code,
        "seconds": round(time.monotonic() - begun),
        **found,
        "sources": before,
    }


def recorded() -> dict[str, Any]:
    return json.loads(PROOF.read_text(encoding="utf-8")) if PROOF.exists() else {}


def main(argv: list[str]) -> int:
    """Proves the parts named in argv, or those that are due; 0 where all of them passed."""
    if unknown := [part for part in argv if part not in PARTS]:
        print(f"error: there is no part {unknown[0]}; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    failed = False
    for part in argv or due(recorded()):
        proof = prove(part)
        failed |= proof is None or proof["exit"] != 0
        if proof is not None:
            proofs = {**recorded(), part: proof}  # read again: another part may have been proven meanwhile
            PROOF.write_text(json.dumps(proofs, indent=1) + "\n", encoding="utf-8")
            print(f"{part}: {proof['passed']} passed, {proof['failed']} failed, {proof['skipped']} skipped")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

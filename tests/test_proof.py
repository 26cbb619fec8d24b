"""The slow proofs passed, and on these very sources."""

import json
import subprocess

import pytest

from tests import prove
from tests.prove import PARTS, PROOF, REMEDY, ROOT, due, results, sources


def test_the_proof_is_of_these_sources():
    if not (ROOT / ".git").exists():
        pytest.skip("no git history here: which files count is not known")
    assert PROOF.exists(), f"tests/proof.json is missing: {REMEDY}"
    proofs = json.loads(PROOF.read_text(encoding="utf-8"))
    for part in PARTS:
        assert part in proofs, f"{part}: never proven: {REMEDY}"
        assert proofs[part]["failed"] == 0, (
            f"{part}: proofs failed ({proofs[part]['failures']}): mend them, then {REMEDY}"
        )
        assert proofs[part]["passed"] > 0, f"{part}: nothing was proven: {REMEDY}"
    changed = due(proofs)
    assert not changed, f"changed since the proof: {', '.join(changed)}; {REMEDY}"


def test_every_slow_test_belongs_to_a_part():
    marked = subprocess.run(
        ["grep", "-rl", "--include=test_*.py", "mark.prove", "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    homes = tuple(home for part in PARTS.values() for home in part["tests"])
    assert marked
    assert [name for name in marked if not name.startswith(homes) and name != "tests/test_proof.py"] == []


def repository(folder, files):
    subprocess.run(["git", "init", "-q", folder], check=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    subprocess.run(["git", "-C", folder, "add", "."], check=True)


def test_a_change_makes_its_part_due(tmp_path, monkeypatch):
    parts = {"one": {"tests": [], "covers": ["kernels"]}, "two": {"tests": [], "covers": ["minillm", "train.py"]}}
    monkeypatch.setattr(prove, "PARTS", parts)
    repository(
        tmp_path, {"kernels/a.py": "1", "kernels/b.json": "2", "minillm/x/c.py": "3", "train.py": "4", "d.py": "5"}
    )
    proofs = {part: {"exit": 0, "sources": sources(part, tmp_path)} for part in parts}
    assert due(proofs, tmp_path) == []
    assert due({**proofs, "one": {**proofs["one"], "exit": 1}}, tmp_path) == ["one"]
    assert due({"one": proofs["one"]}, tmp_path) == ["two"]

    (tmp_path / "kernels/b.json").write_text("2 ")
    assert due(proofs, tmp_path) == ["one"]
    (tmp_path / "kernels/b.json").write_text("2")
    (tmp_path / "kernels/untracked.py").write_text("")
    (tmp_path / "d.py").write_text("6")
    assert due(proofs, tmp_path) == []
    (tmp_path / "kernels/a.py").rename(tmp_path / "kernels/z.py")
    subprocess.run(["git", "-C", tmp_path, "add", "kernels/z.py"], check=True)
    (tmp_path / "train.py").unlink()
    assert due(proofs, tmp_path) == ["one", "two"]


def test_results_are_counted_by_file(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.test_a" name="one" time="1.28"/>
        <testcase classname="tests.test_a" name="two" time="0.5"><failure message="no"/></testcase>
        <testcase classname="tests.test_b" name="three" time="2"><skipped/></testcase>
        <testcase classname="" name="tests.test_c" time="0"><error message="import"/></testcase>
        </testsuite></testsuites>"""
    )
    found = results(report)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    assert found["failures"] == ["tests.test_a::two", "tests.test_c::tests.test_c"]
    assert found["files"]["tests.test_a"] == {"passed": 1, "failed": 1, "skipped": 0, "seconds": 1.8}
    assert list(found["files"]) == ["tests.test_a", "tests.test_b", "tests.test_c"]

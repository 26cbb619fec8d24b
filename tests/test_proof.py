"""The slow proofs passed, and on these very sources."""

import json
import subprocess

import pytest

from tests.prove import PROOF, REMEDY, ROOT, outdated, results, sources


def test_the_proof_is_of_these_sources():
    if not (ROOT / ".git").exists():
        pytest.skip("no git history here: which files count is not known")
    assert PROOF.exists(), f"tests/proof.json is missing: {REMEDY}"
    proof = json.loads(PROOF.read_text(encoding="utf-8"))
    assert proof["failed"] == 0 and proof["exit"] == 0, f"proofs failed ({proof['failures']}): mend them, then {REMEDY}"
    assert proof["passed"] > 0, f"nothing was proven: {REMEDY}"
    changed = outdated(proof, sources())
    assert not changed, f"changed since the proof: {', '.join(changed)}; {REMEDY}"


def repository(folder, files):
    subprocess.run(["git", "init", "-q", folder], check=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    subprocess.run(["git", "-C", folder, "add", "."], check=True)


def test_a_change_names_its_room(tmp_path):
    repository(
        tmp_path, {"kernels/a.py": "1", "minillm/b.py": "2", "minillm/x/c.py": "3", "train.py": "4", "d.py": "5"}
    )
    before = sources(tmp_path)
    assert sorted(before) == ["kernels", "minillm", "train.py"]
    assert sources(tmp_path) == before and outdated({"sources": before}, before) == []

    (tmp_path / "minillm/x/c.py").write_text("3 ")
    assert outdated({"sources": before}, sources(tmp_path)) == ["minillm"]
    (tmp_path / "minillm/x/c.py").write_text("3")
    (tmp_path / "kernels/untracked.py").write_text("")
    (tmp_path / "d.py").write_text("6")
    assert sources(tmp_path) == before
    (tmp_path / "kernels/a.py").rename(tmp_path / "kernels/z.py")
    subprocess.run(["git", "-C", tmp_path, "add", "kernels/z.py"], check=True)
    (tmp_path / "train.py").unlink()
    assert outdated({"sources": before}, sources(tmp_path)) == ["kernels", "train.py"]


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

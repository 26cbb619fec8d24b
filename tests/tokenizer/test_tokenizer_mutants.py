"""Models that were changed on purpose, with hashes that fit: SentencePiece parses them, and nothing crashes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tokenizer import train

# Loads and uses mutants in a process of its own, which a crash would end. One in three is cut and stretched, which the
# parser finds; the others are changed in a byte or two, which often leaves a model.
CHILD = """
import hashlib, json, random, re, sys, time
from pathlib import Path
from tokenizer import DamagedFile, Tokenizer
from tokenizer.tokenizer import manifest_hash
folder, mutants = Path(sys.argv[1]), int(sys.argv[2])
model, manifest = (folder / "tokenizer.model").read_bytes(), json.loads((folder / "manifest.json").read_text())
report = {"opened": 0, "refused": 0, "slowest": 0.0, "trouble": []}
for n in range(mutants):
    draw, raw = random.Random(n), bytearray(model)
    for _ in range(draw.randint(1, 2) if n % 3 else draw.randint(1, 6)):
        at, kind = draw.randrange(len(raw)), 0 if n % 3 else draw.randrange(4)
        if kind == 0:
            raw[at] = draw.randrange(256)
        elif kind == 1:
            del raw[at : at + draw.randint(1, 30)]
        elif kind == 2:
            raw[at:at] = draw.randbytes(draw.randint(1, 30))
        else:
            start = draw.randrange(len(raw))
            raw[at:at] = raw[start : start + draw.randint(1, 200)]
    fitting = {**manifest, "model_sha256": hashlib.sha256(raw).hexdigest()}
    (folder / "tokenizer.model").write_bytes(raw)
    (folder / "manifest.json").write_text(json.dumps({**fitting, "sha256": manifest_hash(fitting)}))
    begun = time.process_time()
    try:
        tokenizer = Tokenizer.load(folder)
        tokenizer.decode(tokenizer.encode("a small text \\u00e9\\u2581\\u4f60 \\n"))
        report["opened"] += 1
    except DamagedFile as damage:
        report["refused"] += str(folder / "tokenizer.model") in str(damage)
    except Exception as error:
        report["trouble"].append(f"{n}: {error!r}")
    report["slowest"] = max(report["slowest"], time.process_time() - begun)
# Not ru_maxrss, which a larger parent hands down.
report["mb"] = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
print(json.dumps(report))
"""


@pytest.mark.parametrize("mutants", [200, pytest.param(2000, marks=pytest.mark.prove)])
def test_mutants_of_a_model_are_opened_or_refused(tmp_path: Path, mutants: int) -> None:
    train(["a small text, to make small files\n"] * 5, vocab_size=300).save(tmp_path)
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path, str(mutants)], capture_output=True, text=True)
    assert done.returncode == 0, f"ended by {done.returncode}: {done.stderr[-2000:]}"
    report = json.loads(done.stdout)
    assert report["trouble"] == []
    assert report["opened"] + report["refused"] == mutants and 0 < report["opened"] < mutants
    assert report["slowest"] < 2 and report["mb"] < 1000

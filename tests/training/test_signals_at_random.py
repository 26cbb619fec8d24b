"""Signals at moments that nobody chose: in preparing, in a step, in a validation, in a save."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.running import ROOT

# Forks a run for each signal, so that torch is imported once; then goes on with what is left until it is finished.
SENDER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from minillm.cli import run as command
from minillm.training import checkpoint
from tests.training.running import TINY, losses, write_text
folder, count = Path(sys.argv[1]), int(sys.argv[2])
text, run = write_text(folder / "text.txt"), folder / "run"
argv = ["--data", str(text), "--out", str(run), *TINY, "--steps", "60", "--train.eval-every", "9"]
argv += ["--train.save-every", "4", "--model.dropout", "0.1", "--train.micro-batch", "2"]
draw, report = random.Random(count), {"codes": {}, "where": {}, "slowest": 0.0, "trouble": []}

def start(argv):
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        for stream in (1, 2):
            os.dup2(os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        code = 99
        try:
            code = command("train", argv)
        finally:
            os._exit(code)
    return child

def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def weights(run):
    return checkpoint.load_weights(checkpoint.resolve(run))

assert wait(start(argv)) == 0, (folder / "log").read_text()
shutil.move(run, folder / "whole")
expected, end = losses(folder / "whole"), weights(folder / "whole")
begun = time.monotonic()
assert wait(start(argv)) == 0
usual = time.monotonic() - begun
for n in range(count):
    shutil.rmtree(run)
    number = (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[n % 5]
    child = start(argv)
    while not run.exists():
        time.sleep(0.001)
    time.sleep(draw.uniform(0, usual))
    os.kill(child, number)
    sent = time.monotonic()
    code = wait(child)
    if code:
        report["slowest"] = max(report["slowest"], time.monotonic() - sent)
    report["codes"][code] = report["codes"].get(code, 0) + 1
    if code not in (0, {signal.SIGTERM: 143, signal.SIGINT: 130}.get(number)):
        report["trouble"].append(f"{n}: {code} after {number}: {(folder / 'log').read_text()[-300:]}")
    begun = "training" if (run / "metrics.jsonl").exists() else "before"
    report["where"][begun] = report["where"].get(begun, 0) + (code != 0)
    if code and (code := wait(start(["--resume", str(run)] if (run / "config.json").exists() else argv))):
        report["trouble"].append(f"{n}: {code} on resuming: {(folder / 'log').read_text()[-300:]}")
    found = weights(run)
    if losses(run) != expected or any(not torch.equal(found[name], end[name]) for name in end):
        report["trouble"].append(f"{n}: other numbers after {number}")
    if any(path.name.endswith((".tmp", ".replaced")) for path in (run / "checkpoints").iterdir()):
        report["trouble"].append(f"{n}: something half-written is left")
print(json.dumps(report))
"""


@pytest.mark.prove
def test_a_signal_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SENDER, tmp_path, "50"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["trouble"] == []
    assert min(report["codes"][code] for code in ("130", "143")) >= 8, report
    assert min(report["where"].values()) >= 4, report
    assert report["slowest"] < 10, report  # a step, or a file: what was begun is finished

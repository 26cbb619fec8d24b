"""An unmodified nanoGPT beside us: prepared, trained and timed by its own code, scored by our rule.

nanoGPT reads its data from inside its own folder, so it works in a copy; the checkout given stays as it is. Its
prepare.py imports `requests` to download a text, which lies there already: an empty module of that name will do.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.records import Row

PEER = "nanoGPT"
CONTEXT = 64
SETTINGS = [  # "I only have a macbook" of its README; `steps` takes the place of its 2000
    "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1",
    f"--block_size={CONTEXT}", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0",
]  # fmt: skip
PREPARE = (
    "import runpy, sys, types; sys.modules['requests'] = types.ModuleType('requests'); "
    "runpy.run_path('data/shakespeare_char/prepare.py', run_name='__main__')"
)
SCORE = """
import sys, numpy, torch
from model import GPT, GPTConfig
saved = torch.load("out-shakespeare-char/ckpt.pt", weights_only=True)
model = GPT(GPTConfig(**saved["model_args"])).eval()
model.load_state_dict(saved["model"])
ids = torch.from_numpy(numpy.fromfile("data/shakespeare_char/val.bin", numpy.uint16).astype(numpy.int64))
T, total = int(sys.argv[1]), 0.0
for at in range(0, len(ids) - 1, T):
    x, y = ids[at : at + T][: len(ids) - 1 - at].unsqueeze(0), ids[at + 1 : at + 1 + T].unsqueeze(0)
    with torch.no_grad():
        total += model(x, y)[1].item() * y.numel()
print(total / (len(ids) - 1), len(ids) - 1)
"""
"""Consecutive windows that do not overlap; every target counts once, the short last window's too.

nanoGPT knows no other format than torch.save's: the file is the one that its own run has just written, and with
`weights_only` it is read without running what a pickle may hold.
"""


def train_nanogpt(checkout: Path, text: Path, work: Path, *, steps: int) -> Row:
    """Trains it on `text` and scores its best checkpoint. Raises ValueError where one of its programs fails."""
    if not (checkout / "train.py").is_file():
        raise ValueError(f"{checkout} is no nanoGPT: it has no train.py; --nanogpt names a checkout of it")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(checkout, work, ignore=shutil.ignore_patterns(".git", "out-*"))
    shutil.copy(text, work / "data/shakespeare_char/input.txt")
    _python(work, "-c", PREPARE)
    length = [f"--max_iters={steps}", f"--lr_decay_iters={steps}", *(["--eval_interval=10"] if steps < 250 else [])]
    began = time.perf_counter()
    _python(work, "train.py", *SETTINGS, *length)
    wall = time.perf_counter() - began
    loss, targets = _python(work, "-c", SCORE, str(CONTEXT)).splitlines()[-1].split()  # its model prints its size first
    return {
        "kernel": PEER, "wall": wall, "loss": float(loss), "targets": int(targets), "settings": [*SETTINGS, *length],
        "tokens": steps * 12 * CONTEXT, "peer_commit": _commit(checkout),
    }  # fmt: skip


def _python(work: Path, *argv: str) -> str:
    ended = subprocess.run([sys.executable, *argv], cwd=work, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ValueError(f"nanoGPT's {' '.join(argv)[:60]} ended with {ended.returncode}: {ended.stderr[-400:]}")
    return ended.stdout


def _commit(checkout: Path) -> str | None:
    command = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None

"""What a finetuning began with: found again, and known by the hash of its weights' files.

Resuming goes on from these weights, and a preference's rewards are measured against them: other weights in the same
place would give other numbers without a word.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillm.config import UserError


def weights_hash(folder: Path) -> str:
    """SHA-256 of all safetensors files in a folder, with their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def known_start(base: Mapping[str, Any], run: Path) -> Path:
    """The folder that a run began with, from config.json's `base`.

    Raises:
        UserError: it is gone, or holds other weights than it did.
    """
    folder = Path(base["path"])
    if not folder.exists():
        raise UserError(f"{folder}, which {run} began with, is gone; put it back to go on")
    known = base.get("weights")
    if known is not None and weights_hash(folder) != known:
        raise UserError(f"{folder} holds other weights than when {run} began with it; put those back to go on")
    return folder

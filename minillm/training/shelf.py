"""The folder where a run's checkpoints stand: how one gets into its place, which of them stay, and a full disk.

step-N            a checkpoint
step-N.tmp        one that is being written or removed; what a kill leaves of it goes with the next save
step-N.replaced   one that stepped aside for another of the same step
best              a file with the name of one of them
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from minillm.config import DamagedFile, UserError
from minillm.training import manifest

_STEP = re.compile(r"step-(0|[1-9]\d{0,17})")
WRITING, _REPLACED = ".tmp", ".replaced"


def is_step(name: str) -> bool:
    """Whether a checkpoint could be called so."""
    return _STEP.fullmatch(name) is not None


def folders(checkpoints: Path) -> dict[int, Path]:
    """The folder of each step. One that a kill caught between the two renames of `publish` still counts."""
    found: dict[int, Path] = {}
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        name = path.name.removesuffix(_REPLACED)
        if (match := _STEP.fullmatch(name)) and path.is_dir() and (name == path.name or int(match[1]) not in found):
            found[int(match[1])] = path
    return found


def clean(checkpoints: Path) -> None:
    """Removes what a kill left behind."""
    for path in checkpoints.iterdir():
        if path.name.endswith(_REPLACED):
            kept = path.with_name(path.name.removesuffix(_REPLACED))
            if not kept.exists():
                path.rename(kept)
            else:
                shutil.rmtree(path)
        elif path.name.endswith(WRITING):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def publish(temporary: Path, final: Path) -> None:
    """Renames into place; a folder of the same step steps aside first, so that one of the two is always there."""
    aside = final.with_name(final.name + _REPLACED)
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    manifest.sync(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def prune(checkpoints: Path, step: int, keep: int, verify: Callable[[Path], object]) -> None:
    """Removes all up to `step` but the `keep` newest and the best, and what is damaged of those above.

    Args:
        verify: raises `DamagedFile` for a folder that is no whole checkpoint.
    """
    found = folders(checkpoints)
    try:
        best = read_best(checkpoints / "best") if (checkpoints / "best").is_file() else None
    except DamagedFile:  # which one is the best is lost until it is written anew: none may go
        return
    for old in [s for s in sorted(found) if s <= step][:-keep]:
        if found[old] != best:
            _remove(found[old])
    for later in [s for s in found if s > step]:  # damaged ones, behind which a resumed run began again
        try:
            verify(found[later])
        except DamagedFile:
            _remove(found[later])


def _remove(folder: Path) -> None:
    """Renamed first: a kill in the middle must not leave half a checkpoint under a checkpoint's name."""
    doomed = folder.with_name(folder.name + WRITING)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def write_best(checkpoints: Path, best: int) -> None:
    temporary = checkpoints / f"best{WRITING}"
    temporary.write_text(f"step-{best}\n", encoding="utf-8")
    manifest.sync(temporary)
    temporary.replace(checkpoints / "best")
    manifest.sync(checkpoints)


def read_best(path: Path) -> Path:
    """The folder that `best` names, there or not. Raises `DamagedFile` where it names none."""
    name = path.read_bytes()[:100].decode("utf-8", "replace").strip()
    if not is_step(name):
        raise DamagedFile(f"{path} is damaged: it does not name a checkpoint (step-N)")
    return path.with_name(name)


@contextmanager
def room(checkpoints: Path, temporary: Path, need: int) -> Iterator[None]:
    """While open, `need` bytes are written into `temporary`, which goes if anything fails.

    Raises `UserError`, one clear line, where the disk has no room for them or fills up meanwhile.
    """
    free = shutil.disk_usage(checkpoints).free
    message = f"a checkpoint needs {need:,} bytes in {checkpoints}, and the disk is full ({free:,} were free); "
    message += "make room and go on with --resume: the former checkpoints are untouched"
    if free < need:
        raise UserError(message)
    try:
        yield
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _disk_full(error):
            raise UserError(message) from None
        raise


def _disk_full(error: BaseException) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, SafetensorError):  # an I/O error of the Rust side arrives as text
        return any(f"os error {code})" in str(error) for code in codes)
    if isinstance(error, shutil.Error):  # copytree collects (source, target, text) of what failed
        return any(os.strerror(code) in str(error) for code in codes)
    return isinstance(error, OSError) and error.errno in codes


def bytes_of(files: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str], tokenizer: Path | None) -> int:
    """What a checkpoint takes on the disk: the data, and for each tensor and file something for headers and blocks."""
    data = sum(x.nbytes + 256 for part in files.values() for x in part.values()) + sum(map(len, texts.values()))
    copied = [path.stat().st_size for path in tokenizer.rglob("*")] if tokenizer else []
    return data + sum(copied) + 4096 * (len(copied) + len(files) + len(texts) + 1)

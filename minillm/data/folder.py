"""A folder that appears complete or not at all: written beside its place, made durable, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minillm.config import UserError


@contextmanager
def new_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and is gone when it does not.

    Raises `UserError` where `out` is taken and `overwrite` not given. A crash leaves the old folder or the new one.
    """
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists; choose another folder, or replace it with --overwrite")
    temporary, replaced = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            _make_durable(path)
        if out.exists():
            out.rename(replaced)
        temporary.rename(out)
        _make_durable(out.parent)
        if replaced.is_dir():
            shutil.rmtree(replaced)
        else:
            replaced.unlink(missing_ok=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_durable(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

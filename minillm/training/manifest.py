"""MANIFEST.json: what a folder holds, so that any change to it is noticed before it is read.

    {"format": 1, "files": {"model.safetensors": {"bytes": n, "sha256": hex}, …}, …, "sha256": hex of all the rest}

Neither safetensors nor torch.load notices a flipped bit; SHA-256 does. The manifest guards itself too: it is only
accepted byte for byte as `write` renders it. The hashes find damage, not forgery: whoever can write the folder can
write a manifest that fits, so what is read afterwards must be harmless by its format (safetensors, JSON).
"""

import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

from minillm.config import DamagedFile

NAME = "MANIFEST.json"
FORMAT = 1


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's list of names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(folder: Path, about: dict[str, Any]) -> None:
    """Lists every file in `folder` in its MANIFEST.json, with `about` beside; all of it is on the disk afterwards."""
    files = {}
    for path in folder.rglob("*"):
        sync(path)
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _hash_file(path)}
    (folder / NAME).write_bytes(_render({**about, "format": FORMAT, "files": files}))
    sync(folder / NAME)
    sync(folder)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, after every file that it lists was read and found as it was written.

    Raises `DamagedFile` that names the file: the manifest missing, unreadable, altered or of an unknown format; a
    listed file missing, of another size or with other content; a listed path that leads out of the folder. Files
    that are not listed are not looked at, and nothing reads them.
    """
    manifest = _read(folder / NAME)
    for name, expected in manifest["files"].items():
        path = folder / name
        try:
            _check_inside(folder, name)
            if not path.is_file():
                raise DamagedFile(f"{path} is missing, and {NAME} lists it")
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise DamagedFile(f"{path} is damaged: it has {size} bytes, and {expected['bytes']} were written")
            if _hash_file(path) != expected["sha256"]:
                raise DamagedFile(f"{path} is damaged: its content is not what was written (SHA-256)")
        except OSError as error:
            raise DamagedFile(f"{path} cannot be read: {error.strerror}") from None
    return manifest


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DamagedFile(f"{path} is missing: nothing says what the folder should hold") from None
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}") from None
    try:
        manifest = json.loads(raw)
        content = {key: value for key, value in manifest.items() if key != "sha256"}
        rendered = _render(content)
    except (ValueError, AttributeError, RecursionError):
        raise DamagedFile(f"{path} is damaged: it is not a manifest") from None
    if rendered != raw:
        raise DamagedFile(f"{path} is damaged: its content does not match its own SHA-256")
    if content.get("format") != FORMAT:
        raise DamagedFile(f"{path} has format {content.get('format')!r}; this version reads format {FORMAT}")
    files = content.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    ):
        raise DamagedFile(f"{path} is damaged: `files` does not give bytes and sha256 for each file")
    return manifest


def _check_inside(folder: Path, name: str) -> None:
    """A listed file lies in `folder` itself: no .., no absolute path, no link on the way."""
    path = PurePosixPath(name)
    plain = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    if not plain or any((folder / part).is_symlink() for part in (path, *path.parents)[:-1]):
        raise DamagedFile(f"{folder / NAME} is refused: it lists {name!r}, which leads out of the folder")


def _render(content: dict[str, Any]) -> bytes:
    inner = json.dumps(content, sort_keys=True, separators=(",", ":"))
    whole = {**content, "sha256": hashlib.sha256(inner.encode()).hexdigest()}
    return (json.dumps(whole, sort_keys=True, indent=1) + "\n").encode()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

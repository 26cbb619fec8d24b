"""Checkpoints that are whole or not there at all, and that notice damage.

    run/checkpoints/step-N/   model.safetensors   weights
                              state.safetensors   tensors of the training state (optimizer, random state)
                              state.json          the rest of it
                              config.json  tokenizer/  MANIFEST.json
                              parts/              weights and state of a model that is spread over processes, instead
                                                  of model.safetensors (see parts.py)
    run/checkpoints/best      a file with the name of the best one

A folder is written under a temporary name, synced to the disk, listed in its manifest and only then renamed: a kill
at any moment leaves the former checkpoints and perhaps a temporary folder, which the next save removes. Nothing
points at the newest: it is the one with the highest step whose every file is as it was written.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minillm.config import DamagedFile, UserError
from minillm.training import manifest, parts
from minillm.training.state import pack, unpack, unshare

_STEP = re.compile(r"step-(0|[1-9]\d{0,17})")
_WRITING, _REPLACED = ".tmp", ".replaced"
PARTS = "parts"


def save(
    run: Path,
    step: int,
    *,
    weights: Mapping[str, Tensor],
    state: Any,
    config: dict[str, Any],
    tokenizer: Path | None,
    keep: int,
    best: int | None = None,
) -> Path:
    """Writes run/checkpoints/step-N, then removes all but the `keep` newest and the best; returns the new folder.

    Args:
        state: any nest of dicts, lists, tensors and plain values (see `state.py`); tuples come back as lists.
        tokenizer: a folder that is copied in, so that a model never travels without it.
        best: step of the best checkpoint so far, this one or an earlier one; left as it is if that one is gone.

    Raises TypeError, before anything is written, for what a checkpoint cannot hold; `UserError` where the disk is
    full; `DamagedFile` where the disk does not give back what was written. In each case the former checkpoints stay.
    """
    packed, tensors = pack(state)
    files = {"model.safetensors": unshare(weights), "state.safetensors": unshare(tensors)}
    with writing(run, step, files=files, packed=packed, config=config, tokenizer=tokenizer, keep=keep, best=best):
        return run / "checkpoints" / f"step-{step}"


@contextmanager
def writing(
    run: Path,
    step: int,
    *,
    files: Mapping[str, Mapping[str, Tensor]],
    packed: Any,
    config: dict[str, Any],
    tokenizer: Path | None,
    keep: int,
    best: int | None = None,
    besides: int = 0,
) -> Iterator[Path]:
    """A checkpoint of which the block writes a part; when it ends, all is listed, synced and put into place.

    Args:
        files: tensors by file.
        packed: the rest of the training state, as `pack` gives it.
        besides: bytes that the block will write into the folder that it gets.
    """
    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    _clean(checkpoints)
    texts = {"state.json": json.dumps(packed), "config.json": json.dumps(config, indent=2)}
    final = checkpoints / f"step-{step}"
    temporary = final.with_name(final.name + _WRITING)
    with _room(checkpoints, temporary, besides + _bytes(files, texts, tokenizer)):
        temporary.mkdir()
        for name, part in files.items():
            save_file(dict(part), temporary / name)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            shutil.copytree(tokenizer, temporary / "tokenizer")
        yield temporary
        manifest.write(temporary, {"step": step})
        _publish(temporary, final)
    manifest.verify(final)
    if best is not None and (checkpoints / f"step-{best}").is_dir():
        _write_best(checkpoints, best)
    _prune(checkpoints, step, keep)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after each file was read and compared. Raises `DamagedFile` naming the file."""
    listed = manifest.verify(folder)
    divided = (folder / PARTS).is_dir()
    weights = [f"{PARTS}/{path.name}" for path in (folder / PARTS).iterdir()] if divided else ["model.safetensors"]
    for name in (*weights, "config.json", "state.safetensors", "state.json"):
        if name not in listed["files"]:
            raise DamagedFile(f"{folder / manifest.NAME} does not list {name}: this is no whole checkpoint")
    return listed


def steps(run: Path) -> list[int]:
    """Steps of which a checkpoint is there, valid or not, in ascending order."""
    return sorted(_folders(run / "checkpoints"))


def newest_valid(run: Path, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint with the highest step that is whole, or None; `warn` gets a line for each damaged one above it."""
    return _newest_valid(run / "checkpoints", warn)


def resolve(path: Path) -> Path:
    """The verified checkpoint folder that `path` means: a run's newest, a checkpoint itself, or what `best` names.

    Raises `DamagedFile` that names the damaged file and the newest valid checkpoint of the same run; `UserError`
    where there is none to open.
    """
    if path.name == "best" and path.is_file():
        return _verified(_read_best(path))
    if (path / manifest.NAME).exists() or (_STEP.fullmatch(path.name) and path.is_dir()):
        return _verified(path)
    folders = _folders(path / "checkpoints")
    if folders:
        return _verified(folders[max(folders)])
    if (path / "config.json").is_file() and (path / "metrics.jsonl").is_file():
        raise UserError(f"{path} has no checkpoint yet; go on with it: python train.py --resume {path}")
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run folder or a checkpoint folder")
    raise UserError(
        f"{path} is neither a run folder nor a checkpoint folder: no checkpoints/step-N, no {manifest.NAME}"
    )


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The weights by name, on the CPU. Raises `DamagedFile` where the file is no safetensors file."""
    if (folder / PARTS).is_dir():
        return parts.read(folder / PARTS, parts.WEIGHTS)
    return _load_tensors(folder / "model.safetensors")


def load_state(folder: Path) -> Any:
    """The training state as `save` was given it, tuples as lists. Raises `DamagedFile` where it cannot be read."""
    packed, tensors = _load_json(folder / "state.json"), _load_tensors(folder / "state.safetensors")
    if (folder / PARTS).is_dir():
        tensors |= parts.read(folder / PARTS, parts.STATE)
    try:
        return unpack(packed, tensors)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DamagedFile(f"{folder / 'state.json'} is damaged: it is not a training state") from None


def load_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint or a run. Raises `DamagedFile` where it is not a JSON object."""
    config = _load_json(folder / "config.json")
    if not isinstance(config, dict):
        raise DamagedFile(f"{folder / 'config.json'} is damaged: it is not a table of settings")
    return config


def _folders(checkpoints: Path) -> dict[int, Path]:
    """The folder of each step. One that a kill caught between the two renames of `_publish` still counts."""
    found: dict[int, Path] = {}
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        name = path.name.removesuffix(_REPLACED)
        if (match := _STEP.fullmatch(name)) and path.is_dir() and (name == path.name or int(match[1]) not in found):
            found[int(match[1])] = path
    return found


def _clean(checkpoints: Path) -> None:
    """Removes what a kill left behind."""
    for path in checkpoints.iterdir():
        if path.name.endswith(_REPLACED):
            kept = path.with_name(path.name.removesuffix(_REPLACED))
            if not kept.exists():
                path.rename(kept)
            else:
                shutil.rmtree(path)
        elif path.name.endswith(_WRITING):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _publish(temporary: Path, final: Path) -> None:
    """Renames into place; a folder of the same step steps aside first, so that one of the two is always there."""
    aside = final.with_name(final.name + _REPLACED)
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    manifest.sync(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _prune(checkpoints: Path, step: int, keep: int) -> None:
    folders = _folders(checkpoints)
    try:
        best = _read_best(checkpoints / "best") if (checkpoints / "best").is_file() else None
    except DamagedFile:  # which one is the best is lost until it is written anew: none may go
        return
    for old in [s for s in sorted(folders) if s <= step][:-keep]:
        if folders[old] != best:
            _remove(folders[old])
    for later in [s for s in folders if s > step]:  # damaged ones, behind which a resumed run began again
        try:
            verify(folders[later])
        except DamagedFile:
            _remove(folders[later])


def _remove(folder: Path) -> None:
    """Renamed first: a kill in the middle must not leave half a checkpoint under a checkpoint's name."""
    doomed = folder.with_name(folder.name + _WRITING)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _write_best(checkpoints: Path, best: int) -> None:
    temporary = checkpoints / f"best{_WRITING}"
    temporary.write_text(f"step-{best}\n", encoding="utf-8")
    manifest.sync(temporary)
    temporary.replace(checkpoints / "best")
    manifest.sync(checkpoints)


def _read_best(path: Path) -> Path:
    name = path.read_bytes()[:100].decode("utf-8", "replace").strip()
    if not _STEP.fullmatch(name):
        raise DamagedFile(f"{path} is damaged: it does not name a checkpoint (step-N)")
    return path.with_name(name)


def _newest_valid(checkpoints: Path, warn: Callable[[str], None]) -> Path | None:
    folders = _folders(checkpoints)
    for step in sorted(folders, reverse=True):
        try:
            verify(folders[step])
        except DamagedFile as damage:
            warn(str(damage))
        else:
            return folders[step]
    return None


def _verified(folder: Path) -> Path:
    try:
        verify(folder)
    except DamagedFile as damage:
        valid = _newest_valid(folder.absolute().parent, lambda line: None)
        remedy = f"the newest valid checkpoint is {valid}" if valid else "there is no valid checkpoint beside it"
        raise DamagedFile(f"{damage}; {remedy}") from None
    return folder


@contextmanager
def _room(checkpoints: Path, temporary: Path, need: int) -> Iterator[None]:
    """Whatever fails inside, the temporary folder goes; a full disk becomes one clear line."""
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


def _bytes(files: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str], tokenizer: Path | None) -> int:
    """What a checkpoint takes on the disk: the data, and for each tensor and file something for headers and blocks."""
    data = sum(x.nbytes + 256 for part in files.values() for x in part.values()) + sum(map(len, texts.values()))
    copied = [path.stat().st_size for path in tokenizer.rglob("*")] if tokenizer else []
    return data + sum(copied) + 4096 * (len(copied) + len(files) + len(texts) + 1)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, OverflowError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedFile(f"{path} is damaged: it is no safetensors file ({reason[:200]})") from None


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DamagedFile(f"{path} is damaged: it is not JSON") from None

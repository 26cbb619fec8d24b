"""Checkpoints that are whole or not there at all, and that notice damage.

    run/checkpoints/step-N/   model.safetensors   weights
                              state.safetensors   tensors of the training state (optimizer, random state)
                              state.json          the rest of it
                              config.json  tokenizer/  MANIFEST.json
                              parts/              weights and state of a model that is spread over processes, instead
                                                  of model.safetensors (see parts.py)
    run/checkpoints/best      a file with the name of the best one

A folder is written under a temporary name, synced to the disk, listed in its manifest and only then renamed (see
shelf.py): a kill at any moment leaves the former checkpoints and perhaps a temporary folder, which the next save
removes. Nothing points at the newest: it is the one with the highest step whose every file is as it was written.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from minillm.config import DamagedFile, UserError
from minillm.tensors import load_tensors
from minillm.training import manifest, parts, shelf
from minillm.training.state import pack, unpack, unshare

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
    shelf.clean(checkpoints)
    texts = {"state.json": json.dumps(packed), "config.json": json.dumps(config, indent=2)}
    final = checkpoints / f"step-{step}"
    temporary = final.with_name(final.name + shelf.WRITING)
    with shelf.room(checkpoints, temporary, besides + shelf.bytes_of(files, texts, tokenizer)):
        temporary.mkdir()
        for name, part in files.items():
            save_file(dict(part), temporary / name)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            shutil.copytree(tokenizer, temporary / "tokenizer")
        yield temporary
        manifest.write(temporary, {"step": step})
        shelf.publish(temporary, final)
    manifest.verify(final)
    if best is not None and (checkpoints / f"step-{best}").is_dir():
        shelf.write_best(checkpoints, best)
    shelf.prune(checkpoints, step, keep, verify)


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
    return sorted(shelf.folders(run / "checkpoints"))


def newest_valid(run: Path, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint with the highest step that is whole, or None; `warn` gets a line for each damaged one above it."""
    return _newest_valid(run / "checkpoints", warn)


def resolve(path: Path) -> Path:
    """The verified checkpoint folder that `path` means: a run's newest, a checkpoint itself, or what `best` names.

    Raises `DamagedFile` that names the damaged file and the newest valid checkpoint of the same run; `UserError`
    where there is none to open.
    """
    if path.name == "best" and path.is_file():
        return _verified(shelf.read_best(path))
    if (path / manifest.NAME).exists() or (shelf.is_step(path.name) and path.is_dir()):
        return _verified(path)
    folders = shelf.folders(path / "checkpoints")
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
    return load_tensors(folder / "model.safetensors")


def load_state(folder: Path) -> Any:
    """The training state as `save` was given it, tuples as lists. Raises `DamagedFile` where it cannot be read."""
    packed, tensors = _load_json(folder / "state.json"), load_tensors(folder / "state.safetensors")
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


def _newest_valid(checkpoints: Path, warn: Callable[[str], None]) -> Path | None:
    folders = shelf.folders(checkpoints)
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


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DamagedFile(f"{path} is damaged: it is not JSON") from None

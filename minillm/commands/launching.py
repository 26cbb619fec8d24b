"""What torchrun's environment says: one of several processes or not, and whether this is a second attempt."""

import os
from pathlib import Path
from typing import Any

from minillm.config import UserError
from minillm.training.run import read_config


def refuse_group(command: str) -> None:
    """Raises `UserError` in each of several processes, for what runs in one only."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise UserError(f"minillm {command} runs in one process, not in {size}: start it without torchrun")


def launch() -> dict[str, Any]:
    """What a run's config.json keeps of the torchrun that began it, so that its next attempt knows the run again."""
    return {"launch": name} if (name := _launch()) is not None else {}


def earlier_run(out: str | None) -> Path | None:
    """The run that an earlier attempt of the same torchrun began, which this one is to go on with; else None."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return None
    folders = [Path(out)] if out is not None else [path.parent for path in Path("runs").glob("*/config.json")]
    for folder in folders:
        try:
            if read_config(folder).get("launch") == _launch() is not None:
                return folder
        except UserError:
            continue
    return None


def _launch() -> str | None:
    """The folder of its own that torchrun makes for each start, and keeps over its attempts."""
    errors = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/attempt_N/RANK/error.json
    return Path(errors).parents[2].name if errors else None

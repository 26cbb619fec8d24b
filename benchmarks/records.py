"""Result files: a JSON array with one object a line, written anew, whole, after every finished case.

So a run that was stopped has lost at most the case that it was at, and the next one skips what is there. A row says
what was measured (`SAME_CASE`), on what (device, versions, commit, date) and with which sources: a row that was
measured with other kernels than those at hand does not count as finished, and is replaced.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
MEASURED = ("kernels", "benchmarks/families", "benchmarks/timing.py")  # a change in these makes a row out of date
LARGEST = 16 * 2**20  # bytes of a result file: it lies in the repository


def device_name() -> str:
    """What the figures were measured on, in full: the GPU's name, else the processor's with its number of cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = re.findall(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo")) or [platform.processor() or platform.machine()]
    cores = len(os.sched_getaffinity(0))
    return f"{names[0].strip()}, {cores} core{'s' * (cores > 1)}"


def slug(name: str) -> str:
    """A folder's name for a device: 'NVIDIA H200' -> 'h200'."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-")


def versions(*packages: str) -> dict[str, str]:
    """The installed versions among `packages`; what is not installed is left out."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def provenance(*packages: str) -> Row:
    """What every row carries: device, versions, commit (None outside git), sources, date in UTC, and the load.

    The load is how many processes wanted a core in the minute before: where that is more than there are cores, times
    on a CPU suffered from others.
    """
    return {
        "device": device_name(),
        "versions": {"python": platform.python_version(), **versions("torch", "triton", *packages)},
        "commit": _commit(),
        "sources": sources(),
        "load": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def sources(root: Path = ROOT, places: Iterable[str] = MEASURED) -> str:
    """12 hex digits that change with what is measured (the kernels and their tuned tables), or the way it is."""
    digest = hashlib.sha256()
    for place in places:
        path = root / place
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".py", ".json"))
        for file in files:
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def load(path: Path) -> list[Row]:
    """The rows of a result file; none where it does not exist. Raises ValueError for a file that is not one."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no result file ({error}): delete it, or give another --out") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is no result file (no array of objects): delete it, or give another --out")
    return rows


def shown(path: Path) -> list[Row]:
    """The rows of a result file that a table shows: of --quick runs only where there are no others."""
    rows = load(path)
    return [row for row in rows if not row.get("quick")] or rows


def by_device(results: Path, name: str) -> Iterator[tuple[str, list[Row]]]:
    """(device, rows to show) of each device's folder that has a file of this name, with rows in it."""
    for path in sorted(results.glob(f"*/{name}")):
        if rows := shown(path):
            yield rows[0]["device"], rows


def save(path: Path, rows: Iterable[Row]) -> None:
    """Writes the rows, each on a line of its own, so that no reader ever sees half a file.

    Raises ValueError for NaN or infinity among the figures, and where the file would pass LARGEST.
    """
    text = "[\n" + ",\n".join("  " + json.dumps(row, allow_nan=False, ensure_ascii=False) for row in rows) + "\n]\n"
    if len(text.encode()) > LARGEST:
        raise ValueError(f"{path} would pass {LARGEST >> 20} MiB: give --out another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


SAME_CASE = ("kernel", "shape", "dtype", "dir", "quick")


def case_key(row: Row) -> str:
    """What two measurements of the same thing share."""
    return json.dumps([row.get(name) for name in SAME_CASE], sort_keys=True)


def finished(rows: Iterable[Row], source: str, device: str) -> set[str]:
    """The keys of the cases that were measured on this device with these sources."""
    return {case_key(row) for row in rows if row.get("sources") == source and row.get("device") == device}


def merge(rows: list[Row], new: list[Row]) -> list[Row]:
    """`rows` with those of the same cases replaced by `new`."""
    replaced = {case_key(row) for row in new}
    return [row for row in rows if case_key(row) not in replaced] + new


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout.strip() or None

"""`minillm doctor [RUN]`: what this machine has and will use, or what is wrong with a run.

Exit code 0 where nothing is wrong, 1 where a run has problems.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from minillm import doctor, machine
from minillm.machine import GIB


@dataclass(frozen=True)
class Args:
    run: tyro.conf.Positional[Path | None] = None
    """A run folder. None: the machine."""
    json: bool = False
    """One JSON object instead of lines."""


def main(argv: list[str]) -> int:
    args = tyro.cli(Args, prog="minillm doctor", description=__doc__, args=argv)
    return _machine(args.json) if args.run is None else _run(args.run, args.json)


def _machine(as_json: bool) -> int:
    found = machine.facts(Path.cwd())
    lines = machine.advice(found)
    if as_json:
        print(json.dumps({**found, "advice": lines}))
        return 0
    for name, text in _table(found).items():
        print(f"{name:<11}{text}")
    for line in lines:
        print(f"advice     {line}")
    return 0


def _table(found: dict[str, Any]) -> dict[str, str]:
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in found["packages"].items())
    gpus = ", ".join(f"{gpu['name']} ({gpu['architecture']}, {gpu['memory'] / GIB:.0f} GiB)" for gpu in found["gpus"])
    features = [name for name in ("avx512", "bf16") if found[name]]
    extras = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in found["extras"].items())
    side, why = found["kernels"]
    compiler, cores = found["compiler"], f"{found['cores']} core{'s' * (found['cores'] != 1)}"
    return {
        "python": f"{found['python']}, {packages}",
        "device": f"{found['device']} ({gpus or 'no GPU'}), {cores}, {', '.join(features) or 'no bf16'}",
        "precision": f"{found['dtype']} by default",
        "memory": f"{found['memory_free'] / GIB:.1f} GiB free on {found['device']}",
        "kernels": f"{side} ({why}); triton: {found['triton']}",
        "compiler": f"{compiler['command']}, finds Python.h" if compiler["works"] else compiler["why"],
        "disk": f"{found['disk_free'] / GIB:.1f} GiB free in this folder",
        "extras": extras,
    }


def _run(run: Path, as_json: bool) -> int:
    problems = doctor.examine(run)
    if as_json:
        print(json.dumps({"run": str(run), "healthy": not problems, "problems": [*map(dataclasses.asdict, problems)]}))
    else:
        for problem in problems:
            print(f"{problem.kind}: {problem.message}")
        print(f"{len(problems)} problem{'s' * (len(problems) != 1)} found" if problems else f"{run} is healthy")
    return 1 if problems else 0

"""`minillm train`, and `python train.py`: pretrains a language model, from text to report.

`--resume RUN` goes on with a run, at the last checkpoint that it saved; `--resume RUN --help` says what it may change.
With no argument it learns from the Python standard library's own source, for about five minutes on a CPU.
"""

import contextlib
import dataclasses
import json
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from minillm import presets
from minillm.commands.launching import earlier_run, launch, refuse_group
from minillm.commands.running import (
    Resume,
    is_finished,
    is_resume,
    nothing_left_of,
    resumed,
    say,
    say_finished,
    say_where_from,
    trackers_of,
    with_range,
)
from minillm.config import Settings, UserError, from_dict
from minillm.training.distributed import Alone, join
from minillm.training.signals import Signals, Stopped


@dataclass(frozen=True, kw_only=True)
class Args(Settings):
    """Options of a new run; `--preset NAME` and `--config FILE` change what the others begin with."""

    source: Annotated[str, tyro.conf.arg(name="data")] = "stdlib"
    """stdlib (the Python standard library's source), installed (that and the installed packages'), a file, a folder
    of text, or a folder of prepared shards."""
    out: str | None = None
    """Folder of the run. None: runs/<preset>-<data>."""
    overwrite: bool = False
    """Replace the run that --out holds."""
    config: str | None = None
    """TOML or JSON file of settings, over the preset's and under the command line's."""
    log: str | None = None
    """Trackers besides metrics.jsonl, separated by commas: tb, wandb."""
    profile: bool = False
    """Record three early steps: where their time goes, on stderr and in the report, and a trace in the run folder."""


def main(argv: list[str]) -> int:
    with Signals() as signals:
        try:
            with join() as team:
                if is_resume(argv):
                    resume = tyro.cli(Resume, prog="train.py", description=__doc__, args=argv)
                    return _resume(resume, signals, team)
                args = _parse(argv)
                if (run := earlier_run(args.out)) is not None:
                    return _resume(Resume(resume=str(run), log=args.log), signals, team)
                return _start(args, argv, signals, team)
        except Stopped as stopped:
            say(f"{stopped} before the first step; --resume DIR goes on, where the folder is there already")
            return stopped.code


def _parse(argv: list[str]) -> Args:
    """Preset, then --config, then the command line."""
    over = _read_config_file(path) if (path := _option(argv, "config")) else {}
    name = _option(argv, "preset") or over.get("preset") or "default"
    if not isinstance(name, str):
        raise UserError(f"--config {path}: preset must be the name of one, not {name!r}")
    base = presets.preset(name)
    if over.get("steps") is not None and over.get("minutes") is not None:
        raise UserError(f"--config {path}: steps and minutes contradict each other: give one of them")
    for length, other in (("steps", "minutes"), ("minutes", "steps")):
        given = _option(argv, length) is not None
        if given and _option(argv, other) is not None:
            raise UserError("--steps and --minutes contradict each other: give one of them")
        if given or over.get(length) is not None:  # the preset's own length gives way
            base = {**base, other: None}
            over = {name: value for name, value in over.items() if not (given and name == other)}
    try:
        default = from_dict(Settings, presets.merge(base, over))
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from error
    fields = {field.name: getattr(default, field.name) for field in dataclasses.fields(Settings)}
    args = tyro.cli(Args, prog="train.py", description=__doc__, default=Args(**fields), args=argv)
    return replace(args, optim=with_range(args.optim, from_dict(Settings, base).optim))


def _option(argv: list[str], name: str) -> str | None:
    """The value of --name in argv, before it is parsed."""
    for i, arg in enumerate(argv):
        if arg.startswith(f"--{name}="):
            return arg.split("=", 1)[1]
        if arg == f"--{name}":
            return argv[i + 1] if i + 1 < len(argv) else None
    return None


def _read_config_file(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise UserError(f"--config {path}: there is no such file")
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if path.endswith(".json") else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path} is no {'JSON' if path.endswith('.json') else 'TOML'}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must be a table of settings")
    return values


def _say_unread(argv: list[str]) -> None:
    """A preset says how a tokenizer would be trained, for whatever data; who types it expects to get it."""
    for option in dict.fromkeys(arg.split("=")[0].replace("_", "-") for arg in argv):
        if option in ("--tokenizer.type", "--tokenizer.vocab-size"):
            say(f"note: {option} is not read: there is a tokenizer already, the prepared data's or --tokenizer.path")


def _start(args: Args, argv: list[str], signals: Signals, team: Alone) -> int:
    """A new run: its folder and config.json first, so that whatever follows can be resumed.

    What turns out to be wrong before training begins leaves no folder behind, and what can be known without one is
    asked before --overwrite removes anything.
    """
    from minillm import ops
    from minillm.commands.pretraining import prepare, run_prepared
    from minillm.data.sources import open_source
    from minillm.training.plan import choose_device
    from minillm.training.pretrain import run_config
    from minillm.training.run import held, new_run, write_json

    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    trackers = trackers_of(args.log)
    choose_device(settings.device)
    ops.select(settings.kernels)
    source = open_source(settings.source)
    if team.lead and (source.prepared is not None or settings.tokenizer.path is not None):
        _say_unread(argv)
    name = settings.source
    if Path(name).exists():  # kept as an absolute path, so that --resume works from any folder
        name = Path(name).name
        settings = replace(settings, source=str(Path(settings.source).absolute()))
    team.check(settings)
    config = {**run_config(settings), "options": argv, **launch()}
    run = None
    with contextlib.ExitStack() as whole:
        if team.lead:
            run = new_run(args.out, f"{settings.preset}-{Path(name).stem or 'data'}", overwrite=args.overwrite)
            whole.enter_context(held(run))
            write_json(run / "config.json", config)
            whole.enter_context(nothing_left_of(run))
        run = team.share(run)
        if not all(team.gather((run / "config.json").exists())):
            raise UserError(f"{run} is not seen by all machines; name a folder that they share with --out")
        team.log_to(run)
        work = prepare(settings, source, run, config, trackers=trackers, team=team, profile=args.profile)
        return run_prepared(work, signals, resume_from=None)


def _resume(args: Resume, signals: Signals, team: Alone) -> int:
    """Goes on from the newest valid checkpoint, or from the start where there is none yet."""
    from minillm.commands import finetune
    from minillm.commands.pretraining import prepare, run_prepared
    from minillm.data.sources import open_source
    from minillm.training import checkpoint
    from minillm.training.run import held, read_config

    run = Path(args.resume)
    config = read_config(run)
    if "task" in config or "imported" in config:
        refuse_group("finetune")
        return finetune.resume(args, signals)
    settings = from_dict(Settings, config["settings"])
    if is_finished(run, args.steps):
        if team.lead:
            say_finished(run)
        return 0
    settings = resumed(settings, args)
    team.check(settings)
    team.log_to(run)
    with held(run) if team.lead else contextlib.nullcontext():
        with team.lead_first():  # one looks through the checkpoints, and all go on from the one it finds
            folder = checkpoint.newest_valid(run, lambda line: say(f"warning: {line}")) if team.lead else None
        folder = team.share(folder)
        say_where_from(run, folder)
        source = open_source(settings.source)
        work = prepare(settings, source, run, config, trackers=trackers_of(args.log), team=team)
        return run_prepared(work, signals, resume_from=folder)

"""What the two commands that train have in common: how a run is begun, gone on with, watched and talked about."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from minillm.config import OptimConfig, Settings, UserError


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Options with which a run can go on; everything else stands in its config.json."""

    resume: str
    """Folder of the run; of --method all or --folds that of all its runs."""
    device: Literal["auto", "cpu", "cuda", "mps"] | None = None
    log: str | None = None
    """Trackers besides metrics.jsonl, separated by commas: tb, wandb."""
    steps: int | None = None
    """Another end for the run; its schedule is stretched or shortened."""


def is_resume(argv: list[str]) -> bool:
    """Whether a command line goes on with a run, before it is parsed."""
    return any(arg == "--resume" or arg.startswith("--resume=") for arg in argv)


def is_finished(run: Path, steps: int | None) -> bool:
    """Whether a run has come to its end and `steps` asks for no other."""
    end = _end(run)
    return end is not None and (steps is None or steps <= end["step"])


def say_finished(run: Path) -> None:
    """Says that a run has come to its end. Where it was stopped between that and its report, the report is written."""
    from minillm.training.report import write_report

    report, end = run / "report.html", _end(run) or {}
    if not report.exists() or report.stat().st_mtime_ns < (run / "metrics.jsonl").stat().st_mtime_ns:
        say(f"report: {write_report(run)}")
    say(f"{run} is finished ({end['reason']} after {end['step']} steps); --steps N goes on further")


def _end(run: Path) -> dict[str, Any] | None:
    from minillm.training.run import read_metrics

    ends = [event for event in read_metrics(run) if event.get("event") == "end" and event.get("reason") != "signal"]
    return ends[-1] if ends else None


def resumed(settings: Settings, args: Resume) -> Settings:
    """The run's own settings with what --resume may change."""
    settings = replace(settings, device=args.device or settings.device)
    return settings if args.steps is None else replace(settings, steps=args.steps, minutes=None)


def with_range(optim: OptimConfig, usual: OptimConfig) -> OptimConfig:
    """For a test of the rate's range: rates that were left as they are usual keep their proportion to `lr`."""
    if optim.schedule != "range":
        return optim
    beside = {name: getattr(usual, name) for name in ("muon_lr", "embedding_lr")}
    left = {name: rate for name, rate in beside.items() if rate is not None and getattr(optim, name) == rate}
    return replace(optim, **{name: rate * optim.lr / usual.lr for name, rate in left.items()})


def say_where_from(run: Path, checkpoint: Path | None) -> None:
    where = checkpoint.name if checkpoint is not None else "the start: it has no checkpoint yet"
    say(f"{run} goes on from {where}")


@contextlib.contextmanager
def nothing_left_of(run: Path) -> Iterator[None]:
    """What turns out to be wrong before training begins leaves no folder behind."""
    try:
        yield
    except UserError:
        from minillm.training.run import clear_run

        if not (run / "metrics.jsonl").exists():
            clear_run(run)
            with contextlib.suppress(OSError):  # it may hold other things, or be where we stand
                run.rmdir()
        raise


def trackers_of(log: str | None) -> tuple[str, ...]:
    """The trackers that --log names. Raises `UserError` for one that does not exist."""
    from minillm.training.monitor import TRACKERS

    names = tuple(name.strip() for name in log.split(",")) if log else ()
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--log {name}: there are {', '.join(TRACKERS)}")
    return names


def say(text: str) -> None:
    """Progress, which goes to stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def conclude(run: Path, config: dict[str, Any], report: Path) -> None:
    """The verdict, where the report is, and what to do next: the result of a run, on stdout."""
    from minillm.training.run import read_metrics
    from minillm.training.verdict import next_commands, verdict

    metrics = read_metrics(run)
    print("\n".join(verdict(config, metrics)))
    print(f"\nreport: {report}\n\nnext:")
    for command, reason in next_commands(run, config, metrics):
        print(f"  {command:<60} {reason}")

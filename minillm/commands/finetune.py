"""`minillm finetune MODEL --task TASK`: adapts a model to a task by one method.

`minillm finetune --resume RUN` goes on with such a run; with `--help` behind it, it says what may be changed.
Without --data it learns from examples that are cut from the Python standard library's source.
"""

import dataclasses
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from minillm.commands.comparing import METHODS
from minillm.commands.finetuning import begin_with, prepare, run_prepared
from minillm.commands.folding import FOLDS, parse_fold
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
from minillm.commands.series import Series, begin, go_on
from minillm.commands.start import known_start, weights_hash
from minillm.commands.tasks import TaskName, data_name
from minillm.config import Kernels, OptimConfig, Settings, TrainConfig, UserError, from_dict
from minillm.peft.config import Method, MethodConfig
from minillm.training.signals import Signals, Stopped

RATES = {"full": 2e-4, "freeze": 5e-4, "lora": 1e-3, "adalora": 2e-3, "adapter": 1e-3, "prefix": 5e-3, "prompt": 1e-2}
"""Peak learning rate by method: what moves all weights moves them little, what moves few moves them far."""
SCRATCH_RATE = 1e-3
"""From random weights there is nothing to keep, and far to go."""


@dataclass(frozen=True, kw_only=True)
class Args:
    model: tyro.conf.Positional[Path]
    """A run folder, a checkpoint folder, or a folder in Hugging Face's format."""
    task: TaskName
    data: str = "stdlib"
    """File of examples. stdlib: examples cut from the standard library's source; stdlib-unbalanced (classify): two
    classes, of which one is rare. lm: text, as for training."""
    val: str | None = None
    """File of validation examples. None: a seeded tenth of the data is held out."""
    test: str | None = None
    """File of examples that neither training nor early stopping nor thresholds see: scored once, at the end."""
    method: Method | Literal["all"] = "full"
    """Which weights move; all: every method in turn, the same model from scratch, and a table."""
    from_scratch: bool = False
    """full: begin with random weights in MODEL's shape, to see what its pretraining is worth."""
    folds: int | None = None
    """Cross-validation: so many runs, each scored on another part of the data; mean ± standard deviation of them."""
    fold: str | None = None
    """One of those runs: 2/5 holds out the second of five parts, and scores it in the end."""
    out: str | None = None
    """Folder of the run. None: runs/<task>-<method>-<data>."""
    overwrite: bool = False
    """Replace the run that --out holds."""
    epochs: float | None = None
    """Times that every example is read, unless --steps or --minutes says otherwise. None: 4, and with the default data
    no more than what a minute and a half has time for."""
    steps: int | None = None
    minutes: float | None = None
    seed: int = 1
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    kernels: Kernels = "auto"
    log: str | None = None
    """Trackers besides metrics.jsonl, separated by commas: tb, wandb."""
    pool: Literal["mean", "cls", "last", "pooler"] | None = None
    """classify, regress: which states the head reads; pooler: the first, through a dense layer and tanh, as BERT's.
    None: the last of a decoder, the pooler of a model that came with one, the mean of any other encoder."""
    class_weights: Literal["auto", "on", "off"] = "auto"
    """classify: rare classes weigh more. auto: where one has more than twice the examples of another, and --balance
    does not make up for it."""
    threshold: Literal["auto", "off"] = "auto"
    """classify: the probability from which a label, or the rare one of two classes, is given. auto: the best one on
    validation data; off: 0.5."""
    balance: bool = False
    """classify: batches have every class equally often."""
    beta: float = 0.1
    """preference: how dear it is to move away from the start."""
    layer_decay: float = 1.0
    """Each layer learns at this share of the rate of the one above it."""
    replay: float = 0.0
    """Against forgetting: adds so many times the loss on the text of the pretraining."""
    l2_start: float = 0.0
    """Against forgetting: adds l2_start / 2 · Σ (w − w₀)², w₀ the weights as they were."""
    freeze_layers: int | None = None
    """freeze: the embeddings and so many first blocks stay as they are."""
    train_only: Literal["head"] | None = None
    """freeze: everything but the head stays as it is."""
    rank: int = 8
    """lora, adalora"""
    alpha: float | None = None
    """lora, adalora: updates are multiplied by alpha / rank. None: 2 · rank."""
    targets: str = "all"
    """lora, adalora: linear layers by the ends of their names, separated by commas; all: every one in the blocks."""
    width: int = 32
    """adapter: of the bottlenecks."""
    length: int = 16
    """prefix, prompt: virtual tokens."""
    prefix_hidden: int | None = None
    """prefix: width of a network that the prefix comes out of while it is trained."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.01, beta2=0.98, warmup=0.1))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(batch=16, patience=3))


def main(argv: list[str]) -> int:
    with Signals() as signals:
        try:
            if is_resume(argv):
                args = tyro.cli(Resume, prog="minillm finetune", description=__doc__, args=argv)
                return _resume(args, signals)
            args = _parse(argv)
            several = _several(args)
            if several is None:
                return _start(args, argv, signals)
            state = {"task": args.task, "argv": argv, "folds": args.folds}
            name = f"{args.task}-{args.method}-{data_name(args.data)}" + (f"-{args.folds}-folds" if args.folds else "")
            return begin(several, state, args.out, name, signals)
        except Stopped as stopped:
            say(f"{stopped} before the first step; --resume DIR goes on, where the folder is there already")
            return stopped.code


def _parse(argv: list[str]) -> Args:
    """The rate's default goes by the method."""
    args = tyro.cli(Args, prog="minillm finetune", description=__doc__, args=argv)
    if args.method == "all":
        return args
    rate = SCRATCH_RATE if args.from_scratch else RATES[args.method]
    usual = OptimConfig(lr=rate / (10 if args.task == "preference" else 1))
    if any(arg == "--optim.lr" or arg.startswith("--optim.lr=") for arg in argv):
        return dataclasses.replace(args, optim=with_range(args.optim, usual))
    return dataclasses.replace(args, optim=dataclasses.replace(args.optim, lr=usual.lr))


def _method(args: Args) -> MethodConfig:
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(MethodConfig) if hasattr(args, f.name)}
    return MethodConfig(**values)


def _several(args: Args) -> Series | None:
    """What takes more than one run. Raises `UserError` for options that contradict each other."""
    if args.test is not None and (args.folds is not None or args.fold is not None):
        raise UserError("--test goes without --folds and --fold: each fold holds out test examples of its own")
    if args.folds is not None:
        if args.method == "all" or args.fold is not None:
            raise UserError("--folds goes with one --method, and without --fold")
        if args.folds < 2:
            raise UserError(f"--folds must be at least 2, not {args.folds}")
        return FOLDS
    return METHODS if args.method == "all" else None


def _check(args: Args) -> None:
    """Raises `UserError` for options that contradict each other, or lie where none makes sense."""
    if args.steps is not None and args.minutes is not None:
        raise UserError("--steps and --minutes contradict each other: give one of them")
    if (args.epochs is not None and not args.epochs > 0) or not 0 < args.layer_decay <= 1:
        raise UserError("--epochs must be positive, and --layer-decay above 0 and at most 1")
    if args.replay < 0 or args.l2_start < 0:
        raise UserError("--replay and --l2-start must not be negative")
    if args.from_scratch and (args.method != "full" or args.task == "preference"):
        raise UserError("--from-scratch trains every weight of a new model: it needs --method full, and no preference")
    if args.balance and args.class_weights == "on":
        raise UserError("--balance and --class-weights on would make up for rare classes twice: give one of them")


def _options(args: Args) -> dict[str, Any]:
    """What config.json keeps for the task, and a resumed run reads again."""
    names = ("beta", "balance", "pool", "threshold", "epochs", "layer_decay", "val", "test", "replay", "l2_start")
    options = {name: getattr(args, name) for name in (*names, "from_scratch")}
    weigh = {"auto": False if args.balance else None, "on": True, "off": False}[args.class_weights]
    return options | {"class_weights": weigh, "fold": parse_fold(args.fold)}


def _start(args: Args, argv: list[str], signals: Signals) -> int:
    """A new run. What is wrong with model, data or options is said before its folder is made."""
    from minillm import ops
    from minillm.training.plan import choose_device
    from minillm.training.pretrain import run_config
    from minillm.training.run import held, new_run, write_json

    _check(args)
    method, trackers = _method(args), trackers_of(args.log)
    choose_device(args.device)
    ops.select(args.kernels)
    opened = begin_with(args.model, args.seed if args.from_scratch else None)
    shape = opened.transformer.config
    settings = Settings(
        preset=f"{args.task}-{args.method}", source=args.data, steps=args.steps, minutes=args.minutes, seed=args.seed,
        device=args.device, dtype=args.dtype, kernels=args.kernels, compile="off", model=shape, optim=args.optim,
        train=args.train,
    )  # fmt: skip
    base = {"path": str(opened.folder.resolve()), "model": str(args.model), "weights": weights_hash(opened.folder)}
    config = run_config(settings) | {"task": {"name": args.task, "options": _options(args)}, "base": base}
    config |= {"method": asdict(method), "options": argv}
    prepared = prepare(config, settings, opened)
    _find_from_anywhere(config)
    run = new_run(args.out, f"{args.task}-{args.method}-{data_name(args.data)}", overwrite=args.overwrite)
    with held(run):
        write_json(run / "config.json", config)
        with nothing_left_of(run):
            opened.tokenizer.save(run / "tokenizer")
            return run_prepared(prepared, settings, run, config, trackers, signals, resume_from=None)


def _find_from_anywhere(config: dict[str, Any]) -> None:
    """The files of examples as absolute paths, so that --resume works from any folder."""
    options = config["task"]["options"]
    for section, name in ((config["settings"], "source"), (options, "val"), (options, "test")):
        if section[name] is not None and Path(section[name]).exists():
            section[name] = str(Path(section[name]).absolute())


def _resume(args: Resume, signals: Signals) -> int:
    for series in (METHODS, FOLDS):
        if series.is_in(Path(args.resume)):
            if args.device or args.log or args.steps:
                raise UserError(f"{args.resume} is {series.what}; it goes on with the options that it began with")
            return go_on(series, Path(args.resume), signals)
    return resume(args, signals)


def resume(args: Resume, signals: Signals) -> int:
    """Goes on with a finetuning from its newest valid checkpoint, or from the start where there is none yet."""
    from minillm.training import checkpoint
    from minillm.training.run import held, read_config

    run = Path(args.resume)
    config = read_config(run)
    if "imported" in config:
        raise UserError(f"{run} was imported and holds no training to go on with; minillm finetune {run} begins one")
    if "task" not in config:
        raise UserError(f"{run} is no finetuning; go on with it: python train.py --resume {run}")
    if (run / "result.json").exists() and is_finished(run, args.steps):
        say_finished(run)
        return 0
    settings = resumed(from_dict(Settings, config["settings"]), args)
    start = known_start(config["base"], run)
    scratch = config["task"]["options"].get("from_scratch", False)
    opened = begin_with(start, settings.seed if scratch else None)
    with held(run):
        newest = checkpoint.newest_valid(run, lambda line: say(f"warning: {line}"))
        say_where_from(run, newest)
        if not (run / "tokenizer").exists():
            opened.tokenizer.save(run / "tokenizer")
        prepared = prepare(config, settings, opened)
        return run_prepared(prepared, settings, run, config, trackers_of(args.log), signals, resume_from=newest)

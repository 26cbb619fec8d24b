"""A finetuning whose options are read: its examples and task, the run itself, and what is said at its end."""

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from minillm.commands.running import conclude, say
from minillm.commands.tasks import (
    data_hash,
    examples_of,
    is_default,
    json_ready,
    means_of,
    old_text,
    shown_metrics,
)
from minillm.config import Settings, UserError, from_dict
from minillm.peft.config import MethodConfig
from minillm.tasks.catalogue import TASKS
from minillm.tasks.division import divide, remarks
from minillm.tasks.trivial import against_trivial, sentence
from minillm.training.signals import Signals

EPOCHS = 4.0
DEFAULT_MINUTES = 1.5
"""Of training on the default data, which is there to try a task: with all else around it, less than three."""


def _task(name: str, options: dict[str, Any]) -> Any:
    """A task that has not seen data yet, with the options that it reads."""
    if name == "classify":
        return TASKS[name](weigh=options["class_weights"], threshold=options.get("threshold") != "off")
    return TASKS[name](beta=options["beta"]) if name == "preference" else TASKS[name]()


def begin_with(model: str | Path, scratch: int | None) -> Any:
    """The model to finetune, opened; with `scratch`, a seed, one of its shape with random weights in its place.

    Raises `UserError` for a model with a method in it that cannot be folded into its weights.
    """
    import torch

    from minillm.loading import open_model
    from minillm.model.transformer import Transformer

    opened = open_model(model)
    if opened.adapted is not None and (opened.adapted.fronts or opened.adapted.grown):
        method, base = opened.adapted.config.method, opened.config.get("base", {}).get("model", "its base")
        raise UserError(
            f"{model} was finetuned with method={method}, which stays in it beside its weights; finetune {base}, "
            "or what full, freeze, lora or adalora made of it"
        )
    if scratch is None:
        return opened
    torch.manual_seed(scratch)
    return replace(opened, model=Transformer(opened.transformer.config))


def prepare(config: dict[str, Any], settings: Settings, opened: Any) -> dict[str, Any]:
    """Examples, a task that knows them, head and means; `config` learns what they are.

    Raises `UserError` where a resumed run's examples are not what they were.
    """
    section, shape = config["task"], opened.transformer.config
    options, method = section["options"], from_dict(MethodConfig, config["method"], "method.")
    task = _task(section["name"], options)
    task.check(shape)
    val = None if options["val"] is None else examples_of(task, options["val"])
    test = () if options.get("test") is None else examples_of(task, options["test"])
    examples, fold = examples_of(task, settings.source), options.get("fold")
    parts = divide(task, examples, seed=settings.seed, val=val, test=test, fold=fold and (fold["number"], fold["of"]))
    task.fit(parts.train)  # what is held out has no say in what labels there are, how often, or on which scale
    corpus = {
        "source": settings.source,
        "documents": len(examples) + len(val or ()) + len(test),
        "split": "by seed" if options["val"] is None else options["val"],
        "hash": data_hash((parts.train, parts.val, () if test else parts.test)),
    }
    if test:
        corpus["test"] = {"source": options["test"], "examples": len(test), "hash": data_hash([test])}
    _require_unchanged(config.get("corpus", {}), corpus)
    head = task.head(shape, options["pool"] or ("pooler" if opened.pooler else None))
    section.update(info=task.info(), head=None if head is None else asdict(head))
    config["corpus"] = config.get("corpus", {}) | corpus | {"tokenizer": opened.tokenizer.hash}
    means = replace(means_of(opened.tokenizer, shape, method), start=opened.start, frame=opened.frame)
    if section["name"] == "seq2seq" and any(means.frame):  # what it has learnt to read and write between
        section.update(start=means.start, frame=means.frame)
    old = None if options.get("from_scratch") else old_text(opened, means)  # what was never learnt is not forgotten
    for remark in remarks(task, parts):
        say(remark)
    pooler = None if options.get("from_scratch") else opened.pooler
    found = {"base": opened.transformer, "task": task, "means": means, "head": head, "pooler": pooler, "old": old}
    return found | {"parts": parts, "replay": options["replay"], "l2_start": options["l2_start"]}


def _require_unchanged(known: dict[str, Any], corpus: dict[str, Any]) -> None:
    """Raises `UserError` where the examples that a run began with, as config.json's `corpus`, were other ones."""
    for before, now in ((known, corpus), (known.get("test", {}), corpus.get("test", {}))):
        if now and before.get("hash") not in (None, now["hash"]):
            raise UserError(f"the examples of {now['source']} have changed since the run began; start a new one")


def run_prepared(prepared, settings: Settings, run: Path, config, trackers, signals: Signals, *, resume_from) -> int:
    from minillm import preflight
    from minillm.training.finetune import Finetuning, finetune
    from minillm.training.job import TrainingFailed
    from minillm.training.plan import choose_dtype
    from minillm.training.report import write_report

    def micro_batch(model: Any, device: Any) -> int:
        return preflight.micro_batch(settings, device=device, dtype=choose_dtype(settings, device))

    options = config["task"]["options"]
    asked = options["epochs"] is not None or settings.steps is not None or settings.minutes is not None
    work = Finetuning(
        settings=settings,
        run=run,
        config=config,
        method=from_dict(MethodConfig, config["method"], "method."),
        epochs=options["epochs"] or EPOCHS,
        minutes_at_most=DEFAULT_MINUTES if is_default(settings.source) and not asked else None,
        balance=options["balance"],
        layer_decay=options["layer_decay"],
        micro_batch=micro_batch,
        say=say,
        log=trackers,
        **prepared,
    )
    _tell_weights(work.task)
    try:
        done = finetune(work, signals, resume_from=resume_from)
        signals.careful = True  # what is left takes a moment, and is done whole
    except TrainingFailed as failure:
        print(f"error: {failure}\nreport: {write_report(run)}", file=sys.stderr)
        return 1
    if done.outcome.code:
        write_report(run)
    else:
        _conclude(run, config, done, whole=resume_from is None)
    return done.outcome.code


def _tell_weights(task: Any) -> None:
    weights = getattr(task, "weights", None)
    if weights is not None:
        shown = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(task.labels.names, weights, strict=True))
        say(f"weights   classes are unbalanced, so they count: {shown} (--class-weights off to switch off)")


def _conclude(run: Path, config: dict[str, Any], done: Any, *, whole: bool) -> None:
    """The result on stdout, in the report and in result.json, and what to do next; `whole`: this process ran it from
    the start."""
    from minillm.machine import peak_bytes
    from minillm.training import lr_range
    from minillm.training.report import write_report
    from minillm.training.run import read_metrics, write_json

    progress = done.outcome.progress
    plan, adapter = config["plan"], run / "adapter" / "adapter_model.safetensors"
    result = {
        "task": config["task"]["name"], "method": config["method"]["method"], "metrics": json_ready(done.metrics),
        "steps": progress.step, "best_step": progress.best_step, "seconds": progress.seconds,
        "trained_parameters": plan["trained_parameters"], "parameters": plan["parameters"],
        "adapter_bytes": adapter.stat().st_size, "peak_bytes": peak_bytes(),
        "cpu_seconds": time.process_time() if whole else None,
    }  # fmt: skip
    result["against"] = against_trivial(result["task"], read_metrics(run), result["metrics"])
    result["scored_on"] = scored_on = _scored_on(config)
    verdict = sentence(result["against"])
    of_examples = {name: x for name, x in done.metrics.items() if isinstance(x, float) and not name.startswith("old_")}
    shown = ", ".join(" ".join(line.split()) for line in shown_metrics(of_examples)).replace("_", " ")
    if "test" in config["corpus"] and (run / "result.json").exists():
        say("note: the test examples were scored before: who goes on until they please has chosen by them")
    ranged = lr_range.applies(config)
    said = [] if ranged else [f"With its best weights, {scored_on['words']}: {shown}.", verdict]
    report = write_report(run, said)
    write_json(run / "result.json", result)  # last: a run that has it is not looked at again
    if ranged:
        conclude(run, config, report)
        return
    best = f"best at step {progress.best_step:,}"
    print(f"{done.outcome.reason} after {progress.step:,} steps, {best}; {scored_on['words']}:")
    print("\n".join(shown_metrics(done.metrics)))
    print(verdict)
    name = config["task"]["name"]
    use = {"chat": "chat", "preference": "chat", "lm": "generate"}.get(name, "predict")
    more = {"generate": ' --prompt "…"', "predict": " --input FILE"}.get(use, "")
    print(f"\nreport: {report}\n\nnext:\n  minillm {use} {run}{more}\n  minillm evaluate {run} --data FILE")


def _scored_on(config: dict[str, Any]) -> dict[str, Any]:
    """What the figures of a finished run are of."""
    fold, test = config["task"]["options"].get("fold"), config["corpus"].get("test")
    if fold is not None:
        words = f"on fold {fold['number']} of {fold['of']}, which was held out"
        return {"part": "fold", **fold, "words": words}
    if test is None:
        return {"part": "validation", "words": "on validation data"}
    words = f"on the {test['examples']:,} test examples of {test['source']}, which nothing was chosen by"
    return {"part": "test", "source": test["source"], "examples": test["examples"], "words": words}


def last_result(run: Path) -> dict[str, Any]:
    """result.json of a finished run."""
    return json.loads((run / "result.json").read_text(encoding="utf-8"))

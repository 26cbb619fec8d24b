"""What is wrong with a run, from what it left behind: config.json, metrics.jsonl, and the files' own hashes.

kind          a run has it when
first-loss    its loss before the first update (of the validation; where the plan had no time for that, of the first
              step) is further from ln V than 5 % (Glorot's embeddings: and 0.6 nats above): labels that leak or are
              shifted, a wrong start
no-learning   its best validation never came below what counting single tokens gives (where there is no such
              baseline: below 90 % of ln V)
nonfinite     a loss or gradient was NaN or infinite
spikes        steps were passed over (train.skip_spikes), or gradients far larger than usual ended it
masked-out    a stretch of training, or a validation, had no target that counted
dead-layer    the last gradient of a part of the model was zero, or under 1 % of its hidden units ever fired
diverging     validation ended more than 2 % above its best, and training did not go on falling either
overfitting   the same while training went on falling
unusual       it ended elsewhere than other runs of the same preset on the same text (see NORMAL)
slow          its last quarter ran at less than half the speed of its first half
damaged       a file is missing, or not what was written
unfinished    it stands before its last planned step
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minillm import presets
from minillm.config import DamagedFile, Settings, UserError, from_dict
from minillm.training import checkpoint, lr_range, shelf
from minillm.training.charts import finite
from minillm.training.pretrain import resolved
from minillm.training.run import read_config, read_metrics
from minillm.training.verdict import scores

FIRST_LOSS, GLOROT = 0.05, 0.6
UNTRAINED = (("val", 0), ("train", 1))  # split and step of the lines that speak of weights as they were drawn
RISE = 1.02
DEAD_SHARE = 0.01
SLOW = 0.5

NORMAL = {
    ("shakespeare-char", "tiny Shakespeare"): (2.406, 2.403),
    ("gpt2-tiny", "stdlib"): (3.154, 3.163),
    ("llama-tiny", "stdlib"): (3.111, 3.107),
    ("mlm-tiny", "stdlib"): (3.045, 3.049),
    ("seq2seq-tiny", "stdlib"): (3.682, 3.675),
}
"""Preset and text -> how measured runs ended, one number a seed, in bits per byte of the held-out text; where only some
of its tokens are targets, in nats per target (the last two: seeds 0 and 1, one thread, bf16).

Only presets that are given in steps: what is reached in minutes tells more of the machine than of the run."""
APART = 0.05
"""How far from these is still normal, as a share: far more than seeds differ, since the standard library's text differs
between versions of Python, and products in bf16 from those in fp32."""

TINY_SHAKESPEARE = "0fc28089acbeeea6eef9cc0a59c7f26eeff7d3add90afc0f31d5f1767e69cbb4"
"""The hash of that text, 1,115,394 bytes, by which it is known under any name."""

Metrics = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Problem:
    kind: str
    """One of the kinds in the module's table."""
    message: str
    """What, where, and what to do about it."""


def examine(run: Path) -> list[Problem]:
    """Everything wrong with the run, most telling first; empty for a healthy one.

    Raises `UserError` where `run` holds no run, `DamagedFile` where config.json cannot be read.
    """
    config, metrics = read_config(run), read_metrics(run)
    imported = "imported" in config  # a model that was never trained here: only its files can be wrong
    problems = _files(run, metrics, trained=not imported)
    if imported:
        return problems
    for check in RANGE_CHECKS if lr_range.applies(config) else CHECKS:
        problems += [Problem(*found) for found in check(config, metrics)]
    return problems + _unfinished(run, config, metrics)


def _files(run: Path, metrics: Metrics, *, trained: bool) -> list[Problem]:
    problems = []
    if trained and not metrics:
        problems.append(Problem("damaged", f"{run / 'metrics.jsonl'} is missing or empty: nothing is known of the run"))
    torn = _torn_lines(run / "metrics.jsonl")
    if torn:
        problems.append(Problem("damaged", f"{run / 'metrics.jsonl'}: lines {torn} are no JSON and were left out"))
    if not (run / "tokenizer").is_dir():
        problems.append(Problem("damaged", f"{run / 'tokenizer'} is missing; each checkpoint holds a copy of it"))
    for _, folder in sorted(shelf.folders(run / "checkpoints").items()):
        try:
            checkpoint.verify(folder)
        except DamagedFile as damage:
            remedy = "--resume goes on from the newest valid checkpoint" if trained else "import the model again"
            problems.append(Problem("damaged", f"{damage}; {remedy}"))
    return problems


def _torn_lines(path: Path) -> str:
    """Numbers of the lines that are no JSON object; the last one may be half written, that is what a kill leaves."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    torn = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            torn.append(str(number))
    return ", ".join(torn[:5]) + (", …" if len(torn) > 5 else "")


def _first_loss(config: Mapping[str, Any], metrics: Metrics) -> list[tuple[str, str]]:
    first = next((line for line in metrics if (line.get("split"), line.get("step")) in UNTRAINED), {})
    model = config["settings"].get("model") or {}
    if not finite(first.get("loss")) or not model.get("vocab_size") or config.get("base"):
        return []
    expected = math.log(model["vocab_size"])
    above = FIRST_LOSS * expected + (GLOROT if model.get("init") == "xavier" else 0.0)
    if first["loss"] > expected + above:
        cause = "the weights start too large, or targets and tokenizer do not belong together"
    elif first["loss"] < expected * (1 - FIRST_LOSS):
        cause = "the model sees its targets, or did not start from scratch"
    else:
        return []
    expectation = f"an untrained model of {model['vocab_size']} tokens should start near ln V = {expected:.3f}"
    return [("first-loss", f"the first {_text(first)} loss is {first['loss']:.3f}; {expectation}: {cause}")]


def _no_learning(config: Mapping[str, Any], metrics: Metrics) -> list[tuple[str, str]]:
    result = scores(metrics)
    trained = [value for step, value in result.validation if step > 0]
    steps = (config.get("plan") or {}).get("steps") or 0
    if not trained or result.validation[-1][0] < steps / 2:
        return []
    vocabulary = (config["settings"].get("model") or {}).get("vocab_size") or 2
    floor, name = result.baselines.get("unigram"), "the unigram baseline (counting single tokens)"
    if floor is None and result.unit == "nats per target":
        floor, name = 0.9 * math.log(vocabulary), "90 % of ln V"
    if floor is None or min(trained) < floor:
        return []
    best = f"its best was {min(trained):.3f} in {result.validation[-1][0]} steps"
    cure = "train longer, or with another --optim.lr; if that changes nothing, look at the data"
    return [("no-learning", f"validation never came below {name}, {floor:.3f} {result.unit}; {best}: {cure}")]


def _nonfinite(config: Mapping[str, Any], metrics: Metrics) -> list[tuple[str, str]]:
    for line in metrics:
        if line.get("event") == "nonfinite":
            samples = ", ".join(map(str, (line.get("samples") or [])[:8]))
            where = f"first in {line.get('layer')}, with samples {samples}"
            cure = "lower --optim.lr, or take --dtype fp32; the weights are those before that step"
            return [("nonfinite", f"step {line.get('step')}: the {line.get('what')} is not finite, {where}; {cure}")]
    for line in metrics:
        if "split" in line and not finite(line.get("loss")):
            return [("nonfinite", f"step {line.get('step')}: the {_text(line)} loss is {line.get('loss')}")]
    return []


def _spikes(config: Mapping[str, Any], metrics: Metrics) -> list[tuple[str, str]]:
    found = [line for line in metrics if line.get("event") in ("skipped", "spikes")]
    if not found:
        return []
    steps = ", ".join(str(line.get("step")) for line in found[:8]) + (", …" if len(found) > 8 else "")
    ended = "the last of them ended the run" if found[-1]["event"] == "spikes" else "all of them were passed over"
    share = len(found) / max(1, max(line.get("step", 0) for line in metrics))
    cure = "look at what was read there; a lower --optim.lr or a longer --optim.warmup makes them rarer"
    what = f"{len(found)} steps ({share:.2%}) met a loss or gradient that was not finite or far larger than usual"
    return [("spikes", f"{what}: {steps}; {ended}: {cure}")]


def _masked_out(config: Mapping[str, Any], metrics: Metrics) -> list[tuple[str, str]]:
    empty = [line for line in metrics if "split" in line and line.get("targets") == 0]
    if not empty:
        return []
    shown = ", ".join(f"{_text(line)} at step {line['step']}" for line in empty[:3])
    more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
    return [
        (
            "masked-out",
            f"no target counted in {shown}{more}: every label was masked, and nothing was learned there; look at the "
            "data's labels and at what is cut off at model.context",
        )
    ]


def _dead_layers(config: Mapping[str, Any], metrics: Metrics) -> list[tuple[str, str]]:
    last = next((line for line in reversed(metrics) if line.get("event") == "layers"), None)
    if last is None:
        return []
    problems = []
    if still := [name for name, norm in (last.get("grad_norms") or {}).items() if norm == 0]:
        problems.append(f"no gradient reaches {', '.join(still)} (step {last['step']})")
    if silent := [name for name, share in (last.get("active") or {}).items() if share < DEAD_SHARE]:
        problems.append(f"the hidden units of {', '.join(silent)} are all zero (step {last['step']})")
    cure = (
        "a lower --optim.lr or --optim.weight-decay lets parts live; a part outside the graph is a fault in the model"
    )
    return [("dead-layer", f"{what}: it no longer learns; {cure}") for what in problems]


def _getting_worse(config: Mapping[str, Any], metrics: Metrics) -> list[tuple[str, str]]:
    result = scores(metrics)
    if len(result.validation) < 2 or not result.train:
        return []
    (best_step, best), (last_step, last) = min(result.validation, key=lambda point: point[1]), result.validation[-1]
    if last <= RISE * best:
        return []
    then = [value for step, value in result.train if step <= best_step][-5:] or [result.train[0][1]]
    now = [value for _, value in result.train][-5:]
    rise = f"validation rose from {best:.3f} at step {best_step} to {last:.3f} at step {last_step}"
    if statistics.fmean(now) < statistics.fmean(then):
        cure = "more text, --model.dropout or fewer steps; checkpoints/best still holds the best weights"
        return [("overfitting", f"{rise} while the training loss went on falling: {cure}")]
    return [("diverging", f"{rise}, and the training loss did not fall either: lower --optim.lr")]


def _unusual(config: Mapping[str, Any], metrics: Metrics) -> list[tuple[str, str]]:
    settings, result = config["settings"], scores(metrics)
    known = (config.get("corpus") or {}).get("hash") == TINY_SHAKESPEARE
    text = "tiny Shakespeare" if known else settings.get("source")
    measured = NORMAL.get((settings.get("preset"), text))
    finished = any(line.get("event") == "end" and line.get("reason") == "finished" for line in metrics)
    if not measured or not finished or not result.validation or config.get("base") or not _as_its_preset(config):
        return []
    last, low, high = result.validation[-1][1], (1 - APART) * min(measured), (1 + APART) * max(measured)
    if low <= last <= high:
        return []
    cause = "held-out text that was trained on would do that; minillm data clean finds copies"
    if last > high:
        cause = "compare the curves of loss and gradient norm in report.html, and the versions in config.json"
    usual = f"{settings['preset']} on {text} usually ends between {low:.3f} and {high:.3f}"
    return [("unusual", f"it ended at {last:.3f} {result.unit}, and {usual}: {cause}")]


def _as_its_preset(config: Mapping[str, Any]) -> bool:
    """Whether nothing was set that changes what is learned."""

    def learned(settings: Settings) -> tuple[Any, ...]:
        train, data = settings.train, replace(settings.data, workers=None)
        loop = (train.batch, train.patience, train.label_smoothing, train.z_loss)
        return settings.model, settings.tokenizer, data, settings.optim, loop

    try:
        chosen = from_dict(Settings, config["settings"])
        vocabulary = chosen.model.vocab_size or 0
        usual = resolved(presets.settings(chosen.preset, {"model": {"vocab_size": vocabulary}}), vocabulary)
    except UserError:  # a field or preset of another version
        return False
    return learned(chosen) == learned(usual) and (config.get("plan") or {}).get("steps") == usual.steps


def _slow(config: Mapping[str, Any], metrics: Metrics) -> list[tuple[str, str]]:
    speeds = [line["tokens_per_second"] for line in metrics if finite(line.get("tokens_per_second"))]
    if len(speeds) < 8:
        return []
    early, late = statistics.median(speeds[: len(speeds) // 2]), statistics.median(speeds[-(len(speeds) // 4) :])
    if late >= SLOW * early:
        return []
    cause = "another program took the machine, it ran hot, or memory ran out and was swapped"
    return [("slow", f"the speed fell from {early:,.0f} to {late:,.0f} tokens/s: {cause}")]


def _unfinished(run: Path, config: Mapping[str, Any], metrics: Metrics) -> list[Problem]:
    end = next((line for line in reversed(metrics) if line.get("event") == "end"), {})
    if end.get("reason") in ("finished", "early stop"):
        return []
    step = max((line["step"] for line in metrics if isinstance(line.get("step"), int)), default=0)
    planned = (config.get("plan") or {}).get("steps")
    of = f" of {planned}" if planned else ""
    return [
        Problem(
            "unfinished",
            f"it stands at step {step}{of}; if it is not running now, go on with: python train.py --resume {run}",
        )
    ]


def _text(line: Mapping[str, Any]) -> str:
    return "validation" if line.get("split") == "val" else "training"


CHECKS: tuple[Callable[[Mapping[str, Any], Metrics], list[tuple[str, str]]], ...] = (
    _nonfinite,
    _spikes,
    _masked_out,
    _first_loss,
    _dead_layers,
    _no_learning,
    _getting_worse,
    _unusual,
    _slow,
)
RANGE_CHECKS = (_masked_out, _first_loss, _slow)
"""Of a test of the rate's range, which is to break down at its end."""

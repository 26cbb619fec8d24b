"""What a run came to, in plain sentences: which baselines it beat, whether it memorises, what to do next.

Scores are bits per byte where the objective defines them, else nats per target; lower is better in both.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.training import lr_range
from minillm.training.charts import finite, number

BASELINES = {"uniform": "uniform", "unigram": "unigram", "bigram": "bigram", "gzip": "gzip -9", "xz": "xz -9"}
MEMORISING = 1.10  # held-out score over training score, above which the model tells the two texts apart
RISEN = 1.005  # final score over the best one, above which the validation curve has turned


@dataclass(frozen=True)
class Scores:
    """The numbers of a run in one unit."""

    unit: str
    validation: list[tuple[int, float]]
    """(step, score) of each validation with a finite result."""
    train: list[tuple[int, float]]
    baselines: dict[str, float]
    """By their names for people; only those that are defined."""


def scores(metrics: Sequence[Mapping[str, Any]]) -> Scores:
    """Reads the lines of metrics.jsonl; bits per byte where any validation has them."""
    in_bits = any(finite(line.get("bits_per_byte")) for line in metrics if line.get("split") == "val")
    key, suffix = ("bits_per_byte", "") if in_bits else ("loss", "_loss")

    def curve(split: str) -> list[tuple[int, float]]:
        return [(line["step"], line[key]) for line in metrics if line.get("split") == split and finite(line.get(key))]

    found = next((line for line in metrics if line.get("event") == "baselines"), {})
    baselines = {words: found[name + suffix] for name, words in BASELINES.items() if finite(found.get(name + suffix))}
    return Scores("bits per byte" if in_bits else "nats per target", curve("val"), curve("train"), baselines)


def verdict(config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on how the run ended, how good it is, and whether it memorises; at least one."""
    if lr_range.applies(config):
        return _how_it_ended(config, metrics) + lr_range.sentences(metrics)
    sentences = _how_it_ended(config, metrics) + _skipped(metrics)
    result = scores(metrics)
    if not result.validation:
        return [*sentences, "The model was not validated yet, so there is nothing to compare."]
    first, (best_step, best) = result.validation[0], min(result.validation, key=lambda point: point[1])
    beginning = f", down from {score(first[1])} at step {first[0]:,}" if first[1] > best else ""
    sentences.append(
        f"The model reached {score(best)} {result.unit} on held-out text, at step {best_step:,}{beginning}."
    )
    sentences += _against_baselines(best, result.baselines)
    last = next(line for line in reversed(metrics) if line.get("split") == "val")
    if last["step"] != result.validation[-1][0]:
        return [
            *sentences,
            f"At step {last['step']:,} the validation gave no finite number: the model has broken down.",
        ]
    epochs = max((line.get("epoch", 1.0) for line in metrics if line.get("split") == "train"), default=1.0)
    return sentences + _memorising(result, best_step, best, epochs)


def score(value: float) -> str:
    """Three decimals, which is what runs differ in."""
    return f"{value:.3f}" if value < 1000 else number(value)


def _how_it_ended(config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    steps = (config.get("plan") or {}).get("steps")
    of_all = f" of {steps:,}" if isinstance(steps, int) else ""
    last = metrics[-1] if metrics else {}
    if last.get("event") == "nonfinite":
        return [
            f"Training broke down at step {last['step']:,}: the {last['what']} was not a finite number, first in "
            f"{last['layer']}. The weights before that step are kept; a lower --optim.lr is the usual cure."
        ]
    if last.get("event") == "spikes":
        return [
            f"Training broke down at step {last['step']:,}: the gradient's norm was {number(last['grad_norm'])} where "
            f"{number(last['usual'])} is usual, after {last['skipped']} steps in a row had been passed over. "
            "The weights before them are kept; a lower --optim.lr is the usual cure."
        ]
    if last.get("event") == "end" and last.get("reason") == "early stop":
        return [f"Early stopping ended it at step {last['step']:,}{of_all}: the validation no longer improved."]
    if last.get("event") == "end" and last.get("reason") == "signal":
        return [f"A signal stopped it at step {last['step']:,}{of_all}; it can be resumed."]
    if last.get("event") != "end":
        reached = max((line["step"] for line in metrics if "step" in line), default=0)
        return [f"It has not ended: {reached:,}{of_all} steps are recorded."]
    return []


def _skipped(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    steps = [f"{line['step']:,}" for line in metrics if line.get("event") == "skipped"]
    if not steps:
        return []
    shown = _listed(steps[:6]) if len(steps) <= 6 else ", ".join(steps[:6]) + ", …"
    which = f"Step {shown} was" if len(steps) == 1 else f"{len(steps)} steps ({shown}) were"
    return [f"{which} passed over, and moved nothing: a loss or gradient not finite, or far larger than usual."]


def _against_baselines(best: float, baselines: Mapping[str, float]) -> list[str]:
    ordered = sorted(baselines.items(), key=lambda item: -item[1])
    beaten = [(name, value) for name, value in ordered if best < value]
    ahead = [(name, value) for name, value in ordered if best >= value]
    sentences = []
    if beaten:
        named = _listed([f"{name} ({score(value)}, by {1 - best / value:.0%})" for name, value in beaten])
        sentences.append(f"It beats {named}.")
    if ahead:
        named = _listed([f"{name} ({score(value)}, {best / value - 1:.0%} short)" for name, value in ahead])
        sentences.append(f"It does not {'yet ' if beaten else ''}beat {named}.")
    return sentences


def _memorising(result: Scores, best_step: int, best: float, epochs: float) -> list[str]:
    last_step, last = result.validation[-1]
    recent = [y for step, y in result.train if step > 0.9 * last_step] or [y for _, y in result.train[-1:]]
    if not recent or not last_step:
        return []
    train = math.fsum(recent) / len(recent)
    if last > best * RISEN:
        turned = (
            f"the validation was best at step {best_step:,} ({score(best)}) and {score(last)} at step {last_step:,}"
        )
        if train < last and best_step > 0:
            return [f"Overfitting: {turned}. More text, --model.dropout, or fewer steps would help."]
        return [f"It got worse, on training text too: {turned}. A lower --optim.lr is the usual cure."]
    if train > 0 and last / train > MEMORISING:
        if epochs < 1:  # nothing was read twice, so nothing was memorised
            return [f"The held-out text is harder for it ({score(last)}) than the training text ({score(train)})."]
        return [
            f"It predicts training text {1 - train / last:.0%} better ({score(train)}) than held-out text "
            f"({score(last)}): it begins to memorise, though the validation still improves."
        ]
    sentence = f"No overfitting: {score(train)} on training text, {score(last)} on held-out text."
    earlier = ((step, y) for step, y in reversed(result.validation) if step <= 0.75 * last_step)
    step, before = next(earlier, (0, last))
    if step >= 0.5 * last_step and last < 0.99 * before:
        share = f"{1 - step / last_step:.0%}"
        sentence += f" The last {share} of the steps still gained {1 - last / before:.1%}: a longer run would go lower."
    return [sentence]


def next_commands(run: Path, config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Three commands that make sense now, each with its reason: (command, reason)."""
    settings, plan = config.get("settings") or {}, config.get("plan") or {}
    folder = shlex.quote(str(run))
    last = metrics[-1] if metrics else {}
    broken = last.get("event") in ("nonfinite", "spikes")
    if broken and config.get("task"):
        return [
            (f"minillm doctor {folder}", "names what is wrong, and where"),
            (f"minillm plot {folder}", "the curves up to the break"),
        ]
    if broken:
        return [
            (f"minillm doctor {folder}", "names what is wrong, and where"),
            (_again(config, _rates(config, 0.3)), "the same run with a third of the learning rate"),
            (f"minillm plot {folder}", "the curves up to the break"),
        ]
    if lr_range.applies(config) and last.get("reason") == "finished":
        return _after_range(config, metrics)
    if config.get("task"):
        return _after_finetuning(folder, config["task"]["name"], last)
    commands = []
    if last.get("reason") not in ("finished", "early stop"):
        commands.append((f"python train.py --resume {folder}", "goes on where it stopped, bit for bit"))
    if (settings.get("model") or {}).get("shape", "decoder") == "decoder":
        prompt = next((line["prompt"] for line in metrics if line.get("event") == "sample"), "").strip("\n")
        commands.append((f"minillm generate {folder} --prompt {shlex.quote(prompt)}", "lets it write"))
    else:
        commands.append((f"minillm doctor {folder}", "checks the run for known faults"))
    minutes, steps = settings.get("minutes"), plan.get("steps")
    if minutes or steps:
        longer = {"minutes": f"{4 * minutes:g}" if minutes else None, "steps": None if minutes else str(4 * steps)}
        commands.append((_again(config, longer), "four times as long: the surest way to a lower loss"))
    commands.append((f"minillm plot {folder}", "draws the curves; name several runs to compare them"))
    return commands[:3]


def _after_finetuning(folder: str, task: str, last: Mapping[str, Any]) -> list[tuple[str, str]]:
    use = {"chat": "chat", "preference": "chat"}.get(task)
    commands = [(f"minillm chat {folder}", "talks with it")] if use else []
    commands.append((f"minillm predict {folder} --input FILE", "answers each line of a file"))
    if last.get("reason") not in ("finished", "early stop"):
        commands.insert(0, (f"minillm finetune --resume {folder}", "goes on where it stopped, bit for bit"))
    commands.append((f"minillm evaluate {folder} --data FILE", "its metrics on other labelled examples"))
    return commands[:3]


def _after_range(config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The run that was meant, at the rate that was found; else the test with other rates."""
    found = lr_range.read(metrics)
    if found is None or found.suggested is None:
        share, words = (0.1, "a tenth of") if found is not None and found.turned else (10, "ten times")
        return [(_again(config, _rates(config, share)), f"the same test, up to {words} the rate")]
    changes = {"optim.schedule": None, "steps": None, "minutes": None, "epochs": None}
    changes |= _rates(config, found.suggested / config["settings"]["optim"]["lr"])
    return [(_again(config, changes), "the run itself, at that rate")]


def _rates(config: Mapping[str, Any], share: float) -> dict[str, str | None]:
    """`optim.lr`, and the rates beside it that are used, multiplied."""
    optim = (config.get("settings") or {}).get("optim") or {}
    used = {"lr": True, "muon_lr": optim.get("name") == "muon", "embedding_lr": optim.get("embedding_lr") is not None}
    return {f"optim.{name.replace('_', '-')}": f"{share * optim.get(name, 1e-3):.2g}" for name in used if used[name]}


def _again(config: Mapping[str, Any], changes: Mapping[str, str | None]) -> str:
    """The command that began a run with some options changed, or left out, and with a folder of its own."""
    settings, options = config.get("settings") or {}, list(config.get("options") or ())
    replaced = ["out", "overwrite", *changes]
    if config.get("task"):
        model = str(config["base"]["model"])
        options = [model, *(part for part in options if Path(part) != Path(model))]
        command = "minillm finetune"
    else:
        replaced += ["preset", "data", "profile"]
        command = f"python train.py --preset {shlex.quote(str(settings.get('preset', 'default')))}"
        if settings.get("source", "stdlib") != "stdlib":
            command += f" --data {shlex.quote(str(settings['source']))}"
    given = [part for name, value in changes.items() if value is not None for part in (f"--{name}", value)]
    return " ".join([command, *(shlex.quote(part) for part in [*_without(options, replaced), *given])])


def _without(options: Sequence[str], names: Sequence[str]) -> list[str]:
    """A command line without some of its options and their values."""
    kept, keep = [], True
    for part in options:
        if part.startswith("--"):
            keep = part.removeprefix("--").split("=", 1)[0].replace("_", "-") not in names
        if keep:
            kept.append(part)
    return kept


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]

"""The report of runs that went well, badly, or hardly began; and what it says about them."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minillm.config import DamagedFile, UserError, to_dict
from minillm.presets import settings
from minillm.training.report import next_commands, verdict, write_report

BASELINES = {
    "event": "baselines",
    **{"uniform": 4.0, "unigram": 3.0, "bigram": 2.5, "gzip": 1.93, "xz": 1.59},
    **{"uniform_loss": 8.3, "unigram_loss": 6.2, "bigram_loss": 5.1, "val_bytes": 1000, "val_targets": 300},
}


def config(steps: int = 100, preset: str = "default", **changes) -> dict:
    return {
        "format": 1,
        "settings": to_dict(settings(preset, changes)),
        "plan": {"device": "cpu", "kernels": "torch", "steps": steps, "parameters": 5_341_184},
        "corpus": {"source": "stdlib", "split": "by document hash", "hash": "ab" * 32, "train_tokens": 3_600_000},
        "versions": {"torch": "2.13.0"},
    }


def train(step: int, bits: float | None, **more) -> dict:
    return {"step": step, "tokens": step * 4096, "seconds": step / 4, "split": "train", "loss": (bits or 1.0) * 2,
            "bits_per_byte": bits, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 17_000.0, "targets": 40_960,
            "epoch": step / 40, **more}  # fmt: skip


def val(step: int, bits: float | None, **more) -> dict:
    return {"step": step, "tokens": step * 4096, "seconds": step / 4, "split": "val", "loss": (bits or 1.0) * 2,
            "bits_per_byte": bits, "targets": 300, **more}  # fmt: skip


def sample(step: int, text: str, **more) -> dict:
    return {"event": "sample", "step": step, "prompt": "def ", "text": text, "parses": None, "tried": 0, **more}


def end(step: int, reason: str = "finished") -> dict:
    return {"event": "end", "step": step, "seconds": step / 4, "reason": reason, "best_step": step, "best_loss": 3.5}


GOOD = [
    BASELINES,
    val(0, 4.1),
    sample(0, "def xx"),
    *(train(step, 4 - step / 50) for step in range(10, 51, 10)),
    val(50, 2.2),
    *(train(step, 1.7) for step in range(60, 101, 10)),
    val(100, 1.75),
    sample(100, "def f(x):\n    return x", parses=0.75, tried=16),
    end(100),
]


class Page(HTMLParser):
    """What a browser would see: words, elements and what they would load."""

    VOID = ("meta", "br", "path")

    def __init__(self, text: str):
        super().__init__()
        self.words, self.loads, self.open, self.charts = "", [], [], []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "action", "srcset"):
                self.loads.append((tag, value))
            if name == "data-chart":
                self.charts.append(json.loads(value))

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:  # <td>, <tr> … need no end
            pass

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words += data


def report(folder: Path, metrics: list[dict], **changes) -> tuple[str, Page]:
    (folder / "config.json").write_text(json.dumps(config(**changes)), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics), encoding="utf-8")
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_a_good_run_is_told_as_it_was(tmp_path: Path) -> None:
    _, page = report(tmp_path, GOOD)
    for words in ["default on stdlib", "5.3 M parameters · 100 steps · 409.6 k tokens · 25 s · on cpu",
                  "by document hash", "abababababab…", "3,600,000", "75% of 16 parse", "def f(x):\n    return x",
                  *verdict(config(), GOOD)]:  # fmt: skip
        assert words in page.words, words
    for command, reason in next_commands(tmp_path, config(), GOOD):
        assert command in page.words and reason in page.words
    titles = {title for title in ("Bits per byte", "Learning rate", "Gradient norm", "Tokens a second")}
    assert all(title in page.words for title in titles) and len(page.charts) == len(titles)
    (names, points), (_, validation) = page.charts[0]["lines"]
    assert names == "training" and len(points) == 10 and points[0] == [10, "3.8"]
    assert validation == [[0, "4.1"], [50, "2.2"], [100, "1.75"]]
    assert page.charts[0]["words"][-1] == [100, "step 100 · 409.6 k tokens · 25 s"]


def test_what_differs_from_the_defaults_comes_first(tmp_path: Path) -> None:
    _, page = report(tmp_path, GOOD, train={"batch": 48})
    before, after = page.words.split("settings at their defaults")
    assert re.search(r"train\.batch\s*48\s*32", before) and "train.batch" not in after
    assert "optim.beta1" in after and "optim.beta1" not in before


def test_the_page_loads_nothing_and_its_one_script_is_the_one_allowed(tmp_path: Path) -> None:
    text, page = report(tmp_path, GOOD)
    assert (
        page.loads == [] and "url(" not in text and "@import" not in text and "http" not in text.replace("http-eq", "")
    )
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert f"script-src 'sha256-{digest}';" in policy and policy.startswith("default-src 'none';")


def test_what_a_model_wrote_is_text_and_never_markup(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\x00&amp;\"'"
    _, page = report(
        tmp_path,
        [*GOOD[:-1], sample(100, evil, prompt="<b>"), end(100)],
        source="<i>texts</i>",
        train={"sample_prompt": "<u>"},
    )
    assert evil.replace("\x00", "") in page.words.replace("\x00", "").replace("\ufffd", "")
    assert "<b>" in page.words and "<u>" in page.words
    assert page.tags.count("script") == 1 and not {"img", "u"} & set(page.tags)


SITUATIONS = {
    "nothing recorded": [],
    "baselines alone": [BASELINES],
    "one validation": [val(0, 4.0)],
    "two steps": [val(0, 4.0), train(1, 3.9), train(2, 3.8), val(2, 3.7), end(2)],
    "no baselines": [line for line in GOOD if line.get("event") != "baselines"],
    "null baselines": [dict.fromkeys(BASELINES) | {"event": "baselines"}, *GOOD[1:]],
    "NaN": [val(0, 4.0), train(1, math.nan), train(2, math.inf), train(3, 3.0), val(3, math.nan)],
    "exploded": [val(0, 4.0), train(1, 1e30, grad_norm=1e38), val(1, 1e30)],
    "broke down": [
        *GOOD[:6],
        {"event": "nonfinite", "step": 41, "what": "gradient", "layer": "decoder.blocks.1", "samples": [3]},
    ],
    "masked": [
        dict.fromkeys(BASELINES) | {"event": "baselines", "uniform_loss": 8.3, "unigram_loss": 6.2},
        val(0, None, loss=8.4),
        train(10, None, loss=7.0),
        val(10, None, loss=6.0),
        end(10),
    ],
    "cut line": [*GOOD[:-1], {"step": 100}],
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_situation_has_a_report(tmp_path: Path, situation: str) -> None:
    metrics = SITUATIONS[situation]
    text, page = report(tmp_path, metrics)
    sentences = verdict(config(), metrics)
    assert sentences and all(sentence in page.words for sentence in sentences)
    assert "nan" not in re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL).lower()
    for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", text):
        assert 0 <= float(x) <= 1000 and 0 <= float(y) <= 1000, "a line leaves the chart"


def test_marks_between_two_records_are_in_proportion(tmp_path: Path) -> None:
    _, page = report(tmp_path, [val(0, 4.0), val(10, 3.0)])
    assert "step 0" + "2" + "8,192" + "0.5 s" + "4" + "16.4 k" + "1.0 s" in page.words


def test_a_page_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text('{"settings": ')
    with pytest.raises(DamagedFile, match="is damaged"):
        write_report(tmp_path)


def test_the_verdict_names_what_was_beaten_and_by_how_much() -> None:
    sentences = verdict(config(), GOOD)
    assert sentences == [
        "The model reached 1.750 bits per byte on held-out text, at step 100, down from 4.100 at step 0.",
        "It beats uniform (4.000, by 56%), unigram (3.000, by 42%), bigram (2.500, by 30%) and gzip -9 (1.930, by 9%).",
        "It does not yet beat xz -9 (1.590, 10% short).",
        "No overfitting: 1.700 on training text, 1.750 on held-out text. The last 50% of the steps still gained "
        "20.5%: a longer run would go lower.",
    ]
    ends = verdict(config(), [line for line in GOOD if line.get("split") != "val" or line["step"] in (0, 100)])
    assert ends[-1] == "No overfitting: 1.700 on training text, 1.750 on held-out text."  # nothing is known in between
    poor = verdict(config(), [BASELINES, val(0, 4.4), end(0)])
    assert poor[-1].startswith("It does not beat uniform (4.000, 10% short), unigram") and len(poor) == 2


@pytest.mark.parametrize(
    "validation, training, words",
    [
        ([4.0, 1.80, 1.90], 1.2, "Overfitting: the validation was best at step 50 (1.800) and 1.900 at step 100."),
        ([4.0, 2.00, 1.90], 1.2, "It predicts training text 37% better (1.200) than held-out text (1.900)"),
        ([4.0, 1.905, 1.90], 1.85, "No overfitting: 1.850 on training text, 1.900 on held-out text."),
    ],
)
def test_the_verdict_tells_memorising_from_learning(validation: list[float], training: float, words: str) -> None:
    points = [val(step, bits) for step, bits in zip((0, 50, 100), validation, strict=True)]
    recent = [train(95, training - 0.1), train(100, training + 0.1)]
    last = verdict(config(), [*points[:2], train(60, 3.5), *recent, points[2], end(100)])[-1]
    assert last.startswith(words)
    assert "longer run" not in last


def test_one_validation_at_the_end_is_enough_for_a_verdict() -> None:
    sentences = verdict(config(), [BASELINES, train(1, 4.0), train(95, 1.1), train(100, 1.3), val(100, 1.9), end(100)])
    assert sentences[0] == "The model reached 1.900 bits per byte on held-out text, at step 100."
    assert sentences[-1].startswith("It predicts training text 37% better (1.200) than held-out text (1.900)")


def test_a_run_that_got_worse_is_no_overfitting() -> None:
    worse = verdict(config(), [val(0, 4.0), train(40, 5.0), val(50, 3.9), train(100, 1e30), val(100, 1e30), end(100)])
    assert worse[1].startswith(
        "It got worse, on training text too: the validation was best at step 50 (3.900) and 1e30"
    )
    broken = verdict(config(), [*GOOD[:-1], val(101, math.nan), end(101)])
    assert broken[-1] == "At step 101 the validation gave no finite number: the model has broken down."


def test_a_masked_model_is_judged_in_nats_against_the_losses_of_the_baselines() -> None:
    sentences = verdict(config(), SITUATIONS["masked"])
    assert sentences[0].startswith("The model reached 6.000 nats per target on held-out text, at step 10")
    assert sentences[1] == "It beats uniform (8.300, by 28%) and unigram (6.200, by 3%)."


@pytest.mark.parametrize(
    "last, words, command",
    [
        (end(60, "signal"), "A signal stopped it at step 60 of 100", "python train.py --resume 'my run'"),
        (end(60, "early stop"), "Early stopping ended it at step 60 of 100", "minillm generate 'my run' --prompt"),
        (train(60, 2.0), "It has not ended: 60 of 100 steps are recorded.", "python train.py --resume 'my run'"),
        (
            {"event": "nonfinite", "step": 61, "what": "loss", "layer": "decoder.blocks.0", "samples": [1]},
            "Training broke down at step 61: the loss was not a finite number, first in decoder.blocks.0.",
            "minillm doctor 'my run'",
        ),
    ],
)
def test_how_it_ended_decides_the_first_sentence_and_the_next_command(last: dict, words: str, command: str) -> None:
    metrics = [BASELINES, val(0, 4.0), val(50, 2.0), last]
    assert verdict(config(), metrics)[0].startswith(words)
    commands = next_commands(Path("my run"), config(), metrics)
    assert commands[0][0].startswith(command) and len(commands) == 3


def test_next_commands_fit_the_model() -> None:
    commands = [command for command, _ in next_commands(Path("runs/a"), config(), GOOD)]
    assert commands == [
        "minillm generate runs/a --prompt 'def '",
        "python train.py --preset default --minutes 18",
        "minillm plot runs/a",
    ]
    encoder = [command for command, _ in next_commands(Path("runs/a"), config(600, "mlm-tiny", source="a b"), GOOD)]
    assert encoder[:2] == ["minillm doctor runs/a", "python train.py --preset mlm-tiny --data 'a b' --steps 2400"]


def test_next_commands_begin_as_the_run_did() -> None:
    """With all that was given but what they change: where it goes, how long it takes, or its rate."""
    options = ["--out=r", "--preset", "default", "--steps", "100", "--optim.lr", "-1e-3", "--model.no-tied"]
    options += ["--data", "a b", "--overwrite", "--config", "my run.toml", "--profile", "--seed", "3"]
    begun = {**config(100, source="a b"), "options": options}
    longer = next_commands(Path("r"), begun, GOOD)[1][0]
    given = "--preset default --data 'a b' {}--model.no-tied --config 'my run.toml' {}--seed 3"
    assert longer == f"python train.py {given.format('--optim.lr -1e-3 ', '')} --minutes 18"
    broken = {"event": "nonfinite", "step": 61, "what": "loss", "layer": "decoder", "samples": [1]}
    slower = next_commands(Path("r"), begun, [*GOOD[:-1], broken])[1][0]
    assert slower == f"python train.py {given.format('--steps 100 ', '')} --optim.lr 0.0006 --optim.muon-lr 0.006"


def test_nothing_read_once_is_called_memorised() -> None:
    metrics = [
        BASELINES,
        val(0, 4.0),
        *({**train(step, 1.5), "epoch": step / 400} for step in (50, 100)),
        val(100, 2.0),
    ]
    words = " ".join(verdict(config(), metrics))
    assert "The held-out text is harder for it (2.000) than the training text (1.500)." in words
    assert "memorise" not in words
    read_twice = [{**line, "epoch": 2.0} if line.get("split") == "train" else line for line in metrics]
    assert "memorise" in " ".join(verdict(config(), read_twice))

"""`minillm inspect`: what is printed and written, and what is refused."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenizer as tokenizers
from minillm.commands import inspect as command
from minillm.config import ModelConfig
from minillm.inspection.gradients import blocks_alone, gradient_flow, without_additions
from minillm.inspection.page import page, visible
from minillm.inspection.reading import reading
from minillm.loading import Opened
from minillm.model.transformer import Transformer
from tests.finetuning import base, minillm
from tests.training.running import Result

TEXT = 'the quick brown fox jumps over the lazy dog, <0123456789> & "quotes".\n\t\''


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A tiny model with random weights in the place of MODEL; the test may change its shape."""
    monkeypatch.chdir(tmp_path)
    tokenizer: Any = tokenizers.train([TEXT * 3], type="char", vocab_size=64)
    # The template of an imported tokenizer; ours has none.
    tokenizer.wrap = lambda text: [tokenizer.pad_id, *tokenizer.encode(text), tokenizer.end_id, tokenizer.end_id]

    def make(shape: str = "decoder", **config_json: Any) -> Transformer:
        torch.manual_seed(0)
        config = ModelConfig(
            shape=shape, layers=2, heads=2, dim=16, context=32, vocab_size=tokenizer.vocab_size, init_std=0.3
        )
        model = Transformer(config).eval()
        monkeypatch.setattr(
            command, "open_model", lambda path, device: Opened(model, tokenizer, Path(path), config_json)
        )
        return model

    make()
    return make


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> Result:
    return minillm(capsys, "inspect", "some-model", "--device", "cpu", *argv)


class Text(HTMLParser):
    """Every tag of a page, and what a reader sees of it."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.maps: list[list[tuple[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if ("class", "maps") in attrs:
            self.maps.append(attrs)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_is_written_once_and_its_path_printed(capsys, tmp_path: Path) -> None:
    done = run(capsys, "--text", "the quick fox")
    assert (done.code, done.out, done.err) == (0, "inspect.html\n", "")
    before = (tmp_path / "inspect.html").read_text(encoding="utf-8")
    again = run(capsys, "--text", "lazy")
    assert (again.code, again.out) == (2, "")
    assert again.err == "error: inspect.html exists already; --overwrite replaces it, or give another --out\n"
    assert (tmp_path / "inspect.html").read_text(encoding="utf-8") == before
    assert run(capsys, "--text", "lazy", "--overwrite").out == "inspect.html\n"
    assert (tmp_path / "inspect.html").read_text(encoding="utf-8") != before
    assert run(capsys, "--text", "lazy", "--out", "other.html").out == "other.html\n"


def test_the_numbers_are_those_of_the_model(capsys, loaded) -> None:
    model = loaded()
    done = run(capsys, "--text", "the fox", "--json")
    found = json.loads(done.out)
    assert done.code == 0 and not Path("inspect.html").exists()
    assert found["model"] == "some-model" and found["tokens"] == ["<|document|>", *"the fox"]
    with torch.no_grad():
        logits = model(torch.tensor([found["ids"]]))[0, :-1]
    bits = -logits.log_softmax(-1)[torch.arange(7), torch.tensor(found["ids"][1:])] / torch.tensor(2.0).log()
    assert found["bits"] == pytest.approx(bits.tolist(), rel=1e-4)
    assert torch.tensor(found["attention"]["decoder"]).shape == (2, 2, 8, 8)
    assert torch.tensor(found["ablation_bits"]["decoder"]).shape == (2, 2)
    flow = found["gradients"]["decoder"]
    assert {name: len(values) for name, values in flow.items()} == dict.fromkeys(flow, 3) | {"weights": 2}
    read = reading(model, found["ids"][1:], (found["ids"][:1], []), None)
    with blocks_alone(model):
        alone = gradient_flow(model, read)["decoder"]
    with without_additions(model):
        removed = gradient_flow(model, read)["decoder"]
    assert flow["streams_blocks_alone"] == pytest.approx(alone.streams.tolist(), rel=1e-5)
    assert flow["streams_without_additions"] == pytest.approx(removed.streams.tolist(), rel=1e-5)
    assert flow["likeness_without_additions"] == pytest.approx(removed.likeness.tolist(), rel=1e-5)


def test_an_encoder_is_read_too(capsys, loaded) -> None:
    loaded("encoder")
    found = json.loads(run(capsys, "--text", "the fox", "--json").out)
    assert found["shape"] == "encoder" and found["scored"] == [1, 2, 3, 4, 5, 6, 7]
    assert min(found["attention"]["encoder"][0][0][0]) > 0  # the first token reads the last one
    assert run(capsys, "--text", "the fox").code == 0
    assert "each token masked in turn" in Text(Path("inspect.html").read_text(encoding="utf-8")).text


def test_an_imported_encoder_reads_between_its_own_special_tokens(capsys, loaded) -> None:
    loaded("encoder", imported={"start": None})
    found = json.loads(run(capsys, "--text", "the quick brown fox", "--max-tokens", "10", "--json").out)
    assert found["tokens"] == ["<|pad|>", *"the qui", "<|end|>", "<|end|>"]
    assert found["scored"] == list(range(1, 8))


def test_an_encoder_decoder_reads_a_source_and_is_scored_on_a_target(capsys, loaded, tmp_path: Path) -> None:
    model = loaded("encoder-decoder")
    argv = ["--text", "the quick fox", "--target", "lazy dog"]
    found = json.loads(run(capsys, *argv, "--json").out)
    assert found["tokens"] == ["<|document|>", *"lazy dog"] and found["scored"] == list(range(1, 9))
    assert found["source"]["tokens"] == list("the quick fox") and found["mean_bits"] > 0
    with torch.no_grad():
        source = torch.tensor([found["source"]["ids"]])
        logits = model(torch.tensor([found["ids"]]), source=source)[0, :-1]
    nats = -logits.log_softmax(-1)[torch.arange(8), torch.tensor(found["ids"][1:])]
    assert found["bits"] == pytest.approx((nats / torch.tensor(2.0).log()).tolist(), rel=1e-4)
    assert set(found["attention"]) == set(found["ablation_bits"]) == {"encoder", "decoder", "cross"}
    assert torch.tensor(found["attention"]["cross"]).shape == (2, 2, 9, 13)
    assert list(found["gradients"]) == ["encoder", "decoder"]

    assert run(capsys, *argv).code == 0
    shown = Text(Path("inspect.html").read_text(encoding="utf-8"))
    assert "Across: the text reads the source" in shown.text and "each next token" in shown.text
    axes = [(json.loads(dict(tag)["data-queries"]), json.loads(dict(tag)["data-keys"])) for tag in shown.maps]
    text, source_tokens = [visible(t) for t in found["tokens"]], [visible(t) for t in found["source"]["tokens"]]
    assert axes == [(source_tokens, source_tokens), (text, text), (text, source_tokens)]

    (tmp_path / "pair.jsonl").write_text('{"source": "the quick fox", "target": "lazy dog"}\n')
    assert json.loads(run(capsys, "--input", "pair.jsonl", "--json").out) == found
    cut = run(capsys, *argv, "--max-tokens", "5", "--json")
    assert cut.err == (
        "note: --max-tokens leaves room for the first 5 of the source's 13 tokens\n"
        "note: --max-tokens leaves room for the first 4 of the target's 8 tokens\n"
    )
    counts = json.loads(cut.out)
    assert (counts["read_tokens"], counts["text_tokens"]) == (4, 8)
    assert (counts["source"]["read_tokens"], counts["source"]["text_tokens"]) == (5, 13)


def test_a_finetuned_encoder_decoder_reads_between_the_tokens_it_learnt_with(capsys, loaded) -> None:
    loaded("encoder-decoder", task={"name": "seq2seq", "start": [3, 2], "frame": [[2], [3]], "head": None})
    found = json.loads(run(capsys, "--text", "the fox", "--target", "lazy", "--json").out)
    assert found["ids"][:2] == [3, 2] and found["scored"] == [2, 3, 4, 5]
    assert found["source"]["ids"][0] == 2 and found["source"]["ids"][-1] == 3
    assert found["source"]["tokens"][1:-1] == list("the fox")


def test_tokens_cannot_become_markup(capsys) -> None:
    """Neither those of the text nor the name of the model; and nothing but the page's own script may run."""
    found = json.loads(run(capsys, "--text", "the fox", "--json").out)
    harm = "</div><script>alert('x')</script>\"'&amp;<img src=x onerror=alert(1)>"
    harmless = Text(page("model", found))
    found["tokens"][2] = harm
    found["lens"][1]["tokens"][3] = harm
    harmed_source = page(harm, found)
    harmed = Text(harmed_source)
    assert harmed.tags == harmless.tags and "img" not in harmed.tags and harmed.tags.count("script") == 1
    assert not any(name.startswith("on") for name, _ in harmed.attributes)
    # title, heading, the text, the lens's cell and two of its columns
    assert harmed.text.count(visible(harm)) + harmed.text.count(harm) >= 5
    assert json.loads(dict(harmed.attributes)["data-keys"] or "")[2] == visible(harm)
    policy = next(value for value in map(lambda pair: pair[1] or "", harmed.attributes) if "default-src" in value)
    script = re.findall(r"<script>(.*?)</script>", harmed_source, re.DOTALL)[-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}';" in policy
    assert not re.search(r"https?://|url\(|@import", harmed_source)


def test_the_page_shows_the_numbers(capsys) -> None:
    found = json.loads(run(capsys, "--text", "the fox", "--json").out)
    shown = Text(page("model", found))
    attributes = dict(shown.attributes)
    assert f"{found['mean_bits']:.3f} bits a token" in shown.text
    for layer in found["ablation_bits"]["decoder"]:
        assert all(f"{change:+.3f}" in shown.text for change in layer)
    flow = found["gradients"]["decoder"]
    for name in ("streams", "weights", "streams_blocks_alone", "streams_without_additions"):
        assert all(f"{norm:.2e}" in shown.text for norm in flow[name])
    ends = flow["likeness"][-1], flow["likeness_without_additions"][-1]
    assert "a cosine of {:.2f}; with nothing added, of {:.2f}.".format(*ends) in shown.text
    assert all(f"{depth['mean_bits']:.2f}" in shown.text for depth in found["lens"])
    for depth in found["lens"]:
        depth["ids"], depth["tokens"] = [0] * 7, ["x"] * 7
    assert Text(page("model", found)).tags.count("b") == 0
    found["lens"][1]["ids"][2:4] = found["ids"][3:5]  # two that are right, and one of the same name that is another
    found["lens"][2]["tokens"][0] = found["tokens"][1]
    assert Text(page("model", found)).tags.count("b") == 2
    weights = torch.tensor(list(base64.b64decode(attributes["data-weights"] or ""))) / 255
    torch.testing.assert_close(
        weights.view(2, 2, 8, 8), torch.tensor(found["attention"]["decoder"]), rtol=0, atol=0.5 / 255 + 1e-6
    )


@pytest.mark.parametrize(
    ("token", "shown"), [(" a\n", "␣a↵"), ("\t", "⇥"), ("\0", "\\x00"), ("\u202e", "\\u202e"), ("é☃", "é☃")]
)
def test_what_cannot_be_seen_is_spelled(token: str, shown: str) -> None:
    assert visible(token) == shown


def test_what_is_cut_is_said(capsys) -> None:
    long = "the quick brown fox jumps over the lazy dog"
    done = run(capsys, "--text", long, "--max-tokens", "6")
    assert (done.code, done.err) == (0, "note: --max-tokens leaves room for the first 5 of the text's 43 tokens\n")
    assert "Only the first 5 of the text's 43 tokens were read" in Path("inspect.html").read_text(encoding="utf-8")
    done = run(capsys, "--text", long, "--json")
    assert (done.code, done.err) == (0, "note: the context leaves room for the first 31 of the text's 43 tokens\n")
    assert json.loads(done.out)["tokens"] == ["<|document|>", *long[:31]]


def test_a_head_of_a_task_is_not_what_is_read(capsys, loaded) -> None:
    loaded(task={"name": "classify", "head": {"outputs": 2}})
    assert run(capsys, "--text", "the fox", "--json").err.startswith("note: the losses are those of the language head")
    loaded(task={"name": "lm", "head": None})
    assert run(capsys, "--text", "the fox", "--json").err == ""


def test_the_first_text_of_a_file(capsys, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n  \nthe fox\nlazy\n")
    (tmp_path / "b.jsonl").write_text('{"text": "the fox"}\n{"text": "lazy"}\n')
    for name in ("a.txt", "b.jsonl"):
        assert json.loads(run(capsys, "--input", name, "--json").out)["tokens"][1:] == list("the fox")


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "either --text TEXT (and --target TEXT) or --input FILE"),
        (["--text", "a", "--input", "a.txt"], "either --text TEXT (and --target TEXT) or --input FILE"),
        (["--text", " "], "--text is empty"),
        (["--text", "☃"], "the text cannot be encoded: character '☃'"),
        (["--text", "the", "--max-tokens", "1"], "needs 2 or more"),
        (["--text", "the", "--out", "no/where.html"], "there is no folder no"),
        (["--text", "the", "--out", "."], "is a folder"),
        (["--text", "the", "--json", "--out", "a.html"], "--json writes no page"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, argv: list[str], problem: str) -> None:
    done = run(capsys, *argv)
    assert (done.code, done.out) == (2, "")
    assert problem in done.err and done.err.count("\n") == 1
    assert not list(Path().iterdir())


def test_a_pair_is_for_an_encoder_decoder_and_needs_both(capsys, loaded, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the fox"}\n')
    (tmp_path / "empty.jsonl").write_text('{"source": "the fox", "target": " "}\n')
    asked = (
        ("encoder-decoder", ["--text", "the fox"], "is scored on --target; give both"),
        ("encoder-decoder", ["--input", "a.jsonl"], "a.jsonl:1: has no 'target' and no 'source', only 'text'"),
        ("encoder-decoder", ["--input", "empty.jsonl"], "empty.jsonl is empty"),
        ("encoder-decoder", ["--text", "the", "--target", "☃"], "the target cannot be encoded"),
        ("decoder", ["--text", "the fox", "--target", "lazy"], "--target is for an encoder-decoder"),
        ("decoder", ["--input", "a.jsonl", "--target", "lazy"], "either --text TEXT (and --target TEXT)"),
        ("decoder", ["--text", "the fox", "--target", " "], "--target is empty"),
    )
    for shape, argv, problem in asked:
        loaded(shape)
        done = run(capsys, *argv)
        assert done.code == 2 and problem in done.err and done.err.count("\n") == 1, done.err
    assert not Path("inspect.html").exists()


def test_a_run_folder_is_opened(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    run_folder = base(tmp_path / "run")
    done = minillm(capsys, "inspect", run_folder, "--text", "the fox is over ☃", "--json")
    found = json.loads(done.out)
    assert done.code == 0 and "".join(found["tokens"][1:]).startswith("the fox is over ")
    assert found["tokens"][-3:] == ["<0xE2>", "<0x98>", "<0x83>"]  # the snowman's bytes, each a token


def test_tokens_of_an_imported_tokenizer_keep_their_spaces() -> None:
    class Metaspace:
        """As SentencePiece's in Transformers: the space before a text's first word is not decoded."""

        vocab_size, pieces = 3, ["<s>", "▁the", "fox"]

        def decode(self, ids: list[int]) -> str:
            return "".join(("", " the", "fox")[i] for i in ids).removeprefix(" ")

    assert [command.name_of(Metaspace(), i) for i in range(4)] == ["<s>", " the", "fox", "<|row 3|>"]

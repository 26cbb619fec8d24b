"""predict, evaluate, embed and chat: what comes out, line by line."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minillm.config import ModelConfig, UserError
from minillm.data.records import Record
from minillm.inference.beam import beam_search
from minillm.inference.generate import generate
from minillm.inference.sampling import Sampling
from minillm.inference.stream import stop_and_banned
from minillm.loading import load
from minillm.tasks.catalogue import TASKS
from minillm.tasks.task import Means
from tests.data.task_tokenizer import PieceTokenizer
from tests.finetuning import FAST, base, lines, minillm, records
from tokenizer.chat import encode_chat

TEXTS = ["the fox is over hills", "☃ rain", "the trees"]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("commands") / "decoder")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("commands") / "encoder", "encoder")


def tuned(model: Path, task: str, folder: Path, capsys: pytest.CaptureFixture[str], steps: int = 60) -> Path:
    data = lines(folder / "data.jsonl", records(task))
    argv = ["--task", task, "--data", data, "--out", folder / "run", "--steps", steps, *FAST]
    done = minillm(capsys, "finetune", model, *argv)
    assert done.code == 0, done.err
    return folder / "run"


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_predict_tags_words(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tuned(encoder, "tag", tmp_path, capsys)
    (tmp_path / "input.txt").write_text("the fox is over\n\nthe rain is\n")
    found = rows(minillm(capsys, "predict", run, "--input", tmp_path / "input.txt").out)
    assert [answer["tokens"] for answer in found] == [["the", "fox", "is", "over"], ["the", "rain", "is"]]
    assert found[0]["entities"][0] == {"type": "RED", "start": 1, "end": 2, "text": "fox"}


def test_what_tagger_and_answerer_did_not_read_is_said(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both read a long text in parts and lose nothing of it; of a word or a question that fills a part they do."""
    _, tokenizer = load(encoder)
    word, question = "trees" * 30, "is the fox over the hills " * 9 + "?"
    (tmp_path / "tag").mkdir()
    run = tuned(encoder, "tag", tmp_path / "tag", capsys, steps=1)
    (tmp_path / "input.txt").write_text("the fox is over\n" + "the fox is " * 30 + f"\nthe {word} is\n")
    done = minillm(capsys, "predict", run, "--input", tmp_path / "input.txt")
    short, long, cut = rows(done.out)
    assert len(long["tokens"]) == len(long["tags"]) == 90 and len(cut["tags"]) == 3
    lost = len(tokenizer.encode(f" {word}")) - (48 - 2)
    assert lost > 0 and [answer.get("unread_tokens") for answer in (short, long, cut)] == [None, None, lost]
    assert "untagged" not in cut and "note: 1 of 3 inputs do not fit the context of 48 tokens" in done.err
    data = lines(tmp_path / "tags.jsonl", [{"tokens": ["the", word], "tags": ["O", "O"]}])
    assert "1 examples are cut" in minillm(capsys, "evaluate", run, "--data", data).err

    (tmp_path / "span-qa").mkdir()
    run = tuned(encoder, "span-qa", tmp_path / "span-qa", capsys, steps=1)
    texts = [("what is it ?", "the fox"), ("what is it ?", "the fox is " * 30), (question, "the fox")]
    ask = lines(tmp_path / "ask.jsonl", [{"question": asked, "context": text} for asked, text in texts])
    done = minillm(capsys, "predict", run, "--input", ask)
    lost = len(tokenizer.encode(question)) - (48 - 3) // 2
    assert lost > 0 and [answer.get("unread_tokens") for answer in rows(done.out)] == [None, None, lost]
    assert "note: 1 of 3 inputs do not fit the context of 48 tokens" in done.err


def test_predict_gives_probabilities_for_lines_of_text(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tuned(encoder, "classify", tmp_path, capsys)
    (tmp_path / "input.txt").write_text("the fox is over\nthe rain is over\n")
    found = rows(minillm(capsys, "predict", run, "--input", tmp_path / "input.txt").out)
    assert [answer["label"] for answer in found] == ["red", "blue"]
    for answer in found:
        assert sum(answer["scores"].values()) == pytest.approx(1) and max(answer["scores"].values()) > 0.5
        assert max(answer["scores"], key=answer["scores"].get) == answer["label"]


def test_replies_are_those_of_greedy_generation(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """predict, and chat through a pipe, against the template and the generator themselves."""
    run = tuned(decoder, "chat", tmp_path, capsys, steps=20)
    model, tokenizer = load(run)
    stops, banned = stop_and_banned(tokenizer, model.config)

    def said(messages: list[dict[str, str]], tokens: int) -> str:
        prompt, _ = encode_chat(tokenizer, messages, reply=True)
        options = {"sampling": Sampling(temperature=0.0), "stop_ids": stops, "banned_ids": banned}
        return tokenizer.decode(generate(model, [prompt], max_new_tokens=tokens, **options)[0])

    ask = lines(
        tmp_path / "ask.jsonl", [{"instruction": "the fox"}, {"messages": [{"role": "user", "content": "rain"}]}]
    )
    found = rows(minillm(capsys, "predict", run, "--input", ask, "--max-new-tokens", 9).out)
    wanted = [said([{"role": "user", "content": text}], 9) for text in ("the fox", "rain")]
    assert [answer["reply"] for answer in found] == wanted

    monkeypatch.setattr("sys.stdin", io.StringIO("the fox\nrain\n"))
    talk = minillm(capsys, "chat", run, "--temperature", 0, "--top-p", 1, "--max-new-tokens", 5)
    first = said([{"role": "user", "content": "the fox"}], 5)
    turns = [("user", "the fox"), ("assistant", first), ("user", "rain")]
    second = said([{"role": role, "content": text} for role, text in turns], 5)
    assert talk.code == 0 and talk.out == f"{first}\n{second}\n"


def test_a_beam_search_writes_what_is_predicted_and_what_is_scored(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tuned(decoder, "seq2seq", tmp_path, capsys, steps=2)
    model, tokenizer = load(run)
    stops, banned = stop_and_banned(tokenizer, model.config)
    asked = ["the fox is over", "rain"]
    prompts = [[tokenizer.document_id, *tokenizer.encode(text), tokenizer.end_id] for text in asked]
    found = beam_search(model, prompts, beams=3, max_new_tokens=7, stop_ids=stops, banned_ids=banned)
    wanted = [tokenizer.decode(ids) for ids in found]
    ask = lines(tmp_path / "ask.jsonl", [{"source": text} for text in asked])
    argv = ["--input", ask, "--max-new-tokens", 7]
    assert [row["target"] for row in rows(minillm(capsys, "predict", run, *argv, "--beams", 3).out)] == wanted
    assert [row["target"] for row in rows(minillm(capsys, "predict", run, *argv).out)] != wanted

    data = lines(tmp_path / "pairs.jsonl", [{"source": text, "target": "red fox"} for text in asked])

    def searched(model: Any, prompts: list[list[int]], *, beams: int, **_: Any) -> list[list[int]]:
        return [tokenizer.encode("red fox" if beams == 3 else "rain")] * len(prompts)

    monkeypatch.setattr("minillm.tasks.writing.beam_search", searched)
    scores = [
        json.loads(minillm(capsys, "evaluate", run, "--data", data, "--json", *more).out)["rouge_l"]
        for more in ([], ["--beams", 2], ["--beams", 3])
    ]
    assert scores[0] < 1 and scores[1:] == [0.0, 1.0]


def test_a_preferences_prompts_are_answered(decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the training file has them, with or without what is preferred; a text, and messages."""
    said = [{"role": "user", "content": "the fox"}]
    asked = [{"prompt": "the fox", "chosen": "rain", "rejected": "hills"}, {"prompt": said}, {"instruction": "the fox"}]
    for task in ("preference", "chat"):
        argv = ["--task", task, "--input", lines(tmp_path / "ask.jsonl", asked), "--max-new-tokens", 3]
        found = rows(minillm(capsys, "predict", decoder, *argv).out)
        assert [answer["messages"] for answer in found] == [said] * 3
        assert len({answer["reply"] for answer in found}) == 1 and found[0]["reply"]


@pytest.mark.parametrize("task, key", [("lm", "text"), ("chat", "instruction"), ("seq2seq", "source")])
def test_an_input_beyond_the_context_is_answered_and_says_so(
    task: str, key: str, decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, tokenizer = load(decoder)
    long = "the quick fox " * 40
    ask = lines(tmp_path / "ask.jsonl", [{key: "the fox"}, {key: long}])
    done = minillm(capsys, "predict", decoder, "--task", task, "--input", ask, "--max-new-tokens", 2)
    short, cut = rows(done.out)
    assert "unread_tokens" not in short
    # A chat and a text go on from the last half of the context, 25 to 48 tokens; a pair keeps half for its target.
    text, frame = (
        len(tokenizer.encode(long.strip() if task == "chat" else long)),
        {"lm": 1, "chat": 4, "seq2seq": 0}[task],
    )
    read = text + frame - cut["unread_tokens"]
    assert 24 < read <= 48 if task != "seq2seq" else read == 48 + 1 - 2 - 24
    assert "note: 1 of 2 inputs do not fit the context of 48 tokens" in done.err


def test_a_text_beyond_the_context_gets_its_label_and_vector_and_says_so(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, tokenizer = load(encoder)
    long = "the quick fox " * 40
    lost = len(tokenizer.encode(long)) + 2 - 48
    (tmp_path / "ask.TXT").write_text(f"the fox\n\n{long}\n")  # an empty line is no input, whatever the case of .txt
    for task in ("classify", "regress"):
        (tmp_path / task).mkdir()
        run = tuned(encoder, task, tmp_path / task, capsys, steps=1)
        done = minillm(capsys, "predict", run, "--input", tmp_path / "ask.TXT")
        assert [answer.get("unread_tokens") for answer in rows(done.out)] == [None, lost]
        assert "note: 1 of 2 inputs do not fit the context of 48 tokens" in done.err
    done = minillm(capsys, "embed", encoder, "--input", tmp_path / "ask.TXT")
    assert [row["text"] for row in rows(done.out)] == ["the fox", long]
    assert done.err == "note: the context of 48 tokens cuts the end of 1 of 2 texts\n"
    one = lines(tmp_path / "one.jsonl", [{"text": "the fox", "label": 2.0}])
    found = json.loads(minillm(capsys, "evaluate", run, "--data", one, "--json").out)
    (answer,) = rows(minillm(capsys, "predict", run, "--input", one).out)
    assert found["mae"] == found["rmse"] == pytest.approx(abs(answer["label"] - 2.0)) and found["pearson"] is None


def test_a_prompt_that_cannot_be_encoded_is_named_with_its_line() -> None:
    task = TASKS["lm"]()
    asked = task.examples([Record("f.txt:1", {"text": "aaa"}), Record("f.txt:2", {"text": "☃"})], labelled=False)
    means = Means(PieceTokenizer(), ModelConfig(vocab_size=9), encode_chat)
    with pytest.raises(UserError, match=r"f\.txt:2: the snowman is not in the vocabulary"):
        list(task.answers(torch.nn.Identity(), asked, means))


def test_what_stays_in_a_model_beside_its_weights_is_not_finetuned_again(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = lines(tmp_path / "data.jsonl", records("chat"))
    argv = ["--task", "chat", "--data", data, "--steps", 1, *FAST]
    assert minillm(capsys, "finetune", decoder, *argv, "--method", "prefix", "--out", tmp_path / "run").code == 0
    done = minillm(capsys, "finetune", tmp_path / "run", *argv, "--out", tmp_path / "again")
    assert done.code == 2 and not (tmp_path / "again").exists()
    assert f"method=prefix, which stays in it beside its weights; finetune {decoder}, or what full" in done.err


def test_a_long_conversation_forgets_its_oldest_turns(
    decoder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the fox\n" * 6))
    talk = minillm(capsys, "chat", decoder, "--max-new-tokens", 4, "--system", "be quick")
    assert talk.code == 0 and talk.out.count("\n") >= 6
    monkeypatch.setattr("sys.stdin", io.StringIO("jumps over the lazy dog " * 20))
    talk = minillm(capsys, "chat", decoder)
    assert talk.code == 2 and "error: this turn has" in talk.err
    assert "the model's context 48: say it in fewer words" in talk.err
    talk = minillm(capsys, "chat", decoder, "--system", "jumps over the lazy dog " * 20)
    assert talk.code == 2 and "error: the system message and this turn have" in talk.err


@pytest.mark.parametrize("pool", ["mean", "cls", "last"])
def test_embed_pools_the_states_of_each_text_alone(
    pool: str, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "input.txt").write_text("\n".join(TEXTS))
    argv = ["--input", tmp_path / "input.txt", "--pool", pool]
    found = rows(minillm(capsys, "embed", encoder, *argv).out)
    unit = rows(minillm(capsys, "embed", encoder, *argv, "--normalize").out)
    model, tokenizer = load(encoder)
    for text, plain, normal in zip(TEXTS, found, unit, strict=True):
        ids = [tokenizer.document_id, *tokenizer.encode(text), tokenizer.end_id]
        with torch.no_grad():
            states = model.states(torch.tensor([ids]))[0]  # [T, dim], without padding
        wanted = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pool].numpy()
        assert plain["text"] == text
        np.testing.assert_allclose(plain["embedding"], wanted, atol=1e-5)
        np.testing.assert_allclose(normal["embedding"], wanted / np.linalg.norm(wanted), atol=1e-5)


def test_a_plain_decoder_is_scored_as_a_language_model(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "the quick fox jumps over hills\n" * 9
    (tmp_path / "text.txt").write_text(text)
    found = json.loads(
        minillm(capsys, "evaluate", decoder, "--task", "lm", "--data", tmp_path / "text.txt", "--json").out
    )
    model, tokenizer = load(decoder)
    ids = torch.tensor([tokenizer.document_id, *tokenizer.encode(text)])
    total, targets = 0.0, 0
    with torch.no_grad():
        for first in range(0, len(ids) - 1, 48):
            part = ids[first : first + 49]
            total += torch.nn.functional.cross_entropy(model(part[None, :-1])[0], part[1:], reduction="sum").item()
            targets += len(part) - 1
    assert found["loss"] == pytest.approx(total / targets, rel=1e-4)
    assert found["perplexity"] == pytest.approx(np.exp(total / targets), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(total / np.log(2) / len(text), rel=1e-4)


@pytest.mark.parametrize(
    "name, argv, words",
    [
        ("evaluate", ["--task", "tag", "--data", "x.jsonl"], "no head for tag; finetune it first"),
        ("evaluate", ["--data", "x.jsonl"], "name one with --task"),
        ("predict", ["--task", "chat", "--input", "x.jsonl"], "x.jsonl does not exist"),
        ("predict", ["--task", "chat", "--input", "x.jsonl", "--beams", "2", "--temperature", "1"], "nothing is drawn"),
        ("evaluate", ["--task", "chat", "--data", "x.jsonl", "--beams", "2"], "--beams is for --task seq2seq"),
        ("predict", ["--task", "lm", "--input", "{wrong}"], "has no 'text', only 'foo'"),
        ("predict", ["--task", "chat", "--input", "{wrong}"], "has neither 'messages' nor 'instruction'"),
        ("predict", ["--task", "preference", "--input", "{prompts}"], "message 0 has no 'content'; give both"),
        ("embed", ["--input", "x.jsonl"], "x.jsonl does not exist"),
        ("embed", ["--input", "."], ". is a folder; give a data file"),
    ],
)
def test_what_a_model_cannot_do_is_said_in_one_line(
    name: str, argv: list[str], words: str, decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"wrong": [{"foo": 1}], "prompts": [{"prompt": [{"role": "user"}]}]}
    files = {name: lines(tmp_path / f"{name}.jsonl", made) for name, made in names.items()}
    done = minillm(capsys, name, decoder, *(word.format(**files) for word in argv))
    assert done.code == 2 and words in done.err and done.err.startswith("error: ") and done.err.count("\n") == 1


def test_an_encoder_does_not_chat(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = minillm(capsys, "chat", encoder)
    assert done.code == 2 and "does not write replies" in done.err
    done = minillm(capsys, "evaluate", encoder, "--data", "x.jsonl")
    assert done.code == 2 and "name one with --task: lm; or finetune it for one" in done.err
    done = minillm(capsys, "predict", encoder, "--input", "x.jsonl")  # where lm would not do: it writes
    assert done.code == 2 and "finetuned for no task; do so first" in done.err

"""`minillm generate`: what is printed where, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

import tokenizer as tokenizers
from minillm.commands import generate as command
from minillm.config import ModelConfig, UserError
from minillm.inference.beam import beam_search
from minillm.inference.generate import generate
from minillm.inference.sampling import Sampling
from minillm.inference.stream import stop_and_banned
from minillm.loading import Opened
from minillm.model.transformer import Transformer
from minillm.peft.config import MethodConfig
from minillm.peft.inject import inject

TEXT = "the quick brown fox jumps over the lazy dog, 0123456789.\n" * 3


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch):
    """A tiny model with random weights in the place of MODEL; shape and config.json can be changed by the test."""
    tokenizer = tokenizers.train([TEXT], type="char", vocab_size=64)

    def make(shape: str = "decoder", config_json: dict | None = None) -> Transformer:
        torch.manual_seed(0)
        config = ModelConfig(
            shape=shape, layers=2, heads=2, dim=32, context=32, vocab_size=tokenizer.vocab_size, init_std=0.3
        )
        model = Transformer(config)
        monkeypatch.setattr(command, "open_model", lambda path: Opened(model, tokenizer, Path(path), config_json or {}))
        return model

    make()
    return make


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[str, str]:
    assert command.main(["some-model", *argv, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def objects(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_the_text_goes_to_stdout_and_the_speed_to_stderr(capsys) -> None:
    out, err = run(capsys, "--prompt", "the", "--max-new-tokens", "10", "--temperature", "0")
    assert out.startswith("the") and out.endswith("\n")
    assert err.startswith("10 tokens in ") and err.endswith("tokens/s (cpu, fp32, KV cache)\n")
    result = objects(run(capsys, "--prompt", "the", "--max-new-tokens", "10", "--temperature", "0", "--json")[0])
    assert result == [{"prompt": "the", "text": out.removeprefix("the")[:-1], "tokens": 10, "ended": "length"}]


def test_a_seed_gives_a_text_whatever_the_batch_and_the_cache(capsys, monkeypatch) -> None:
    argv = ["--prompt", "the", "--prompt", "lazy dog", "--num", "2", "--max-new-tokens", "12", "--seed", "7", "--json"]
    texts = objects(run(capsys, *argv)[0])
    assert [text["prompt"] for text in texts] == ["the", "the", "lazy dog", "lazy dog"]
    assert len({text["text"] for text in texts}) == 4
    assert objects(run(capsys, *argv, "--batch", "3")[0]) == texts
    with monkeypatch.context() as patch:
        patch.setattr("minillm.inference.reader.KVCache", None)
        assert objects(run(capsys, *argv, "--no-cache")[0]) == texts
    assert objects(run(capsys, *argv, "--seed", "8")[0]) != texts
    plain = run(capsys, *[argument for argument in argv if argument != "--json"])[0]
    assert plain.startswith(f"--- prompt 1, text 1 ---\nthe{texts[0]['text']}\n--- prompt 1, text 2 ---\n")


def test_a_stop_string_ends_the_text_before_it(capsys) -> None:
    argv = ["--prompt", "the", "--temperature", "0", "--max-new-tokens", "20", "--json"]
    full = objects(run(capsys, *argv)[0])[0]["text"]
    stop = full[4:7]
    (cut,) = objects(run(capsys, *argv, "--stop", "\x00", "--stop", stop)[0])
    assert cut["text"] == full[: full.index(stop)] and cut["ended"] == "stop" and cut["tokens"] < 20


@pytest.mark.parametrize("shape", ["decoder", "encoder-decoder"])
def test_a_beam_search_is_the_librarys(capsys, loaded, shape: str) -> None:
    model = loaded(shape)
    tokenizer = command.open_model("").tokenizer
    stops, banned = stop_and_banned(tokenizer, model.config)
    read = [[tokenizer.document_id, *tokenizer.encode(text)] for text in ("the", "lazy dog")]
    options = {"sources": None if shape == "decoder" else [ids[1:] for ids in read]}
    wanted = beam_search(
        model, read if shape == "decoder" else [ids[:1] for ids in read], beams=3, max_new_tokens=12,
        length_penalty=0.5, stop_ids=stops, banned_ids=banned, **options,
    )  # fmt: skip
    argv = ["--prompt", "the", "--prompt", "lazy dog", "--beams", "3", "--length-penalty", "0.5", "--json"]
    texts = objects(run(capsys, *argv, "--max-new-tokens", "12", "--batch", "4")[0])  # one prompt at a time
    assert [text["text"] for text in texts] == [tokenizer.decode(ids) for ids in wanted]
    if shape == "encoder-decoder":
        return  # its text is too short to be cut
    stop = texts[0]["text"][3:6]
    cut = objects(run(capsys, *argv, "--max-new-tokens", "12", "--stop", stop)[0])[0]
    assert cut["text"] == texts[0]["text"][:3] and cut["ended"] == "stop"


def test_prompts_come_from_a_file(capsys, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("the fox\n\nlazy\r\n", encoding="utf-8")
    argv = ["--max-new-tokens", "3", "--json"]
    texts = objects(run(capsys, "--input", str(lines), *argv)[0])
    assert [text["prompt"] for text in texts] == ["the fox", "lazy"]
    values = tmp_path / "prompts.jsonl"
    values.write_text('{"prompt": "the fox"}\n{"text": "lazy", "label": 3}\n', encoding="utf-8")
    assert objects(run(capsys, "--input", str(values), *argv)[0]) == texts


def test_one_prompt_streams_to_a_terminal(capsys, monkeypatch) -> None:
    argv = ["--prompt", "the", "--max-new-tokens", "9"]
    whole = run(capsys, *argv)[0]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    pieces: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *values, end="\n", **_: pieces.append(" ".join(values) + end))
    command.main(["some-model", *argv, "--device", "cpu"])
    assert "".join(pieces[:-1]) == whole
    assert len(pieces) == 1 + 9 + 2  # the prompt, each token, the end of the line and the speed


def test_an_encoder_decoder_reads_the_prompt_as_its_source(capsys, loaded) -> None:
    loaded("encoder-decoder")
    one, other = (
        run(capsys, "--prompt", text, "--max-new-tokens", "8", "--temperature", "0")[0]
        for text in ("the quick", "lazy")
    )
    assert one != other
    assert not one.startswith("the quick"), "its text is an answer, no continuation"


def test_what_was_finetuned_on_rows_reads_rows(capsys, loaded) -> None:
    """Of `seq2seq` the source stands between the tokens of its rows; a longer one is cut inside them."""
    model = loaded("encoder-decoder", {"task": {"name": "seq2seq"}})
    tokenizer = command.open_model("").tokenizer
    begin, end = tokenizer.document_id, tokenizer.end_id
    stops, banned = stop_and_banned(tokenizer, model.config)
    for text, ids in (("the quick", tokenizer.encode("the quick")), ("fox " * 9, tokenizer.encode("fox " * 9)[:30])):
        (wanted,) = generate(
            model, [[begin]], sources=[[begin, *ids, end]], max_new_tokens=9, sampling=Sampling(temperature=0.0),
            stop_ids=stops, banned_ids=banned,
        )  # fmt: skip
        out, err = run(capsys, "--prompt", text, "--max-new-tokens", "9", "--temperature", "0")
        assert out == tokenizer.decode(wanted) + "\n"
        assert ("a prompt has 38 tokens, the model's context 32" in err) == (len(ids) == 30)


def test_a_prompt_beyond_the_context_is_announced(capsys, loaded) -> None:
    assert (
        "a prompt has 33 tokens, the model's context 32"
        in run(capsys, "--prompt", "x" * 32, "--max-new-tokens", "1")[1]
    )
    assert "warning" not in run(capsys, "--prompt", "x" * 31, "--max-new-tokens", "1")[1]
    inject(loaded(), MethodConfig(method="prompt", length=4))
    told = run(capsys, "--prompt", "x" * 31, "--max-new-tokens", "1")[1]
    assert "a prompt has 32 tokens, the model's context 28" in told


def test_a_source_beyond_the_context_is_cut_and_announced(capsys, loaded) -> None:
    loaded("encoder-decoder")
    argv = ["--max-new-tokens", "8", "--temperature", "0"]
    (cut, warned), (whole, quiet) = (run(capsys, "--prompt", text, *argv) for text in ("fox " * 9, "fox " * 8))
    assert cut == whole and "a prompt has 36 tokens, the model's context 32: only its beginning is read" in warned
    assert "warning" not in quiet


def test_bad_input_is_refused_in_one_line(capsys, tmp_path: Path, loaded) -> None:
    empty, latin, broken, keyless = (tmp_path / name for name in ("a.txt", "b.txt", "c.jsonl", "d.jsonl"))
    empty.write_text("\n\n")
    latin.write_bytes("the café".encode("latin-1"))
    broken.write_text('{"text": "the"}\n{"text"\n')
    keyless.write_text('{"prompts": "the"}\n')
    for argv, message in [
        ([], "either --prompt TEXT"),
        (["--prompt", "the", "--input", str(empty)], "either --prompt TEXT"),
        (["--prompt", "the", "--temperature", "-1"], "temperature must be 0 .greedy. or a positive number, not -1.0"),
        (["--prompt", "the", "--top-k", "0"], "top_k must be at least 1, not 0"),
        (["--prompt", "the", "--num", "0"], "--num must be at least 1, not 0"),
        (["--prompt", "the", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, not 0"),
        (["--prompt", "the", "--stop", ""], "a stop string must not be empty"),
        (["--prompt", "the", "--beams", "0"], "--beams must be at least 1, not 0"),
        (["--prompt", "the", "--beams", "2", "--top-p", "0.9"], "--beams looks for the one likeliest text, --top-p"),
        (["--prompt", "the", "--beams", "2", "--temperature", "1"], "likeliest text, --temperature"),
        (["--prompt", "the", "--length-penalty", "2"], "give --beams too"),
        (["--prompt", "über"], "the prompt 'über' cannot be encoded: character 'ü'"),
        (["--input", str(empty)], "a.txt is empty"),
        (["--input", str(latin)], "b.txt is not UTF-8 at byte 7"),
        (["--input", str(broken)], "c.jsonl:2 is not JSON"),
        (["--input", str(keyless)], "d.jsonl:1 has no text under"),
    ]:
        with pytest.raises(UserError, match=message) as raised:
            run(capsys, *argv)
        assert "\n" not in str(raised.value)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: this machine has none"):
            command.main(["some-model", "--prompt", "the", "--device", "cuda"])
    loaded("encoder")
    with pytest.raises(UserError, match="an encoder: it cannot generate"):
        run(capsys, "--prompt", "the")

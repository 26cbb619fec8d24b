"""`minillm chat` at a terminal and through a pipe: what one line, one interruption, one wrong byte does."""

import io
from pathlib import Path
from typing import Any

import pytest

from minillm.commands import chat
from minillm.inference.generate import generate
from minillm.loading import load
from tests.finetuning import base, minillm
from tokenizer.chat import encode_chat


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("chat") / "decoder")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_ctrl_c_cuts_a_reply_and_a_turn_that_is_too_long_is_said_again(
    decoder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither loses the conversation: the next prompt has what was said of the reply, and nothing of the long turn."""
    prompts: list[list[int]] = []

    def interrupted(model: Any, asked: list[list[int]], *, on_token: Any, **options: Any) -> None:
        heard: list[int] = []

        def listen(row: int, token: int) -> None:
            on_token(row, token)
            heard.append(token)
            if len(heard) == 3 and len(prompts) == 1:
                raise KeyboardInterrupt

        prompts.extend(asked)
        generate(model, asked, on_token=listen, **options)

    monkeypatch.setattr(chat, "generate", interrupted)
    monkeypatch.setattr("sys.stdin", Terminal("the fox\n" + "jumps over the lazy dog " * 20 + "\nrain\n\nnever read\n"))
    talk = minillm(capsys, "chat", decoder, "--temperature", 0, "--max-new-tokens", 4)
    assert talk.code == 0 and talk.err.count("> ") == 4, talk.err
    assert "say it in fewer words" in talk.err and "was not finetuned to reply" in talk.err
    cut = talk.out.split("\n")[0]
    _, tokenizer = load(decoder)
    said = [("user", "the fox"), ("assistant", cut), ("user", "rain")]
    assert prompts[1:] == [
        encode_chat(tokenizer, [{"role": role, "content": text} for role, text in said], reply=True)[0]
    ]
    assert 1 <= len(tokenizer.encode(cut)) <= 3 and talk.out.count("\n") == 2


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_standard_input_that_is_no_text_is_refused(
    errors: str, decoder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO("the café\n".encode("latin-1")), encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", stdin)
    talk = minillm(capsys, "chat", decoder)
    assert talk.code == 2 and "error: standard input is not UTF-8: convert it first" in talk.err and talk.out == ""


def test_an_option_is_refused_before_the_first_line(decoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = minillm(capsys, "chat", decoder, "--max-new-tokens", 0)
    assert talk.code == 2 and talk.err == "error: --max-new-tokens must be at least 1, not 0\n"
    talk = minillm(capsys, "chat", decoder, "--system", "the quick fox " * 30)
    assert talk.code == 2 and "say it in fewer words" in talk.err

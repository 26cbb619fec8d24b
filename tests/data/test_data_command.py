"""`minillm data …` from the command line: what is printed, and the exit codes."""

import json
from pathlib import Path

import pytest

from minillm.cli import main
from minillm.data.shards import open_shards
from tests.data.conftest import Prepare
from tokenizer import Tokenizer, train


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    train(["abc " * 100], type="char", vocab_size=300).save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_prepare_then_verify(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("abc cab " * 100)
    command = [
        "data",
        "prepare",
        "--data",
        f"{tmp_path}/t.txt",
        "--tokenizer",
        str(tokenizer),
        "--out",
        f"{tmp_path}/s",
    ]
    assert main([*command, "--validation", "0.25"]) == 0
    loaded = Tokenizer.load(tmp_path / "s" / "tokenizer")
    shards = open_shards(tmp_path / "s", tokenizer_hash=loaded.hash)
    assert loaded.decode(shards.val.window(0, len(shards.val))) == "abc cab " * 25
    assert "200 tokens" in capsys.readouterr().out
    assert main(["data", "verify", f"{tmp_path}/s"]) == 0
    assert main(command) == 2 and "exists" in capsys.readouterr().err

    shard = tmp_path / "s" / "train-00000.tokens"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    assert main(["data", "verify", f"{tmp_path}/s"]) == 3
    assert "train-00000.tokens is damaged" in capsys.readouterr().err
    assert main(["data", "verify", f"{tmp_path}"]) == 2


def test_prepare_refuses_text_that_the_tokenizer_does_not_know(tmp_path: Path, tokenizer: Path, capsys) -> None:
    (tmp_path / "t.txt").write_text("abc xyz\n" * 100)
    command = [
        "data",
        "prepare",
        "--data",
        f"{tmp_path}/t.txt",
        "--tokenizer",
        str(tokenizer),
        "--out",
        f"{tmp_path}/s",
    ]
    assert main(command) == 2
    assert "t.txt: character 'x'" in capsys.readouterr().err
    assert main([*command, "--validation", "1.5"]) == 2
    assert "--validation must be between 0 and 1" in capsys.readouterr().err


def test_what_cannot_be_read_is_listed(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "corpus", tmp_path / "s"
    folder.mkdir()
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    command = ["data", "prepare", "--data", str(folder), "--tokenizer", str(tokenizer), "--out", str(out)]
    assert main(command) == 2
    assert "holds no text; 1 could not be read (latin.txt is not UTF-8: byte 0xE9" in capsys.readouterr().err
    (folder / "t.txt").write_text("abc cab " * 100)
    (folder / "lost.txt").symlink_to("nowhere")
    assert main(command) == 0
    heard = capsys.readouterr().err
    assert "2 could not be read and were skipped:\n  latin.txt: is not UTF-8: byte 0xE9 at offset 3;" in heard
    assert "\n  lost.txt: no file that can be read\n" in heard


def test_clean_prints_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "word " * 30}) + "\n" + '{"text": "x"}\n')
    command = ["data", "clean", "--data", f"{tmp_path}/t.jsonl", "--out", f"{tmp_path}/out"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["after"] == {"documents": 1, "bytes": 150}
    assert main([*command, "--overwrite", "--shortest", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-2].split() == ["after", "2", "151"]


def test_unknown_commands(prepared: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "prepair"]) == 2
    assert "there are: prepare, clean, verify, download" in capsys.readouterr().err
    assert main(["data", "download", "http://example.org/f", "--out", "f"]) == 2
    assert "is no https:// address" in capsys.readouterr().err

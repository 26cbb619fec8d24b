"""The command line: results on stdout, one line for what is wrong, exit codes 0, 2 and 3."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tokenizer import Tokenizer, train
from tokenizer.__main__ import main
from tokenizer.compression import GPT2_TOKENS, SAMPLES, compression, table
from tokenizer.inputs import read_texts

TEXT = "It was the best of times, it was the worst of times.\r\n" * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train([TEXT], vocab_size=300).save(path)
    return path


class Bytes(io.TextIOWrapper):
    """A stdin that holds the given bytes."""

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content), encoding="utf-8")


def test_train_writes_what_the_python_call_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_bytes(TEXT.encode())
    (tmp_path / "text" / "b.jsonl").write_text('{"text": "first"}\n\n{"text": "second"}\n')
    (tmp_path / "text" / "c.py").write_bytes("# coding: latin-1\n# é\n".encode("latin-1"))
    (tmp_path / "text" / "broken.md").write_bytes(b"abc\xff")
    (tmp_path / "text" / "d.csv").write_text("not read")
    arguments = ["train", "--input", str(tmp_path / "text"), "--vocab-size", "300", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    expected = train([TEXT, "first", "second", "# coding: latin-1\n# é\n"], vocab_size=300)
    assert out == expected.hash + "\n"
    assert Tokenizer.load(tmp_path / "out").manifest == expected.manifest
    assert "broken.md is not UTF-8: byte 0xff at offset 3" in err
    assert "(1 files skipped)" in err

    assert main(arguments) == 2
    assert "holds a tokenizer already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--type", "char"]) == 0
    assert Tokenizer.load(tmp_path / "out").type == "char"


@pytest.mark.parametrize("text", [TEXT, "", "▁ \0 漢\n", " "])
def test_encode_and_decode_are_exact(folder: Path, text: str, tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(text.encode())
    command = [sys.executable, "-m", "tokenizer"]
    ids = subprocess.run([*command, "encode", folder, tmp_path / "input"], capture_output=True, check=True).stdout
    assert list(map(int, ids.split())) == Tokenizer.load(folder).encode(text)
    back = subprocess.run([*command, "decode", folder], input=ids, capture_output=True, check=True)
    assert back.stdout == text.encode()


def test_encode_takes_text_or_stdin(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = " ".join(map(str, Tokenizer.load(folder).encode("the best é"))) + "\n"
    assert main(["encode", str(folder), "--text", "the best é"]) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", Bytes("the best é".encode()))
    assert main(["encode", str(folder)]) == 0
    assert capsys.readouterr().out == expected


def test_inspect_shows_the_vocabulary_and_how_it_compresses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "extra.txt").write_text("the best of times " * 1000)
    assert main(["inspect", str(folder), "--input", str(folder / "extra.txt")]) == 0
    out = capsys.readouterr().out
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.hash in out
    assert "unknown=0 pad=1 document=2 end=3 mask=4 system=5 user=6 assistant=7" in out
    tokens = len(tokenizer.encode("the best of times " * 1000))
    assert out.splitlines()[-1].split()[1:] == ["18,000", f"{tokens:,}", f"{18000 / tokens:.2f}", "–"]
    for kind, text in SAMPLES.items():
        row = next(line for line in out.splitlines() if line.startswith(kind))
        size, tokens = len(text.encode()), len(tokenizer.encode(text))
        assert row.split()[-4:] == [f"{size}", f"{tokens}", f"{size / tokens:.2f}", f"{size / GPT2_TOKENS[kind]:.2f}"]


def test_gpt2_figures_belong_to_these_very_samples() -> None:
    sizes = {kind: len(text.encode()) for kind, text in SAMPLES.items()}
    assert sizes == {
        "Python code": 899,
        "English prose": 662,
        "Chinese prose": 421,
        "numbers": 218,
        "white space": 246,
        "JSON": 285,
        "emoji, symbols": 153,
    }
    assert GPT2_TOKENS.keys() == SAMPLES.keys()


def test_compression_leaves_blank_what_characters_cannot_encode() -> None:
    rows = compression(train(["abc"], type="char"), {"known": "abcabc", "unknown": "d", "empty": ""})
    assert [tuple(row) for row in rows] == [("known", 6, 6, 1.0, None), ("unknown", 1, None, None, None)]
    assert table(rows).splitlines()[2].split() == ["unknown", "1", "–", "–", "–"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--input", "{tmp}/none", "--out", "{tmp}/o"], "{tmp}/none does not exist"),
        (["train", "--input", "{tmp}/empty.txt", "--out", "{tmp}/o"], "the text to train a tokenizer on is empty"),
        (["train", "--input", "{tmp}/bad.txt", "--out", "{tmp}/o"], "bad.txt is not UTF-8: byte 0xff at offset 5"),
        (["train", "--input", "{tmp}/bad.jsonl", "--out", "{tmp}/o"], "bad.jsonl, line 2: expected an object with a"),
        (["train", "--input", "{tmp}/no.jsonl", "--out", "{tmp}/o"], "no.jsonl, line 1: this is no JSON"),
        (["train", "--input", "{tmp}/folder", "--out", "{tmp}/o"], "folder holds no .txt .md .py .jsonl file"),
        (["train", "--input", "{tmp}/good.txt", "--out", "{tmp}/o"], "larger than the text supports"),
        (["train", "--input", "{tmp}/good.txt", "--out", "{tmp}/good.txt"], "{tmp}/good.txt: File exists"),
        (["encode", "{tmp}/none", "--text", "a"], "none holds no tokenizer"),
        (["encode", "{model}", "{tmp}/bad.txt"], "bad.txt is not UTF-8: byte 0xff at offset 5"),
        (["encode", "{model}", "{tmp}/none"], "{tmp}/none: No such file or directory"),
        (["encode", "{model}", "--text", "a\udc80"], "lone surrogate"),
        (["decode", "{model}", "1", "300"], "id 300 at position 1 is outside the vocabulary of 300"),
        (["decode", "{model}", "x"], "invalid int value: 'x'"),
        (["train"], "the following arguments are required"),
        (["mend"], "invalid choice: 'mend'"),
        ([], "required: COMMAND"),
    ],
)
def test_mistakes_give_one_line_and_exit_code_2(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "good.txt").write_text("abc")
    (tmp_path / "bad.txt").write_bytes("é123".encode() + b"\xff")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    (tmp_path / "no.jsonl").write_text("text\n")
    names = {"tmp": tmp_path, "model": folder}
    assert main([argument.format(**names) for argument in arguments], prog="minillm tokenizer") == 2
    out, err = capsys.readouterr()
    assert message.format(**names) in err
    assert err.splitlines()[-1].startswith("minillm tokenizer")
    assert out == ""


def test_ids_that_are_none_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Bytes(b"1 2 -3"))
    assert main(["decode", str(folder)]) == 2
    assert "stdin: '-3' at position 2 is no id" in capsys.readouterr().err


def test_a_damaged_model_is_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train([TEXT], vocab_size=300).save(tmp_path)
    with (tmp_path / "tokenizer.model").open("ab") as file:
        file.write(b"\0")
    assert main(["encode", str(tmp_path), "--text", "a"]) == 3
    assert "tokenizer.model is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("block", [1, 2, 3, 5, 1000])
def test_files_come_in_blocks_with_true_offsets(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenizer.inputs._BLOCK", block)
    for content in ("a\r\né漢👍\ufeff" * 3, ""):
        (tmp_path / "good.txt").write_bytes(content.encode())
        assert "".join(read_texts([tmp_path / "good.txt"], print)) == content
    for content, offset in (("é漢👍".encode() + b"a\xffb", 10), ("é".encode() + b"\xe2\x96", 2), (b"\xc3(", 0)):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(ValueError, match=f"byte 0x{content[offset]:02x} at offset {offset};"):
            list(read_texts([tmp_path / "bad.txt"], print))
    lines = [json.dumps({"text": "é"}, ensure_ascii=False).encode() + b"\n", b'{"text": "\xff"}']
    (tmp_path / "bad.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=f"at offset {len(lines[0]) + 10};"):
        list(read_texts([tmp_path / "bad.jsonl"], print))


def test_an_interrupted_training_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenizer.__main__.train", interrupted)
    (tmp_path / "a.txt").write_text(TEXT)
    assert main(["train", "--input", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "python -m tokenizer: interrupted; nothing was written\n"
    assert list((tmp_path / "out").iterdir()) == []


def test_a_reader_that_stops_early_is_no_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 100_000)
    command = [sys.executable, "-m", "tokenizer", "encode", folder, tmp_path / "long.txt"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_importing_loads_neither_torch_nor_the_rest() -> None:
    code = "import sys, tokenizer; print([name for name in ('torch', 'minillm', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

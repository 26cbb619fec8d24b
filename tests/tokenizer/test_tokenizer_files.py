"""A saved tokenizer comes back; a missing, damaged or foreign one is named and never handed to SentencePiece."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from tokenizer import DamagedFile, Tokenizer, train
from tokenizer.tokenizer import manifest_hash


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train(["a small text, to make small files\n"], vocab_size=300)


@pytest.fixture
def folder(small: Tokenizer, tmp_path: Path) -> Path:
    small.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("name", ["bpe", "unigram", "char"])
def test_saved_tokenizers_come_back(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path / "deep" / "folder")
    loaded = Tokenizer.load(str(tmp_path / "deep" / "folder"))
    assert (loaded.type, loaded.hash, loaded.manifest) == (tokenizer.type, tokenizer.hash, tokenizer.manifest)
    assert loaded.encode("def f(self):\n") == tokenizer.encode("def f(self):\n")
    files = {path.name: path.read_bytes() for path in (tmp_path / "deep" / "folder").iterdir()}
    assert sorted(files) == ["manifest.json", "tokenizer.model"]
    model = files["tokenizer.model"]
    assert loaded.hash == loaded.manifest["model_sha256"] == hashlib.sha256(model).hexdigest()


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.model"])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        Tokenizer.load(folder)


def test_every_kind_of_damage_is_found_before_parsing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*args: Any, **options: Any) -> None:
        raise AssertionError("a damaged model was parsed")

    monkeypatch.setattr(sentencepiece, "SentencePieceProcessor", parse)
    intact = (folder / "tokenizer.model").read_bytes()
    flipped = [intact[:at] + bytes([intact[at] ^ 1 << at % 8]) + intact[at + 1 :] for at in range(0, len(intact), 97)]
    truncated = [intact[:size] for size in range(0, len(intact), 97)]
    for damaged in [*flipped, *truncated, intact + b"\0"]:
        (folder / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(DamagedFile, match=r"tokenizer\.model is damaged"):
            Tokenizer.load(folder)


def test_a_damaged_manifest_is_found(folder: Path) -> None:
    intact = (folder / "manifest.json").read_bytes()
    content = json.loads(intact)
    flipped = [intact[:at] + bytes([intact[at] ^ 1 << at % 8]) + intact[at + 1 :] for at in range(len(intact))]
    truncated = [intact[:size] for size in range(0, len(intact) - 2, 13)]
    found = 0
    for damaged in [*flipped, *truncated, b"[" * 100_000, b"[]", b"{}", b"null", b"\xff"]:
        (folder / "manifest.json").write_bytes(damaged)
        try:
            Tokenizer.load(folder)
        except DamagedFile as error:
            assert "manifest.json is damaged" in str(error)
            found += 1
        else:
            assert json.loads(damaged) == content  # a flip among the white space that changes nothing
    assert found > 0.9 * len(flipped)


def write(folder: Path, model: bytes, **manifest: Any) -> None:
    manifest = {"format": 1, "type": "bpe", "model_sha256": hashlib.sha256(model).hexdigest(), **manifest}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": manifest_hash(manifest)}))
    (folder / "tokenizer.model").write_bytes(model)


@pytest.mark.parametrize("model", [b"", b"\xff" * 100, b"\n\x05hello"])
def test_what_is_no_model_is_refused_even_with_the_right_hash(folder: Path, model: bytes) -> None:
    write(folder, model)
    with pytest.raises(DamagedFile, match=r"tokenizer\.model is no model of this project's"):
        Tokenizer.load(folder)


def test_a_manifest_without_its_keys_is_refused(folder: Path) -> None:
    for manifest in ({}, {"format": "1", "type": "bpe", "model_sha256": ""}, {"format": 1, "type": "bpe"}):
        (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": manifest_hash(manifest)}))
        with pytest.raises(DamagedFile, match=r"manifest\.json is damaged"):
            Tokenizer.load(folder)


def test_a_later_format_is_no_damage(folder: Path) -> None:
    write(folder, b"", format=2)
    with pytest.raises(ValueError, match="has format 2, this version reads up to 1") as refused:
        Tokenizer.load(folder)
    assert not isinstance(refused.value, DamagedFile)


def test_a_save_that_fails_leaves_the_old_files(folder: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        bpe.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

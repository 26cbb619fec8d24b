"""Shards: what is written is what was read, what is damaged is found, and memory stays within bounds."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minillm.config import DamagedFile, UserError
from minillm.data import readers
from minillm.data.index import read_index, render_index
from minillm.data.shards import corpus_hash, default_workers, is_prepared, open_shards, verify
from minillm.data.sources import open_source
from minillm.data.tokens import read_header
from tests.data.conftest import DOCUMENT, HASH, VOCAB, Prepare, decode, encode


def all_ids(stream) -> np.ndarray:
    return stream.window(0, len(stream))


def documents_of(stream) -> list[bytes]:
    ids = all_ids(stream)
    return [decode(part) for part in np.split(ids, np.flatnonzero(ids == DOCUMENT))[1:]]


def refuse_z(texts: list[str]) -> list[list[int]]:
    if any("z" in text for text in texts):
        raise ValueError("no z here")
    return encode(texts)


def test_every_document_once_on_one_side(prepared: Prepare, corpus: Path) -> None:
    shards = prepared(corpus, validation=0.2)
    texts = [path.read_bytes() for path in sorted(corpus.iterdir()) if path.stat().st_size]
    train, val = documents_of(shards.train), documents_of(shards.val)
    assert sorted(train + val) == sorted(texts) and train and val
    assert not set(train) & set(val)  # the two equal ones are on one side
    assert [text for text in texts if text in set(train)] == train  # in the source's order
    info = shards.info
    assert (info["documents"], info["bytes"]) == (59, sum(map(len, texts)))
    assert (info["train_tokens"], info["val_tokens"]) == (len(shards.train), len(shards.val))
    assert info["val_bytes"] == sum(map(len, val)) and info["val_targets"] == len(shards.val) - 1
    assert info["bytes_per_token"] == info["bytes"] / (len(shards.train) + len(shards.val))
    assert b"".join(shards.val_text()) == b"".join(val)
    assert info["split"] == "by document hash"
    assert info["hash"] == corpus_hash(open_source(str(corpus)))
    assert info["hash"] == corpus_hash(open_source(str(shards.path)))
    assert verify(shards.path) == [] and is_prepared(shards.path)
    (corpus / "00.txt").write_bytes((corpus / "00.txt").read_bytes().replace(b"0", b"1"))
    assert info["hash"] != corpus_hash(open_source(str(corpus)))


def test_a_document_keeps_its_side_when_others_come(prepared: Prepare, corpus: Path, tmp_path: Path) -> None:
    before = set(documents_of(prepared(corpus, validation=0.2).val))
    (corpus / "05b.txt").write_text("a new one")
    assert before <= set(documents_of(prepared(corpus, tmp_path / "second", validation=0.2).val))


def test_a_single_text_is_split_by_position_at_a_character(prepared: Prepare, tmp_path: Path) -> None:
    text = "é" * 101
    (tmp_path / "t.txt").write_text(text)
    shards = prepared(tmp_path / "t.txt", validation=0.25)
    assert all_ids(shards.train)[0] == DOCUMENT and DOCUMENT not in all_ids(shards.val)
    train, val = decode(all_ids(shards.train)).decode(), decode(all_ids(shards.val)).decode()
    assert train + val == text and len(train) == 76  # byte 151 is inside a character, which stays whole
    assert shards.info["split"] == "by position"


@pytest.mark.parametrize(("count", "split"), [(1, "by position"), (2, "one is held out"), (3, "one is held out")])
def test_few_documents(prepared: Prepare, tmp_path: Path, count: int, split: str) -> None:
    lines = ['{"text": "' + str(i) * 50 + '"}\n' for i in range(count)]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    shards = prepared(tmp_path / "t.jsonl", validation=0.05)
    assert split in shards.info["split"]
    if count > 1:
        assert len(documents_of(shards.val)) == 1 and len(documents_of(shards.train)) == count - 1


def test_parts_of_a_long_document_make_one(prepared: Prepare, corpus: Path, tmp_path: Path, monkeypatch) -> None:
    whole = prepared(corpus, validation=0.2)
    monkeypatch.setattr(readers, "PART", 16)
    parts = prepared(corpus, tmp_path / "parts", validation=0.2)
    assert parts.info["hash"] == whole.info["hash"] and parts.info["documents"] == 59
    assert sorted(documents_of(parts.train) + documents_of(parts.val)) == sorted(
        documents_of(whole.train) + documents_of(whole.val)
    )


def test_workers_and_shard_sizes_change_nothing(prepared: Prepare, corpus: Path, tmp_path: Path) -> None:
    one = prepared(corpus, validation=0.2)
    seen: list[tuple[int, int | None]] = []
    two = prepared(
        corpus, tmp_path / "two", validation=0.2, workers=2, shard_tokens=100, progress=lambda *x: seen.append(x)
    )
    assert len(list(two.path.glob("train-*.tokens"))) == -(-len(two.train) // 100) > 3
    for a, b in ((one.train, two.train), (one.val, two.val)):
        np.testing.assert_array_equal(all_ids(a), all_ids(b))
    assert one.info == two.info and seen[-1] == (one.info["bytes"], one.info["bytes"])


def test_a_small_source_takes_one_process_and_a_large_one_our_cores(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    source = open_source(str(tmp_path / "t.jsonl"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert default_workers(source) == 1
    monkeypatch.setattr("minillm.data.shards._SMALL", source.stored)
    monkeypatch.setattr(os, "cpu_count", lambda: 1000)  # a machine of which a part is ours
    assert default_workers(source) == (cores if hasattr(os, "sched_getaffinity") else 1000)


def end_the_process(texts: list[str]) -> list[list[int]]:
    os._exit(9)


def test_a_process_that_dies_is_named(prepared: Prepare, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one of 2 tokenizing processes has died.*--workers 1"):
        prepared(corpus, encode=end_the_process, workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_windows_go_around_the_ring_and_across_files(prepared: Prepare, corpus: Path) -> None:
    stream = prepared(corpus, validation=0.2, shard_tokens=64).train
    ids = all_ids(stream)
    starts = np.array([0, 60, 63, 64, len(ids) - 1, len(ids) + 5])
    expected = np.stack([np.take(ids, np.arange(s, s + 150), mode="wrap") for s in starts])
    np.testing.assert_array_equal(stream.windows(starts, 150), expected)
    assert stream.window(3, 5).dtype == np.int64 and stream.max_id == ids.max()


@pytest.mark.parametrize(("vocab_size", "width"), [(65_536, 2), (65_537, 4)])
def test_ids_take_two_bytes_where_they_fit(prepared: Prepare, corpus: Path, vocab_size: int, width: int) -> None:
    highest = vocab_size - 1
    shards = prepared(corpus, vocab_size=vocab_size, validation=0.2, encode=lambda texts: [[highest, 0] for _ in texts])
    header = read_header(shards.path / "train-00000.tokens")
    assert (header.width, header.max_id, shards.train.max_id) == (width, highest, highest)
    assert set(all_ids(shards.train)) == {DOCUMENT, 0, highest}


def test_another_tokenizer_or_vocabulary_is_refused(prepared: Prepare, corpus: Path) -> None:
    shards = prepared(corpus)
    assert len(open_shards(shards.path, tokenizer_hash=HASH, vocab_size=VOCAB).train) == len(shards.train)
    with pytest.raises(UserError, match=r"made with another tokenizer \(abababababab…, not cdcdcdcdcdcd…\)"):
        open_shards(shards.path, tokenizer_hash="cd" * 32)
    with pytest.raises(UserError, match=rf"holds the id {shards.train.max_id}, outside a vocabulary of 100"):
        open_shards(shards.path, vocab_size=100)


def test_refusals_leave_nothing_behind(prepared: Prepare, corpus: Path, tmp_path: Path) -> None:
    (corpus / "30.txt").write_text("buzz")
    (tmp_path / "short.txt").write_text("ab")
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").touch()
    for source, options, message in [
        (corpus, {"encode": refuse_z}, "30.txt: no z here"),
        (corpus, {"encode": refuse_z, "workers": 2}, "30.txt: no z here"),
        (corpus, {"vocab_size": 50}, "leave the vocabulary of 50"),
        (corpus, {"encode": lambda texts: [[VOCAB]] * len(texts)}, "leave the vocabulary of 260"),
        (corpus, {"encode": lambda texts: [[-1]] * len(texts)}, "leave the vocabulary of 260"),
        (tmp_path / "short.txt", {}, "too little text: 2 tokens to train on, 1 to validate"),
        (tmp_path / "blank", {}, "holds no text"),
    ]:
        with pytest.raises(UserError, match=message):
            prepared(source, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blank", "corpus", "short.txt"]


def test_a_taken_folder_is_replaced_only_on_demand(prepared: Prepare, corpus: Path, tmp_path: Path) -> None:
    first = prepared(corpus)
    (corpus / "99.txt").write_text("more")
    with pytest.raises(UserError, match="exists; choose another folder, or replace it with --overwrite"):
        prepared(corpus)
    assert prepared(corpus, overwrite=True).info["documents"] == first.info["documents"] + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "shards"]


def flip(path: Path, position: int, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1 << bit
    path.write_bytes(raw)


def flips_found(folder: Path, count: int) -> int:
    """How many of `count` random single-bit flips `verify` finds; those in a header or the index, opening too."""
    found, generator = 0, random.Random(5)
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    for i in range(count):
        path = files[i % len(files)]
        original = path.read_bytes()
        in_header = path.suffix == ".tokens" and i % 2
        position = generator.randrange(256 if in_header else len(original))
        flip(path, position, generator.randrange(8))
        assert any(path.name in problem for problem in verify(folder)), f"{path} at {position}"
        if path.name == "index.json" or (path.suffix == ".tokens" and position < 256):
            with pytest.raises(DamagedFile, match=path.name):
                open_shards(folder)
        path.write_bytes(original)
        found += 1
    assert verify(folder) == []
    return found


def test_flipped_bits_are_found(prepared: Prepare, corpus: Path) -> None:
    assert flips_found(prepared(corpus, validation=0.2, shard_tokens=1000).path, 60) == 60


@pytest.mark.prove
def test_a_thousand_flipped_bits_are_found(prepared: Prepare, corpus: Path) -> None:
    assert flips_found(prepared(corpus, validation=0.2, shard_tokens=1000).path, 1000) == 1000


def test_cut_off_and_missing_files_are_found_on_opening(prepared: Prepare, corpus: Path) -> None:
    folder = prepared(corpus, validation=0.2).path
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        for length in {0, 1, 255, 256, len(original) // 2, len(original) - 1} - {len(original)}:
            path.write_bytes(original[:length])
            with pytest.raises(DamagedFile, match=path.name):
                open_shards(folder)
            assert verify(folder)
        path.unlink()
        with pytest.raises(DamagedFile, match=path.name):
            open_shards(folder)
        assert verify(folder)
        path.write_bytes(original)


@pytest.mark.parametrize("shard_tokens", [100, 100_000])
def test_an_id_that_was_never_written_is_damage_when_it_is_read(
    prepared: Prepare, corpus: Path, shard_tokens: int
) -> None:
    folder = prepared(corpus, validation=0.2, shard_tokens=shard_tokens).path
    last = sorted(folder.glob("train-*.tokens"))[-1]
    flip(last, last.stat().st_size - 1, 7)
    stream = open_shards(folder).train
    stream.window(0, 50)
    with pytest.raises(DamagedFile, match=rf"{last} is damaged: it holds the id 32\d+, and \d+ is the highest"):
        stream.window(len(stream) - 5, 5)


def test_no_file_from_elsewhere(prepared: Prepare, corpus: Path, tmp_path: Path) -> None:
    folder = prepared(corpus, validation=0.2).path
    other = prepared(corpus, tmp_path / "other", validation=0.4).path
    shard = folder / "train-00000.tokens"
    shard.write_bytes((other / shard.name).read_bytes())
    with pytest.raises(DamagedFile, match=r"is not the file that index\.json names"):
        open_shards(folder)
    shard.unlink()
    shard.symlink_to(other / shard.name)
    with pytest.raises(DamagedFile, match="is a link"):
        open_shards(folder)
    (folder / "index.json").write_bytes(render_index({"format": 9}))
    with pytest.raises(UserError, match="has format 9, not 1"):
        open_shards(folder)
    with pytest.raises(UserError, match="holds no prepared data"):
        open_shards(corpus)


@pytest.mark.parametrize(
    ("way", "value"),
    [
        (("info",), None), (("info", "val_bytes"), "9"), (("info", "bytes_per_token"), None), (("info", "hash"), 3),
        (("files",), []), (("files", "train"), None), (("files", "val"), [1]), (("text",), {}), (("files", "val"), "x"),
    ],
)  # fmt: skip
def test_an_index_that_fits_its_checksum_and_says_nothing(prepared: Prepare, corpus: Path, way, value) -> None:
    folder = prepared(corpus, validation=0.2).path
    index = read_index(folder)
    del index["sha256"]
    *before, last = way
    inside = index
    for step in before:
        inside = inside[step]
    inside[last] = value
    (folder / "index.json").write_bytes(render_index(index))
    with pytest.raises(DamagedFile, match=r"index\.json is damaged: it does not tell what the folder holds"):
        open_shards(folder)
    assert len(verify(folder)) == 1 and "index.json" in verify(folder)[0]


BOUNDED = """
import sys
from minillm.machine import peak_bytes
from minillm.data.shards import prepare
from minillm.data.sources import open_source
from tests.data.conftest import encode
start = peak_bytes()
shards = prepare(open_source(sys.argv[1]), sys.argv[2], encode=encode, tokenizer_hash="ab" * 32, vocab_size=260,
                 document_id=2, workers=1, shard_tokens=10_000_000)
print(len(shards.train) + len(shards.val), (peak_bytes() - start) // 2**20)
"""


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_corpus_beyond_the_memory_budget(tmp_path: Path, ending: str) -> None:
    budget = 48  # MB; the corpus and its tokens are larger each
    line = "0123456789 abcdef\n" * 50
    with (tmp_path / f"t.{ending}").open("w") as file:
        for _ in range(64 * 2**20 // len(line)):
            file.write(line if ending == "txt" else '{"text": "' + line.replace("\n", "\\n") + '"}\n')
    run = subprocess.run(
        [sys.executable, "-c", BOUNDED, tmp_path / f"t.{ending}", tmp_path / "out"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    tokens, grown = map(int, run.stdout.split())
    assert tokens > 60_000_000 and grown < budget, f"grew by {grown} MB"

"""From a source to a folder of shards: documents are divided, tokenized and written in one pass, in bounded memory.

The stream of ids is   document_id, ids of the first document, document_id, ids of the second one, …
The folder is written beside its place and renamed when it is complete, so that half of one is never found.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from minillm.config import UserError
from minillm.data.folder import new_folder
from minillm.data.index import FORMAT, INDEX, TEXT, Shards, open_shards, read_index, render_index, verify
from minillm.data.parallel import Encode, encoded
from minillm.data.sources import Source, is_prepared
from minillm.data.split import Piece, Split, plan
from minillm.data.tokens import TokenStream, TokenWriter

__all__ = ["Shards", "TokenStream", "corpus_hash", "default_workers", "is_prepared", "open_shards", "prepare", "verify"]

_BATCH = 1 << 19  # characters that are encoded at a time
_SMALL = 64 << 20  # bytes of files below which starting processes costs more than they save
Progress = Callable[[int, int | None], None]


def prepare(
    source: Source,
    out: Path | str,
    *,
    encode: Encode,
    tokenizer_hash: str,
    vocab_size: int,
    document_id: int,
    validation: float = 0.05,
    workers: int | None = None,
    shard_tokens: int = 100_000_000,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Shards:
    """Tokenizes a source into a new folder of shards.

    Each document is preceded by `document_id`; the held-out part of a text that is split by position is not.

    Args:
        encode: texts → ids of each, without special ids; must be picklable where there is more than one worker.
        tokenizer_hash: 64 hex digits, by which `open_shards` knows the tokenizer again.
        validation: share of the text that is held out; see split.py.
        workers: processes. None: one for each core, and below 64 MB of files this one alone.
        shard_tokens: tokens in one file.
        progress: called with the bytes of text done, and of all (None where only reading tells).

    Raises `UserError` where `out` is taken, the source cannot be read, holds too little text, or `encode` refuses it or
    gives ids outside the vocabulary. Nothing is left behind then.
    """
    if source.is_prepared:
        raise UserError(f"{source.name} is prepared already; give the text that it was made from")
    workers = workers or default_workers(source)
    with new_folder(Path(out), overwrite=overwrite) as folder:
        width = 2 if vocab_size <= 1 << 16 else 4
        split = plan(source, validation)
        writer = _Writer(folder, split, width, tokenizer_hash, shard_tokens)
        with closing(writer):
            for pieces, ids in _tokenized(split.pieces(source), encode, workers, vocab_size):
                writer.write(pieces, ids, document_id)
                if progress is not None:
                    progress(sum(writer.bytes), source.size)
            writer.finish(source)
    return open_shards(out, tokenizer_hash=tokenizer_hash, vocab_size=vocab_size)


def default_workers(source: Source) -> int:
    """Processes that tokenize a source: one for each core, or this one alone where starting them would not pay."""
    if source.stored < _SMALL:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def corpus_hash(source: Source) -> str:
    """The hash by which `--resume` sees that a corpus has changed; reads all of it, of prepared shards the index."""
    if source.prepared is not None:
        return str(read_index(source.prepared)["info"]["hash"])
    digest = _CorpusHash()
    for piece in Split("by document hash").pieces(source):
        digest.add(piece.text.encode(), starts=piece.starts)
    return digest.hexdigest()


class _CorpusHash:
    """SHA-256 over the SHA-256 of each document, in order: where one ends and the next begins counts too."""

    def __init__(self) -> None:
        self.documents = 0
        self._all, self._document = hashlib.sha256(), hashlib.sha256()

    def add(self, raw: bytes, *, starts: bool) -> None:
        if starts:
            self._all.update(self._document.digest())
            self.documents, self._document = self.documents + 1, hashlib.sha256()
        self._document.update(raw)

    def hexdigest(self) -> str:
        whole = self._all.copy()
        whole.update(self._document.digest())
        return whole.hexdigest()


class _Writer:
    """The files of one folder while they grow; index 0 is training, 1 what is held out."""

    def __init__(self, folder: Path, split: Split, width: int, tokenizer: str, shard_tokens: int):
        self.folder, self.split, self.tokenizer = folder, split, tokenizer
        self.bytes = [0, 0]
        self._tokens = [
            TokenWriter(folder, name, width=width, tokenizer=tokenizer, shard_tokens=shard_tokens)
            for name in ("train", "val")
        ]
        self._corpus, self._text_hash = _CorpusHash(), hashlib.sha256()

    def write(self, pieces: list[Piece], ids: list[np.ndarray], document_id: int) -> None:
        streams: tuple[list, list] = ([], [])
        with (self.folder / TEXT).open("ab") as text:
            for piece, piece_ids in zip(pieces, ids, strict=True):
                raw = piece.text.encode()
                self._corpus.add(raw, starts=piece.starts)
                self.bytes[piece.held_out] += len(raw)
                streams[piece.held_out].extend([[document_id], piece_ids] if piece.starts else [piece_ids])
                if piece.held_out:
                    text.write(raw)
                    self._text_hash.update(raw)
        for stream, tokens in zip(streams, self._tokens, strict=True):
            if stream:
                tokens.write(np.concatenate(stream))

    def close(self) -> None:
        for tokens in self._tokens:
            tokens.abandon()

    def finish(self, source: Source) -> None:
        """Completes the files and writes the index. Raises `UserError` where one side has nothing to predict."""
        train, val = self._tokens
        if min(train.tokens, val.tokens) < 2:
            raise UserError(
                f"{source.name} holds too little text: {train.tokens} tokens to train on, {val.tokens} to validate; "
                "give more text, or change --data.validation"
            )
        for tokens in self._tokens:
            tokens.close()
        total = sum(self.bytes)
        info = {
            "source": source.name, "hash": self._corpus.hexdigest(), "split": self.split.kind,
            "documents": self._corpus.documents, "bytes": total, "skipped": len(source.skipped),
            "train_tokens": train.tokens, "train_bytes": self.bytes[0],
            "val_tokens": val.tokens, "val_bytes": self.bytes[1], "val_targets": val.tokens - 1,
            "tokenizer": self.tokenizer, "bytes_per_token": total / (train.tokens + val.tokens),
        }  # fmt: skip
        files = {tokens.name: [header.sha256 for header in tokens.headers] for tokens in self._tokens}
        index = {"format": FORMAT, "info": info, "files": files, "text": self._text_hash.hexdigest()}
        (self.folder / INDEX).write_bytes(render_index(index))


def _tokenized(
    pieces: Iterable[Piece], encode: Encode, workers: int, vocab_size: int
) -> Iterator[tuple[list[Piece], list[np.ndarray]]]:
    """Batches of pieces with their ids. Raises `UserError` that names the piece which `encode` refuses."""
    for batch, ids in encoded(_batches(pieces), encode, workers):
        if isinstance(ids, ValueError):
            raise UserError(_refused(batch, encode, ids))
        for piece, piece_ids in zip(batch, ids, strict=True):
            if len(piece_ids) and not (piece_ids.min() >= 0 and piece_ids.max() < vocab_size):
                raise UserError(f"{piece.name}: its ids leave the vocabulary of {vocab_size}; give the right tokenizer")
        yield batch, ids


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _refused(batch: list[Piece], encode: Encode, error: ValueError) -> str:
    for piece in batch:
        try:
            encode([piece.text])
        except ValueError as its_own:
            return f"{piece.name}: {its_own}"
    return str(error)

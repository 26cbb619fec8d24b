"""Which characters of a text each token stands for: what ties labels on words and answers in texts to tokens."""

from typing import Protocol

import numpy as np

from minillm.data.records import Record
from minillm.data.tasks import TaskTokenizer


class OffsetTokenizer(Protocol):
    """A tokenizer that says itself where its tokens stand, as those of `tokenizers` do."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]: ...


def encode_with_offsets(tokenizer: TaskTokenizer, record: Record, text: str) -> tuple[list[int], np.ndarray]:
    """Ids [n], and [n, 2] the first character of each token and the one behind its last.

    A tokenizer without `encode_with_offsets` must have `token_bytes`, the bytes that each id stands for; a token that
    is a part of a character then stands for the whole of it.

    Raises `UserError`, with the record's place, for a text that cannot be encoded.
    """
    try:
        if hasattr(tokenizer, "encode_with_offsets"):
            ids, offsets = tokenizer.encode_with_offsets(text)
            return list(ids), np.array(offsets, np.int64).reshape(-1, 2)
        ids = tokenizer.encode(text)
    except ValueError as error:
        record.fail(str(error))
    sizes = np.array([len(tokenizer.token_bytes[i]) for i in ids], np.int64)
    data = np.frombuffer(text.encode(), np.uint8)
    if sizes.sum() != len(data):
        record.fail("the tokenizer does not keep every byte of the text, so no place in it can be found")
    ends = np.cumsum(sizes)
    character = np.cumsum((data & 0xC0) != 0x80) - 1  # of each byte
    return ids, np.stack([character[ends - sizes], character[ends - 1] + 1], 1)

"""What every task's data has in common: rows of examples, made once, that become batches on demand.

    records (records.py) -> examples -> TaskData -> Batch

    classify, regress   labels.py      text and text_pair; one target a row, [B] or [B, L]
    tag                 tags.py        words; a target on the first piece of each, [B, T]
    span-qa             spans.py       question and context; start and end, [B, 2]
    seq2seq             seq2seq.py     source and target; next-token targets, [B, T]
    chat                chat.py        conversations; next-token targets on the replies, [B, T]
    preference          preference.py  the same; row 2i is chosen, row 2i + 1 rejected

A row of text is `document_id, text, end_id` (with a pair `…, end_id, pair, end_id`), so that an encoder's head may read
the first place ([CLS]) and a decoder's the last. Rows of a batch are padded on the right to one of few lengths, so that
little compiles; padding has segment −1 and the target IGNORED.

B rows, T tokens of a row, L labels.
"""

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from minillm.config import UserError
from minillm.data.batch import IGNORED, Batch
from minillm.data.records import Record

SHORTEST = 16  # a batch is never padded to less: shorter ones would only add shapes
CUT_LIMIT = 0.05
"""Share of the replies that the context may cut before that is an error."""


class TaskTokenizer(Protocol):
    """What task data needs of a tokenizer: this project's, or one of `tokenizers` behind the same names."""

    document_id: int
    end_id: int
    pad_id: int

    def encode(self, text: str) -> list[int]: ...


class TaskData(Protocol):
    """One task's rows."""

    truncated: int
    """Examples that lost tokens to the context."""
    dropped: int
    """Examples that give no row, since nothing that could be learnt was left of them."""

    def __len__(self) -> int:
        """Rows; a long example may give several, and packed ones share one."""
        ...

    def batch(self, indices: np.ndarray, samples: np.ndarray) -> Batch:
        """Some rows.

        Args:
            indices: [B] which.
            samples: [B] the number of each in the order of training.
        """
        ...


def encode(tokenizer: TaskTokenizer, record: Record, text: str) -> list[int]:
    """Ids of a text of `record`; what the tokenizer refuses becomes a `UserError` with the record's place."""
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        record.fail(str(error))


def bucket(longest: int, context: int) -> int:
    """The length that rows of up to `longest` tokens are padded to: 16, 24, 32, 48, 64 … or `context`."""
    length, step = SHORTEST, SHORTEST // 2
    while length < longest:
        length += step
        step = length // 3 if length % 3 == 0 else length // 2  # 16 + 8, 24 + 8, 32 + 16, 48 + 16, 64 + 32
    return min(length, context)


def padded(rows: Sequence[Sequence[int]], fill: int, length: int) -> np.ndarray:
    """[B, length] rows, filled up on the right."""
    out = np.full((len(rows), length), fill, np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def text_batch(
    rows: Sequence[Sequence[int]],
    targets: np.ndarray | Sequence[Sequence[int]],
    samples: np.ndarray,
    *,
    pad_id: int,
    context: int,
    token_types: Sequence[Sequence[int]] | None = None,
    segments: Sequence[Sequence[int]] | None = None,
) -> Batch:
    """A batch of rows of ids.

    Args:
        rows: B rows of up to `context` ids.
        targets: an array [B, …], or a row of as many targets as ids for each row.
        segments: document of each token of each row; None: each row is one document.
    """
    T = bucket(max(map(len, rows)), context)
    if not isinstance(targets, np.ndarray):
        targets = padded(targets, IGNORED, T)
    if segments is None:
        segments = [[0] * len(row) for row in rows]
    return Batch(
        ids=torch.from_numpy(padded(rows, pad_id, T)),
        targets=torch.from_numpy(targets),
        samples=tuple(samples.tolist()),
        segments=torch.from_numpy(padded(segments, -1, T)),
        token_types=None if token_types is None else torch.from_numpy(padded(token_types, 0, T)),
    )


def check_cut(source: str, *, cut: int, examples: int, context: int, limit: float = CUT_LIMIT) -> None:
    """Refuses data whose replies the context cuts: a model would learn to stop anywhere, with a loss that looks fine.

    Args:
        source: what the examples came from, for the message.
        cut: examples whose reply, or target, lost tokens, those dropped for it included.

    Raises:
        UserError: more than `limit` of the examples, or all of them.
    """
    if cut and (cut == examples or cut > limit * examples):
        which = "every reply is" if cut == examples else f"{cut} of {examples} replies are"
        raise UserError(
            f"{source}: {which} cut by the context of {context} tokens; "
            "take a model with a longer context (--model.context), or shorten the examples"
        )


def check_rows(source: str, data: TaskData, rows: int) -> None:
    """Raises `UserError` where there are fewer examples than a batch has rows."""
    if len(data) < rows:
        raise UserError(
            f"{source}: {len(data)} examples are fewer than one batch of {rows}; "
            f"give more, or lower --train.batch to {max(1, len(data))} or less"
        )


def source_of(records: Sequence[Record]) -> str:
    """The file that records came from, without the line."""
    return re.split(r":\d+", records[0].where)[0] if records else "the data"

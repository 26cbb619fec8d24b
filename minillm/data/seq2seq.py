"""A text to write for a text: what `seq2seq` learns from, `{"source", "target"}`.

    encoder-decoder   source  document_id, source, end_id          ids  document_id, target      targets  target, end_id
    an imported BART  source  <s>, source, </s>       ids  </s>, <s>, target      targets  <s>, target, </s>
    decoder           ids     document_id, source, end_id, target  targets  the next token, on the target and its end_id

B rows, S source tokens, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from minillm.config import UserError
from minillm.data.batch import IGNORED, Batch
from minillm.data.records import Record
from minillm.data.tasks import CUT_LIMIT, TaskTokenizer, bucket, check_cut, encode, padded, source_of, text_batch


@dataclass(frozen=True)
class PairExample:
    record: Record
    source: str
    target: str | None


def read_pairs(records: Sequence[Record], *, labelled: bool = True) -> list[PairExample]:
    """Raises `UserError`, with the record's place, for wrong columns and empty texts. Without `labelled`, targets are
    neither asked for nor read."""
    return [_example(record, labelled) for record in records]


def _example(record: Record, labelled: bool) -> PairExample:
    record.require(("source", "target") if labelled else ("source",), "seq2seq")
    return PairExample(record, record.text("source"), record.text("target") if labelled else None)


@dataclass(frozen=True)
class Sides:
    """The ids around both texts of an encoder-decoder."""

    start: Sequence[int]
    """What its decoder begins to write with."""
    before: Sequence[int]
    """Stands before a source, and behind `start` where that is one id and another one."""
    behind: Sequence[int]
    """Stands behind a source."""

    @property
    def opening(self) -> list[int]:
        """What stands before a target in the decoder's row; all but the first of it are targets too."""
        there = len(self.start) > 1 or list(self.start) == list(self.before)
        return [*self.start] if there else [*self.start, *self.before]


class PairData:
    """Rows of source and target; a `TaskData`.

    A target has at most half of a decoder's row, and the source what is left of it; what does not fit is cut from the
    end. In an encoder-decoder each has `context` tokens to itself.

    Args:
        examples: with targets.
        sides: of an encoder-decoder; None: a decoder, which reads both in one row.
        cut_limit: see `check_cut`.

    Raises:
        UserError: the context cuts more targets than `cut_limit`.
    """

    dropped = 0

    def __init__(
        self,
        examples: Sequence[PairExample],
        tokenizer: TaskTokenizer,
        *,
        context: int,
        sides: Sides | None,
        cut_limit: float = CUT_LIMIT,
    ):
        if context < 6:
            raise UserError(f"a context of {context} leaves no room for two texts; take a model with a longer one")
        self.examples, self.context, self.sides = list(examples), context, sides
        self.pad_id = tokenizer.pad_id
        self.sources: list[list[int]] = []
        """What the model is given of each example: the encoder's tokens, or a decoder's prompt."""
        self.targets: list[list[int]] = []
        """What it should go on with, `end_id` included."""
        self.lost: list[int] = []
        """Tokens of each example's source that do not fit."""
        self.truncated = self.cut = 0
        for example in self.examples:
            self._add(example, tokenizer)
        check_cut(
            source_of([example.record for example in self.examples]),
            cut=self.cut,
            examples=len(self.examples),
            context=context,
            limit=cut_limit,
        )

    def _add(self, example: PairExample, tokenizer: TaskTokenizer) -> None:
        source = encode(tokenizer, example.record, example.source)
        target = (
            [] if example.target is None else [*encode(tokenizer, example.record, example.target), tokenizer.end_id]
        )
        before: Sequence[int] = [tokenizer.document_id]
        behind: Sequence[int] = [tokenizer.end_id]
        if self.sides is not None:
            before, behind = self.sides.before, self.sides.behind
            target = target and [*self.sides.opening[1:], *target]
            room, target_room = self.context - len(before) - len(behind), self.context
        else:  # the last token of a row is a target alone, so a row of ids and targets holds one more
            target_room = max(self.context + 1 - 2 - len(source), self.context // 2)
            room = self.context + 1 - 2 - min(len(target) or self.context // 2, target_room)
        self.cut += len(target) > target_room
        self.truncated += len(source) > room or len(target) > target_room
        self.lost.append(max(0, len(source) - room))
        self.sources.append([*before, *source[:room], *behind])
        self.targets.append(target[:target_room])

    def __len__(self) -> int:
        return len(self.sources)

    def batch(self, indices: np.ndarray, samples: np.ndarray) -> Batch:
        sources, targets = [self.sources[i] for i in indices], [self.targets[i] for i in indices]
        common = {"samples": samples, "pad_id": self.pad_id, "context": self.context}
        if self.sides is None:
            rows = [(source + target)[:-1] for source, target in zip(sources, targets, strict=True)]
            learnt = [[IGNORED] * (len(s) - 1) + t for s, t in zip(sources, targets, strict=True)]
            return text_batch(rows, learnt, **common)
        batch = text_batch([[self.sides.start[0], *target[:-1]] for target in targets], targets, **common)
        S = bucket(max(map(len, sources)), self.context)
        return replace(
            batch,
            source=torch.from_numpy(padded(sources, self.pad_id, S)),
            source_segments=torch.from_numpy(padded([[0] * len(source) for source in sources], -1, S)),
        )

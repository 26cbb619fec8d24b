"""A better and a worse reply to the same prompt: what `preference` learns from, `{"prompt", "chosen", "rejected"}`.

Each example gives two rows, side by side: row 2i of a batch is the chosen reply, row 2i + 1 the rejected one, so that a
loss pairs them by `[0::2]` and `[1::2]`. Micro-batches must have an even number of rows.

B examples, 2B rows, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minillm.config import UserError
from minillm.data.batch import IGNORED, Batch
from minillm.data.chat import EncodeChat, encode_conversation, prompt_messages
from minillm.data.records import Record
from minillm.data.tasks import CUT_LIMIT, check_cut, source_of, text_batch


@dataclass(frozen=True)
class PreferenceExample:
    record: Record
    prompt: tuple[Mapping[str, str], ...]
    chosen: str
    rejected: str


def read_preferences(records: Sequence[Record]) -> list[PreferenceExample]:
    """Raises `UserError`, with the record's place, for wrong columns and empty texts. A prompt may be a text, which the
    user says, or a list of messages."""
    return [_example(record) for record in records]


def _example(record: Record) -> PreferenceExample:
    record.require(("prompt", "chosen", "rejected"), "preference")
    prompt = tuple(prompt_messages(record))
    return PreferenceExample(record, prompt, record.text("chosen"), record.text("rejected"))


class PreferenceData:
    """Pairs of rows; a `TaskData` whose batches have two rows for each index.

    Pairs of equal replies prefer nothing: they are dropped and counted, as are those of which a reply is cut off whole.

    Raises:
        UserError: the context cuts a reply of more than `cut_limit` of the pairs; or no pair is left.
    """

    def __init__(
        self,
        examples: Sequence[PreferenceExample],
        encode: EncodeChat,
        *,
        pad_id: int,
        context: int,
        cut_limit: float = CUT_LIMIT,
    ):
        self.examples, self.pad_id, self.context = list(examples), pad_id, context
        self.truncated = self.dropped = 0
        self.rows: list[tuple[list[int], list[int]]] = []
        """(ids, targets): the chosen and the rejected reply of each pair, in turn."""
        for example in self.examples:
            self._add(example, encode)
        source = source_of([example.record for example in self.examples])
        check_cut(source, cut=self.truncated, examples=len(self.examples), context=context, limit=cut_limit)
        if not self.rows:
            raise UserError(f"{source}: chosen and rejected are equal in every pair; give replies that differ")

    def _add(self, example: PreferenceExample, encode: EncodeChat) -> None:
        kept, pair, cut = self.context + 1, [], False
        for reply in (example.chosen, example.rejected):
            messages = [*example.prompt, {"role": "assistant", "content": reply}]
            ids, mask = encode_conversation(example.record, messages, encode)
            last_turn = len(mask) - 1 - mask[::-1].index(0)  # the header before the reply; earlier replies are prompt
            cut |= len(ids) > kept
            learnt = [i if at > last_turn else IGNORED for at, i in enumerate(ids)][1:kept]
            pair.append((ids[:kept][:-1], learnt))
        self.truncated += cut
        whole = all(any(target != IGNORED for target in targets) for _, targets in pair)
        if whole and pair[0] != pair[1]:
            self.rows += pair
        else:
            self.dropped += 1

    def __len__(self) -> int:
        """Pairs."""
        return len(self.rows) // 2

    def batch(self, indices: np.ndarray, samples: np.ndarray) -> Batch:
        """indices, samples [B] pairs -> 2B rows"""
        rows = [self.rows[2 * i + side] for i in indices for side in (0, 1)]
        return text_batch(
            [ids for ids, _ in rows],
            [targets for _, targets in rows],
            np.repeat(samples, 2),
            pad_id=self.pad_id,
            context=self.context,
        )

"""Conversations: what `chat` learns from. Only the replies, and the end of each, are targets.

    {"messages": [{"role": "system" | "user" | "assistant", "content": …}, …]}
    {"instruction": …, "input": …, "output": …}      one question, `instruction` and below it `input`, and its answer

Several conversations share a row where they fit, each a segment of its own: no one sees another, and positions begin
anew. The template is not here: `encode` is `tokenizer.chat.encode_chat`, with the tokenizer filled in.

B rows, T tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minillm.data.batch import IGNORED, Batch
from minillm.data.records import Record
from minillm.data.tasks import CUT_LIMIT, check_cut, source_of, text_batch

EncodeChat = Callable[[Sequence[Mapping[str, str]]], tuple[list[int], list[int]]]
"""messages -> (ids, 1 where an id is a target and 0 elsewhere)"""


@dataclass(frozen=True)
class ChatExample:
    record: Record
    messages: tuple[Mapping[str, str], ...]


def read_chat(records: Sequence[Record], *, labelled: bool = True) -> list[ChatExample]:
    """Raises `UserError`, with the record's place, for wrong columns, empty messages, and, with `labelled`, a
    conversation without a reply. Without it, an "output" is neither asked for nor read, and {"prompt"}, as `preference`
    has it, is a conversation too."""
    return [_example(record, labelled) for record in records]


def _example(record: Record, labelled: bool) -> ChatExample:
    if "messages" in record.fields:
        messages = _messages(record, "messages")
    elif "instruction" in record.fields or "output" in record.fields:
        record.require(("instruction", "output") if labelled else ("instruction",), "chat")
        question = record.text("instruction")
        if record.fields.get("input") is not None:
            question += "\n" * bool(record.text("input", may_be_empty=True).strip()) + record.fields["input"].strip()
        messages = [{"role": "user", "content": question}]
        if labelled:
            messages.append({"role": "assistant", "content": record.text("output")})
    elif "prompt" in record.fields and not labelled:
        messages = prompt_messages(record)
    else:
        there = ", ".join(map(repr, record.fields)) or "nothing"
        record.fail(f"has neither 'messages' nor 'instruction' and 'output', only {there}: rename the columns")
    if labelled and not any(message["role"] == "assistant" for message in messages):
        record.fail("has no message of the assistant, so nothing to learn; give a reply, or delete the record")
    return ChatExample(record, tuple(messages))


def prompt_messages(record: Record) -> list[Mapping[str, str]]:
    """What "prompt" says: a text, which the user says, or a list of messages."""
    if isinstance(record.fields["prompt"], list):
        return _messages(record, "prompt")
    return [{"role": "user", "content": record.text("prompt")}]


def _messages(record: Record, key: str) -> list[Mapping[str, str]]:
    messages = record.fields[key]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        record.fail(f'"{key}" is no list of objects; give [{{"role": …, "content": …}}, …]')
    for number, message in enumerate(messages):
        if missing := {"role", "content"} - message.keys():
            record.fail(f"message {number} has no {' and no '.join(sorted(map(repr, missing)))}; give both")
        if isinstance(message["content"], str):
            record.checked(message["content"], f"content of message {number}")
    return messages


def encode_conversation(example_record: Record, messages: Sequence[Mapping[str, str]], encode: EncodeChat):
    """(ids, mask); roles out of turn and the like become a `UserError` with the record's place."""
    try:
        return encode(messages)
    except ValueError as error:
        example_record.fail(str(error))


class ChatData:
    """Rows of one or more conversations; a `TaskData`.

    A conversation that is too long loses its end; one that loses every reply with it gives no row.

    Args:
        pack: put several conversations into a row; else each has its own.
        cut_limit: see `check_cut`.

    Raises:
        UserError: the context cuts the replies of more than `cut_limit` of the conversations, or of all.
    """

    def __init__(
        self,
        examples: Sequence[ChatExample],
        encode: EncodeChat,
        *,
        pad_id: int,
        context: int,
        pack: bool = True,
        cut_limit: float = CUT_LIMIT,
    ):
        self.examples, self.pad_id, self.context = list(examples), pad_id, context
        self.truncated = self.dropped = 0
        self.ids: list[list[int]] = []
        """Of each conversation that is left, without its last token."""
        self.targets: list[list[int]] = []
        for example in self.examples:
            self._add(*encode_conversation(example.record, example.messages, encode))
        check_cut(
            source_of([example.record for example in self.examples]),
            cut=self.truncated,
            examples=len(self.examples),
            context=context,
            limit=cut_limit,
        )
        lengths = [len(ids) for ids in self.ids]
        self.packs = pack_rows(lengths, context) if pack else [[i] for i in range(len(lengths))]
        """Of each row its conversations."""

    def _add(self, ids: list[int], mask: list[int]) -> None:
        kept = self.context + 1
        self.truncated += sum(mask[1:kept]) < sum(mask[1:])
        if not any(mask[1:kept]):
            self.dropped += 1
            return
        self.ids.append(ids[:kept][:-1])
        self.targets.append([i if learn else IGNORED for i, learn in zip(ids[1:kept], mask[1:kept], strict=True)])

    def __len__(self) -> int:
        return len(self.packs)

    def batch(self, indices: np.ndarray, samples: np.ndarray) -> Batch:
        packs = [self.packs[i] for i in indices]
        return text_batch(
            [[token for i in pack for token in self.ids[i]] for pack in packs],
            [[target for i in pack for target in self.targets[i]] for pack in packs],
            samples,
            pad_id=self.pad_id,
            context=self.context,
            segments=[[number for number, i in enumerate(pack) for _ in self.ids[i]] for pack in packs],
        )


def pack_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which sequences share a row of `room` tokens: the longest first, each into the fullest row that it fits
    (best-fit decreasing: at most 11/9 of the fewest rows possible, Johnson 1973)."""
    rows: list[list[int]] = []
    with_space: dict[int, list[int]] = defaultdict(list)  # space left -> rows
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        space = next((space for space in range(lengths[i], room) if with_space[space]), None)
        if space is None:
            space = room
            rows.append([])
            with_space[room].append(len(rows) - 1)
        row = with_space[space].pop()
        rows[row].append(i)
        with_space[space - lengths[i]].append(row)
    return rows

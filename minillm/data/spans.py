"""Questions about a context, answered by a stretch of it: what `span-qa` learns from (Rajpurkar et al. 2016, 2018).

    SQuAD     {"data": [{"paragraphs": [{"context", "qas": [Q, …]}]}]},
              Q = {"id", "question", "answers": [{"text", "answer_start"}, …]}
    records   Q with its "context"; no answers, or "is_impossible": unanswerable

A context that does not fit is read in overlapping windows, a row each: `document_id, question, end_id, window, end_id`.
The target is (first, last) token of the answer, or (0, 0) where the window does not hold the whole of it. At prediction

    answer = argmax of start[first] + end[last] over all windows and first ≤ last
    null   = min of start[0] + end[0] over the windows

B rows, T tokens.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm.config import UserError
from minillm.data.batch import IGNORED, Batch
from minillm.data.offsets import encode_with_offsets
from minillm.data.records import Record, parse_json, read_records, read_text
from minillm.data.tasks import TaskTokenizer, encode, text_batch

LONGEST_ANSWER = 30
"""Tokens of an answer at prediction, as in BERT's run_squad."""


@dataclass(frozen=True)
class SpanExample:
    record: Record
    key: str
    """SQuAD's id of the question."""
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    """(text, its first character in the context); none where the context does not answer the question."""


@dataclass(frozen=True)
class Answer:
    """What a model takes from the context."""

    text: str
    score: float
    """start + end of the best span."""
    null: float
    """start + end of "no answer"; where `score` exceeds it by a threshold or more, the answer is given."""


def read_spans(path: str | Path, *, labelled: bool = True) -> list[SpanExample]:
    """The questions of a file in SQuAD's format, or of .jsonl or .json records.

    Without `labelled`, answers are neither asked for nor read.

    Raises:
        UserError: with the line and the question's id, for missing keys, empty texts, and an answer that does not
            stand in its context at its place.
    """
    if str(path).lower().endswith(".json"):
        text = read_text(path)
        parsed = parse_json(str(path), text)
        if isinstance(parsed, dict):
            examples = [_example(record, labelled) for record in _squad(str(path), text, parsed)]
            if not examples:
                raise UserError(f"{path} holds no question; give a file with examples")
            return examples
    return span_examples(read_records(path), labelled=labelled)


def span_examples(records: Sequence[Record], *, labelled: bool = True) -> list[SpanExample]:
    """Examples out of records. Raises as `read_spans`."""
    return [_example(record, labelled) for record in records]


def _squad(name: str, text: str, parsed: dict[str, Any]) -> Iterator[Record]:
    if not isinstance(parsed.get("data"), list):
        raise UserError(f'{name}:1: has no list "data"; give SQuAD\'s format, or an array of objects')
    line, at = 1, 0
    for article in parsed["data"]:
        for paragraph in _list(name, article, "paragraphs"):
            for question in _list(name, paragraph, "qas"):
                if not isinstance(question, dict):
                    raise UserError(f'{name}: a question in "qas" is no object; give SQuAD\'s format')
                place = _place(text, question, at)
                line, at = line + text.count("\n", at, place), place
                where = f"{name}:{line}: question {question.get('id', question.get('question'))!r}"
                yield Record(where, {**question, "context": paragraph.get("context")})


def _list(name: str, parent: Any, key: str) -> list[Any]:
    if not isinstance(parent, dict) or not isinstance(parent.get(key), list):
        raise UserError(f'{name}: an element lacks its list "{key}"; give SQuAD\'s format')
    return parent[key]


def _place(text: str, question: dict[str, Any], begin: int) -> int:
    """Where the question stands, at its id or at its own text; from `begin` on, where the one before it stands: time
    that grows with the square of the file is 17 seconds for 16,000 questions."""
    for value in (question.get("id"), question.get("question")):
        if isinstance(value, str):
            place = text.find(json.dumps(value, ensure_ascii=text.isascii()), begin)
            if place >= 0:
                return place
    return begin


def _example(record: Record, labelled: bool) -> SpanExample:
    record.require(("question", "context", "answers") if labelled else ("question", "context"), "question answering")
    question, context = record.text("question"), record.text("context")
    key = str(record.fields.get("id", record.where))
    answers = () if not labelled or record.fields.get("is_impossible") else tuple(_answers(record, context))
    return SpanExample(record, key, question, context, answers)


def _answers(record: Record, context: str) -> Iterator[tuple[str, int]]:
    answers = record.fields["answers"]
    if isinstance(answers, dict) and isinstance(answers.get("text"), list):  # as `datasets` writes them
        starts = answers.get("answer_start")
        if not isinstance(starts, list) or len(starts) != len(answers["text"]):
            record.fail("has not as many answer_start as answers; give each text its place")
        answers = [{"text": t, "answer_start": s} for t, s in zip(answers["text"], starts, strict=True)]
    if not isinstance(answers, list):
        record.fail('"answers" is no list; give [{"text": …, "answer_start": …}], or [] for an unanswerable question')
    for answer in answers:
        text, start = (answer.get("text"), answer.get("answer_start")) if isinstance(answer, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool):
            record.fail('an answer lacks "text", or "answer_start" as a whole number; give both')
        record.checked(text, "answer")
        if start < 0 or context[start : start + len(text)] != text:
            elsewhere = context.find(text)
            hint = f"it stands at {elsewhere}" if elsewhere >= 0 else "nor anywhere else: copy it letter by letter"
            record.fail(f"the answer {text[:40]!r} is not in its context at answer_start {start}; {hint}")
        yield text, start


class SpanData:
    """Rows of question and window; a `TaskData`. Targets [B, 2]: first and last token of the first answer given.

    Args:
        overlap: tokens that two windows of a context share; None: a third of a window. An answer is whole in one of
            them where it is no longer than that.
        labelled: whether the answers are targets; without, targets are IGNORED.
        token_types: whether the model tells question (0) from context (1).
    """

    dropped = 0

    def __init__(
        self,
        examples: Sequence[SpanExample],
        tokenizer: TaskTokenizer,
        *,
        context: int,
        overlap: int | None = None,
        labelled: bool = True,
        token_types: bool = False,
    ):
        if context < 12:
            raise UserError(f"a context of {context} leaves no room for question and text; take a longer one")
        self.examples, self.context, self.pad_id = list(examples), context, tokenizer.pad_id
        self.overlap, self.labelled, self.token_types = overlap, labelled, token_types
        self.rows: list[list[int]] = []
        self.targets: list[tuple[int, int]] = []
        self.example_of: list[int] = []
        """Of each row its example."""
        self.offsets: list[np.ndarray] = []
        """Of each row [window, 2] characters of the context for each token of the window."""
        self.begins: list[int] = []
        """Of each row where in it the window begins."""
        self.lost: list[int] = []
        """Tokens of each question that do not fit: it has half of a row."""
        self.unheld: list[bool] = []
        """Of each question whether no window holds its answer whole: it is learnt as unanswerable in every window."""
        for number, example in enumerate(self.examples):
            self._add(number, example, tokenizer)

    def _add(self, number: int, example: SpanExample, tokenizer: TaskTokenizer) -> None:
        question = encode(tokenizer, example.record, example.question)
        ids, offsets = encode_with_offsets(tokenizer, example.record, example.context)
        longest = (self.context - 3) // 2
        self.lost.append(max(0, len(question) - longest))
        head = [tokenizer.document_id, *question[:longest], tokenizer.end_id]
        room = self.context - len(head) - 1
        overlap = min(room // 3 if self.overlap is None else self.overlap, room - 1)
        answer = _tokens(offsets, example.answers[0]) if example.answers else None
        found = answer is None
        for begin in range(0, max(1, len(ids) - overlap), room - overlap):
            end = min(begin + room, len(ids))
            self.rows.append([*head, *ids[begin:end], tokenizer.end_id])
            self.offsets.append(offsets[begin:end])
            self.begins.append(len(head))
            self.example_of.append(number)
            inside = answer is not None and begin <= answer[0] and answer[1] < end
            shift = len(head) - begin
            self.targets.append((answer[0] + shift, answer[1] + shift) if inside else (0, 0))
            found |= inside
        self.unheld.append(not found)

    @property
    def truncated(self) -> int:
        return sum(lost > 0 or unheld for lost, unheld in zip(self.lost, self.unheld, strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: np.ndarray, samples: np.ndarray) -> Batch:
        rows = [self.rows[i] for i in indices]
        targets = np.array([self.targets[i] for i in indices], np.int64)
        types = (
            [[0] * self.begins[i] + [1] * (len(self.rows[i]) - self.begins[i]) for i in indices]
            if self.token_types
            else None
        )
        return text_batch(
            rows,
            targets if self.labelled else np.full_like(targets, IGNORED),
            samples,
            pad_id=self.pad_id,
            context=self.context,
            token_types=types,
        )

    def answers(self, starts: Sequence[np.ndarray], ends: Sequence[np.ndarray]) -> list[Answer]:
        """The best answer to each question, over all its windows.

        Args:
            starts, ends: for each row, in their order, [T] the score of each place as first and as last token.
        """
        best = [Answer("", -np.inf, np.inf)] * len(self.examples)
        for row, number in enumerate(self.example_of):
            first, last, score = self._best(row, starts[row], ends[row])
            null = min(best[number].null, float(starts[row][0] + ends[row][0]))
            text = best[number].text
            if score > best[number].score:
                text = self.examples[number].context[self.offsets[row][first, 0] : self.offsets[row][last, 1]].strip()
            best[number] = Answer(text, max(score, best[number].score), null)
        return best

    def _best(self, row: int, start: np.ndarray, end: np.ndarray) -> tuple[int, int, float]:
        """(first, last, score) of the best span inside the window, counted from its beginning."""
        n, begin = len(self.offsets[row]), self.begins[row]
        scores = start[begin : begin + n, None] + end[None, begin : begin + n]
        scores = np.where(
            np.triu(np.ones((n, n), bool)) & ~np.triu(np.ones((n, n), bool), LONGEST_ANSWER), scores, -np.inf
        )
        first, last = np.unravel_index(np.argmax(scores), scores.shape)
        return int(first), int(last), float(scores[first, last])


def _tokens(offsets: np.ndarray, answer: tuple[str, int]) -> tuple[int, int]:
    """First and last token that reach into the answer."""
    text, start = answer
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], start + len(text), side="left")) - 1
    return first, max(first, last)

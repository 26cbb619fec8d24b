"""Words with tags: what `tag` learns from. A word that the tokenizer splits keeps one tag, on its first piece.

    CoNLL     a line for each word: the word first, its tag last, columns parted by tabs or spaces; a line of nothing
              but white space ends a sentence, and one that begins with -DOCSTART- parts documents
    records   {"tokens": […], "tags": […]}

A sentence longer than the context gives several rows, cut between words, so that no tag is lost.
B rows, T tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from minillm.config import UserError
from minillm.data.batch import IGNORED, Batch
from minillm.data.labels import Labels
from minillm.data.offsets import encode_with_offsets
from minillm.data.records import Record, numbered_lines, read_records, read_text
from minillm.data.tasks import TaskTokenizer, source_of, text_batch

_BLANKS = re.compile(r"[ \t]+")
_PREFIXED = re.compile(r"([BIESLU]-)(.+)", re.DOTALL)


@dataclass(frozen=True)
class TagExample:
    record: Record
    words: tuple[str, ...]
    tags: tuple[str, ...] | None


def read_tags(path: str | Path, *, labelled: bool = True) -> list[TagExample]:
    """The sentences of a file: .jsonl and .json hold records, everything else is CoNLL.

    Without `labelled`, a .txt has a sentence a line, its words parted by white space; CoNLL needs no tags, and records
    "tokens" or "text".

    Raises:
        UserError: with the line, for a word without a tag or a tag without a word, as many columns as no other line
            has, an empty word, lists of different lengths.
    """
    ending = str(path).lower().removesuffix(".gz")
    if ending.endswith((".jsonl", ".json")) or (ending.endswith(".txt") and not labelled):
        return tag_examples(read_records(path), labelled=labelled)
    examples = _conll(str(path), read_text(path), labelled)
    if not examples:
        raise UserError(f"{path} holds no sentence; give lines of a word, a tab and its tag")
    return examples


def tag_examples(records: Sequence[Record], *, labelled: bool = True) -> list[TagExample]:
    """Examples out of records. Raises as `read_tags`."""
    return [_example(record, labelled) for record in records]


def _example(record: Record, labelled: bool) -> TagExample:
    if not labelled and "tokens" not in record.fields and "text" in record.fields:
        return TagExample(record, tuple(record.text("text").split()), None)
    record.require(("tokens", "tags") if labelled else ("tokens",), "tagging")
    words = _strings(record, "tokens")
    tags = _strings(record, "tags") if labelled else None
    if tags is not None and len(tags) != len(words):
        record.fail(f"has {len(words)} tokens but {len(tags)} tags; give each token one")
    return TagExample(record, words, tags)


def _strings(record: Record, key: str) -> tuple[str, ...]:
    values = record.fields[key]
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        record.fail(f"{key!r} is no list of strings with one or more of them; give the words of a sentence")
    return tuple(record.checked(value, key) for value in values)


def _conll(name: str, text: str, labelled: bool) -> list[TagExample]:
    examples: list[TagExample] = []
    columns: int | None = None
    words: list[str] = []
    tags: list[str] = []
    first = 0

    def close() -> None:
        if words:
            where = Record(f"{name}:{first}", {})
            for word in words:
                where.checked(word, "token")
            examples.append(TagExample(where, tuple(words), tuple(tags) if labelled else None))
            words.clear()
            tags.clear()

    for number, line in numbered_lines(text):
        if not line.strip() or line.startswith("-DOCSTART-"):
            close()
            continue
        fields = line.split("\t") if "\t" in line else _BLANKS.split(line.strip(" "))
        fields = [field.strip() for field in fields]
        columns = columns or max(1 + labelled, len(fields))
        if len(fields) != columns or not fields[0] or not fields[-1]:
            found = len([field for field in fields if field])
            raise UserError(
                f"{name}:{number}: {line.strip()[:40]!r} has {found} of {columns} columns; "
                "write the word, a tab and its tag, and part sentences by an empty line"
            )
        first = first if words else number
        words.append(fields[0])
        tags.append(fields[-1])
    close()
    return examples


def tag_set(examples: Sequence[TagExample]) -> Labels:
    """The tags of training data, O first, then sorted; of each type with every prefix that occurs with any type.

    So an I-X that only the validation data has is known where B-X and I-Y were seen. Raises `UserError` where all tags
    are the same.
    """
    found = {tag for example in examples for tag in example.tags or ()}
    if len(found) < 2:
        source = source_of([example.record for example in examples])
        raise UserError(f"{source}: every tag is {next(iter(found), None)!r}; a tagger needs two tags or more")
    split = [parts for tag in found if len(parts := tag_parts(tag)) == 2]
    prefixes, types = {prefix for prefix, _ in split}, {kind for _, kind in split}
    found |= {prefix + kind for prefix in prefixes for kind in types}
    return Labels(tuple(sorted(found, key=lambda tag: (tag != "O", tag.partition("-")[::-1], tag))))


def tag_parts(tag: str) -> tuple[str, ...]:
    """("B-", "X") of B-X, and a tag without a prefix as it is."""
    match = _PREFIXED.fullmatch(tag)
    return match.groups() if match else (tag,)


class TagData:
    """Rows `document_id, pieces, end_id` with a target on the first piece of each word; a `TaskData`.

    The words are joined by spaces and encoded together, as a model has read text before.

    Args:
        labels: None to predict: then nothing is a target, and `first_pieces` says where to look.
    """

    dropped = 0

    def __init__(
        self, examples: Sequence[TagExample], labels: Labels | None, tokenizer: TaskTokenizer, *, context: int
    ):
        self.examples, self.labels = list(examples), labels
        self.context, self.pad_id = context, tokenizer.pad_id
        self.rows: list[list[int]] = []
        self.targets: list[list[int]] = []
        self.first_pieces: list[list[tuple[int, int]]] = []
        """Of each row (word of the example, place of its first piece in the row)."""
        self.example_of: list[int] = []
        """Of each row the example that it is a part of."""
        self.lost = [0] * len(self.examples)
        """Tokens of each example that do not fit: the ends of words longer than a row, which begins between two."""
        if context < 3:
            raise UserError(f"a context of {context} leaves no room for a word; take a model with a longer one")
        for number, example in enumerate(self.examples):
            self._add(number, example, tokenizer)

    def _add(self, number: int, example: TagExample, tokenizer: TaskTokenizer) -> None:
        ids, starts = _word_starts(example, tokenizer)
        targets = [IGNORED] * len(ids)
        if self.labels is not None and example.tags is not None:
            known = {tag: self.labels.index(tag, example.record) for tag in dict.fromkeys(example.tags)}
            for word, at in starts:
                targets[at] = known[example.tags[word]]
        # From each word's first piece to the next one's; what stands before the first word goes with it.
        ends = [at for _, at in starts[1:]] + [len(ids)]
        window, begin = [], 0
        for i, (word, at) in enumerate(starts):
            if window and ends[i] - begin > self.context - 2:
                self._close(number, ids, targets, window, begin, at, tokenizer)
                window, begin = [], at
            window.append((word, at))
        self._close(number, ids, targets, window, begin, len(ids), tokenizer)

    def _close(self, number: int, ids, targets, window, begin: int, end: int, tokenizer: TaskTokenizer) -> None:
        cut = min(end, begin + self.context - 2)
        self.lost[number] += end - cut
        self.rows.append([tokenizer.document_id, *ids[begin:cut], tokenizer.end_id])
        self.targets.append([IGNORED, *targets[begin:cut], IGNORED])
        self.first_pieces.append([(word, at - begin + 1) for word, at in window if at < cut])
        self.example_of.append(number)

    @property
    def truncated(self) -> int:
        return sum(lost > 0 for lost in self.lost)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: np.ndarray, samples: np.ndarray) -> Batch:
        rows, targets = [self.rows[i] for i in indices], [self.targets[i] for i in indices]
        return text_batch(rows, targets, samples, pad_id=self.pad_id, context=self.context)

    def untagged(self) -> list[list[int]]:
        """Of each example the words that have no piece of their own, since the tokenizer drops their characters."""
        words = [set(range(len(example.words))) for example in self.examples]
        for row, number in enumerate(self.example_of):
            words[number] -= {word for word, _ in self.first_pieces[row]}
        return [sorted(of_example) for of_example in words]

    def tags(self, predictions: Sequence[np.ndarray], labels: Labels) -> list[list[str]]:
        """The tag of every word of every example.

        A word that has no piece (see `untagged`) is O, or the first label.

        Args:
            predictions: for each row, in their order, [T] the label at each place.
        """
        default = "O" if "O" in labels.names else labels.names[0]
        found = [[default] * len(example.words) for example in self.examples]
        for row, predicted in enumerate(predictions):
            for word, at in self.first_pieces[row]:
                found[self.example_of[row]][word] = labels.names[int(predicted[at])]
        return found


def _word_starts(example: TagExample, tokenizer: TaskTokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """(ids of the sentence, [(word, its first piece)]), in order."""
    ids, offsets = encode_with_offsets(tokenizer, example.record, " ".join(example.words))
    ends = np.cumsum([len(word) + 1 for word in example.words]) - 1  # character behind each word
    begins = np.concatenate([[0], ends[:-1] + 1])
    # The first token that reaches beyond the word's first character: one that begins with the space before is it too.
    pieces = np.searchsorted(offsets[:, 1], begins, side="right")
    starts = [(word, int(at)) for word, at in enumerate(pieces) if at < len(ids) and offsets[at, 0] < ends[word]]
    kept = starts[:1] + [after for before, after in pairwise(starts) if after[1] > before[1]]
    return ids, kept

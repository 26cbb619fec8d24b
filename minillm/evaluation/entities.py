"""Entity F1 as the CoNLL shared tasks' conlleval counts it, and seqeval after it (Tjong Kim Sang and Buchholz 2000).

    precision = right / predicted     recall = right / true     F1 = 2 right / (predicted + true)

An entity is right where its type, its first and its last word all are. Tags are B-X, I-X and O (IOB1 or IOB2); E, L
(last), S, U (single) of IOBES and BILOU are understood too, and mean what they mean in conlleval:

    begins   at B, S, U; at I, E, L after O, after E, L, S, U, and after another type
    ends     behind E, L, S, U; before B, S, U, O; before another type
"""

from collections import Counter
from collections.abc import Sequence

_ENDING, _BEGINNING = frozenset("ELSU"), frozenset("BSU")


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, word behind the last) of each entity of a sentence, in order.

    A tag without a prefix, as parts of speech are, counts as an I: equal neighbours are one entity.
    """
    found, start, last_prefix, last_kind = [], None, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, kind = _split(tag)
        goes_on = start is not None and prefix not in _BEGINNING | {"O"} and kind == last_kind
        goes_on &= last_prefix not in _ENDING
        if start is not None and not goes_on:
            found.append((last_kind, start, place))
            start = None
        if start is None and prefix != "O":
            start = place
        last_prefix, last_kind = prefix, kind
    return found


def _split(tag: str) -> tuple[str, str]:
    if tag == "O":
        return "O", ""
    prefix, dash, kind = tag.partition("-")
    if not dash and tag in _ENDING | {"B", "I"}:  # chunks without a type
        return tag, ""
    return (prefix, kind) if dash and prefix in _ENDING | {"B", "I"} else ("I", tag)


def entity_scores(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """entity_f1, entity_precision, entity_recall over all sentences, macro_f1 (over the types that occur), and
    accuracy (words with the right tag); 0 where there is nothing to divide by.

    Raises ValueError for sentences of different lengths, or none at all.
    """
    _check(truth, predicted)
    right, proposed, wanted = _count(truth, predicted)
    kinds = proposed.keys() | wanted.keys()
    each = [_ratio(2 * right[kind], proposed[kind] + wanted[kind]) for kind in kinds]
    words = [a == b for x, y in zip(truth, predicted, strict=True) for a, b in zip(x, y, strict=True)]
    return {
        "entity_f1": _ratio(2 * right.total(), proposed.total() + wanted.total()),
        "entity_precision": _ratio(right.total(), proposed.total()),
        "entity_recall": _ratio(right.total(), wanted.total()),
        "macro_f1": _ratio(sum(each), len(each)),
        "accuracy": _ratio(sum(words), len(words)),
    }


def entity_scores_by_type(
    truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Of each type, sorted: precision, recall, f1 and support (true entities). Raises as `entity_scores`."""
    _check(truth, predicted)
    right, proposed, wanted = _count(truth, predicted)
    return {
        kind: {
            "precision": _ratio(right[kind], proposed[kind]),
            "recall": _ratio(right[kind], wanted[kind]),
            "f1": _ratio(2 * right[kind], proposed[kind] + wanted[kind]),
            "support": wanted[kind],
        }
        for kind in sorted(proposed.keys() | wanted.keys())
    }


def _count(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> tuple[Counter, Counter, Counter]:
    """Entities of each type: (right, predicted, true)."""
    right, proposed, wanted = Counter(), Counter(), Counter()
    for true_tags, predicted_tags in zip(truth, predicted, strict=True):
        true, found = set(entities(true_tags)), set(entities(predicted_tags))
        right.update(kind for kind, _, _ in true & found)
        proposed.update(kind for kind, _, _ in found)
        wanted.update(kind for kind, _, _ in true)
    return right, proposed, wanted


def _check(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> None:
    if [len(tags) for tags in truth] != [len(tags) for tags in predicted]:
        raise ValueError("truth and predictions differ in their sentences or words; give one tag for each word of each")
    if not truth:
        raise ValueError("there is nothing to score; give one sentence or more")


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0

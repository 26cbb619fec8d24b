"""Entities against conlleval's published rules, written here as its two tables, and against counts made by hand."""

import random

import pytest

from minillm.evaluation.entities import entities, entity_scores, entity_scores_by_type


def by_the_tables(tags: list[str]) -> list[tuple[str, int, int]]:
    """startOfChunk and endOfChunk of conlleval (with S beside them, as in seqeval), pair by pair."""
    starts = {"BB", "IB", "OB", "EE", "EI", "OE", "OI", "SE", "SI"}
    ends = {"BB", "BO", "IB", "IO", "BS", "IS"}
    found, begin, before, kind_before = [], 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        pair = before + prefix
        if pair in ends or before in "ES" or (before != "O" and kind_before != kind):
            found.append((kind_before, begin, place))
        if pair in starts or prefix in "BS" or (prefix != "O" and kind_before != kind):
            begin = place
        before, kind_before = prefix, kind
    return found


def test_random_tags_give_the_chunks_of_the_tables() -> None:
    generator = random.Random(1)
    tags = ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("X", "Y"))]
    for _ in range(2000):
        sentence = generator.choices(tags, k=generator.randrange(9))
        assert entities(sentence) == by_the_tables(sentence), sentence


@pytest.mark.parametrize(
    "tags, expected",
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("I-PER I-PER B-PER", [("PER", 0, 2), ("PER", 2, 3)]),  # IOB1: B only parts neighbours
        ("B-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),  # another type begins another entity
        ("O I-ORG", [("ORG", 1, 2)]),
        ("B-PER L-PER U-LOC", [("PER", 0, 2), ("LOC", 2, 3)]),
        ("B-NAME-FIRST I-NAME-FIRST", [("NAME-FIRST", 0, 2)]),
        ("NOUN NOUN VERB", [("NOUN", 0, 2), ("VERB", 2, 3)]),
        ("NP-SBJ NP-SBJ", [("NP-SBJ", 0, 2)]),  # a dash alone makes no prefix
        ("B I O B", [("", 0, 2), ("", 3, 4)]),
        ("", []),
    ],
)
def test_entities_by_hand(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == expected


def test_scores_by_hand() -> None:
    """True: PER, LOC | ORG. Predicted: PER, LOC too short | ORG, PER. Two of four and two of three are right."""
    truth = [["B-PER", "I-PER", "O", "B-LOC", "I-LOC"], ["B-ORG", "O", "O"]]
    predicted = [["B-PER", "I-PER", "O", "B-LOC", "O"], ["B-ORG", "O", "B-PER"]]
    scores = entity_scores(truth, predicted)
    assert scores["entity_precision"] == pytest.approx(2 / 4)
    assert scores["entity_recall"] == pytest.approx(2 / 3)
    assert scores["entity_f1"] == pytest.approx(4 / 7)
    assert scores["accuracy"] == pytest.approx(6 / 8)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    one_of_three = entity_scores([["B-X", "B-Y"]], [["B-X", "B-Z"]])
    assert one_of_three["macro_f1"] == pytest.approx(1 / 3)  # a type that is only true, or only predicted, counts
    kinds = entity_scores_by_type(truth, predicted)
    assert list(kinds) == ["LOC", "ORG", "PER"]
    assert kinds["PER"] == pytest.approx({"precision": 1 / 2, "recall": 1.0, "f1": 2 / 3, "support": 1})
    assert kinds["LOC"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}


def test_nothing_found_is_zero_and_nothing_given_an_error() -> None:
    assert entity_scores([["O", "O"]], [["O", "O"]])["entity_f1"] == 0.0
    assert entity_scores([["O", "O"]], [["O", "O"]])["accuracy"] == 1.0
    with pytest.raises(ValueError, match="nothing to score"):
        entity_scores([], [])
    for score in (entity_scores, entity_scores_by_type):
        with pytest.raises(ValueError, match="one tag for each word"):
            score([["O", "O"]], [["O"]])

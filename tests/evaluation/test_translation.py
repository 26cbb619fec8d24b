"""BLEU against sacrebleu on random and awkward text, ROUGE-L against hand-counted subsequences."""

import random
import sys

import pytest
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from minillm.evaluation import translation
from minillm.evaluation.translation import bleu, bleu_reference, rouge_l, words_13a

AWKWARD = [
    "It costs $1,000.50, i.e. 3.5% more; 7-year-old twins' toys (made in the U.S.)!",
    "&quot;Fish &amp; chips&quot; &lt;b&gt; a-\nb",
    "3-4 .5 5. , a.b x_y [z] {w} `q` ~t~ a/b a\\b a:b",
    "naïve café – “quoted” 北京 2019年",
    "  spaced   out\t",
    "a-\n",
    "",
    ".",
]
WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", ",", ".", "U.S.", "1,000", "state-of-the-art", "it's"]


@pytest.mark.parametrize("text", AWKWARD)
def test_words_are_those_of_mteval_13a(text: str) -> None:
    assert words_13a(text) == Tokenizer13a()(text.rstrip()).split()


def sentences(generator: random.Random, count: int, longest: int) -> list[str]:
    return [" ".join(generator.choices(WORDS, k=generator.randrange(longest))) for _ in range(count)]


@pytest.mark.parametrize("longest", [3, 6, 20])  # orders without a match or without an n-gram; ordinary sentences
def test_bleu_is_sacrebleus(longest: int) -> None:
    for seed in range(20):
        generator = random.Random(seed)
        predictions = [*sentences(generator, 10, longest), *AWKWARD]
        references = [sentences(generator, generator.randrange(1, 4), longest) for _ in predictions]
        references[-1].append(AWKWARD[0])
        width = max(map(len, references))
        streams = [[r[i] if i < len(r) else None for r in references] for i in range(width)]
        expected = BLEU(force=True).corpus_score(predictions, streams).score
        assert bleu_reference(predictions, references) == pytest.approx(expected, abs=1e-9)
        assert bleu(predictions, references) == pytest.approx(expected, abs=1e-9)


def test_bleu_of_a_published_example() -> None:
    """Papineni et al. 2002, section 2.1: 2 of 7 unigrams count, since `the` is there at most twice."""
    several = ["The cat is on the mat", "There is a cat on the mat"]
    assert bleu_reference(["the the the the the the the"], [several]) == pytest.approx(
        BLEU().corpus_score(["the the the the the the the"], [[r] for r in several]).score
    )
    assert bleu_reference([several[0]], [several]) == pytest.approx(100.0)
    for text, other in (("the cat", "the cat"), ("a b c d", "e f g h")):  # no stretch of four words; no word in common
        assert bleu_reference([text], [[other]]) == bleu([text], [[other]]) == 0.0


def test_without_sacrebleu_the_reference_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    monkeypatch.setattr(translation, "bleu_reference", lambda *_: 12.5)
    assert bleu(["a"], [["a"]]) == 12.5


def test_rouge_l_by_hand() -> None:
    """Lin 2004, section 3.1: `police killed the gunman`; lcs 3 and 2 of four words."""
    reference = ["Police killed the gunman"]
    assert rouge_l(["Police kill the gunman."], [reference]) == pytest.approx(3 / 4)
    assert rouge_l(["the gunman kill police"], [reference]) == pytest.approx(2 / 4)
    assert rouge_l(["the gunman"], [["x", *reference]]) == pytest.approx(2 * (2 / 2) * (2 / 4) / (2 / 2 + 2 / 4))
    assert rouge_l(["a b c d e", ""], [["a x c y e z"], ["a"]]) == pytest.approx((2 * 3 / 11 + 0) / 2)
    assert rouge_l(["b a b"], [["a b a b"]]) == pytest.approx(2 * 3 / 7)


def test_what_cannot_be_scored_says_why() -> None:
    for score in (bleu, bleu_reference, rouge_l):
        with pytest.raises(ValueError, match="nothing to score"):
            score([], [])
        with pytest.raises(ValueError, match="1 predictions for 2 references"):
            score(["a"], [["a"], ["b"]])
        with pytest.raises(ValueError, match="list of one reference"):
            score(["a"], ["a"])

"""Distributions against the same rules written out token by token, and draws against distributions.

B rows, V vocabulary.
"""

import math

import pytest
import torch

from minillm.config import UserError
from minillm.inference.sampling import Sampling, pick, probabilities, row_generator

V = 23


def naive(logits: list[float], sampling: Sampling, seen: set[int]) -> list[float]:
    """One row, in Python floats."""
    for i in seen:
        logits[i] = (
            logits[i] / sampling.repetition_penalty if logits[i] > 0 else logits[i] * sampling.repetition_penalty
        )
    weights = [math.exp(x / sampling.temperature) for x in logits]
    order = sorted(range(V), key=lambda i: -weights[i])
    if sampling.top_k is not None:
        order = order[: sampling.top_k]
    if sampling.top_p is not None:
        total, reached, kept = sum(weights[i] for i in order), 0.0, []
        for i in order:
            kept.append(i)
            reached += weights[i] / total
            if reached >= sampling.top_p:
                break
        order = kept
    if sampling.min_p is not None:
        order = [i for i in order if weights[i] >= sampling.min_p * weights[order[0]]]
    total = sum(weights[i] for i in order)
    return [weights[i] / total if i in order else 0.0 for i in range(V)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 100},
        {"top_p": 0.1},
        {"top_p": 0.8},
        {"top_p": 1.0},
        {"top_k": 4, "top_p": 0.7},
        {"top_k": 2, "top_p": 0.6},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"repetition_penalty": 1.7},
        {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_probabilities_equal_the_rules_written_out(options: dict) -> None:
    torch.manual_seed(3)
    logits = torch.randn(4, V) * 2
    seen = torch.rand(4, V) < 0.3
    sampling = Sampling(**options)
    expected = [
        naive(row.tolist(), sampling, set(mask.nonzero().flatten().tolist()))
        for row, mask in zip(logits, seen, strict=True)
    ]
    p = probabilities(logits, sampling, seen)
    torch.testing.assert_close(p, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_the_models_own_distribution_is_the_default() -> None:
    off = {"top_k": None, "top_p": None, "min_p": None}
    assert Sampling() == Sampling(temperature=1.0, repetition_penalty=1.0, **off)


def test_draws_follow_the_distribution() -> None:
    torch.manual_seed(0)
    logits, draws = torch.randn(1, V), 20_000
    sampling = Sampling(top_p=0.9)
    generators = [row_generator(0, row) for row in range(draws)]
    counts = pick(logits.expand(draws, V), sampling, generators).bincount(minlength=V)
    p = probabilities(logits, sampling)[0]
    assert counts[p == 0].sum() == 0
    # Pearson's statistic; with 22 degrees of freedom or fewer it passes 48.3 once in a thousand tries
    chi_square = ((counts - draws * p) ** 2 / (draws * p))[p > 0].sum()
    assert chi_square < 48.3


def test_temperature_to_zero_is_greedy() -> None:
    torch.manual_seed(1)
    logits = torch.randn(6, V)
    generators = [row_generator(5, row) for row in range(6)]
    for temperature in (0.0, 1e-3, 1e-320):
        sampling = Sampling(temperature=temperature)
        assert torch.equal(pick(logits, sampling, generators), logits.argmax(-1))
        torch.testing.assert_close(
            probabilities(logits, sampling), torch.nn.functional.one_hot(logits.argmax(-1), V).float()
        )


def test_extreme_logits_stay_a_distribution() -> None:
    logits = torch.tensor([[1e30, -1e30, 1e30, -math.inf]])
    assert probabilities(logits, Sampling(temperature=1e-20)).tolist() == [[0.5, 0.0, 0.5, 0.0]]
    for broken in (math.nan, math.inf):
        p = probabilities(torch.tensor([[0.0, broken], [0.0, -1e30]]), Sampling(temperature=0))
        assert p[0].isnan().any() and p[1].tolist() == [1.0, 0.0]


def test_equally_likely_tokens_do_not_widen_top_k() -> None:
    p = probabilities(torch.zeros(1, V), Sampling(top_k=3))
    assert p[0].tolist() == pytest.approx([1 / 3] * 3 + [0.0] * (V - 3))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_marked_and_forbidden_tokens_never_drawn(temperature: float) -> None:
    logits = torch.full((4, 5), -math.inf)
    logits[0, 2] = 0.3  # one token left
    logits[1, 1] = math.nan
    logits[2, 1] = math.inf
    picked = pick(logits, Sampling(temperature=temperature), [row_generator(0, row) for row in range(4)])
    assert picked.tolist() == [2, -1, -1, -1]


def test_a_rounding_error_in_the_running_sum_draws_no_impossible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums made in parallel, as on a GPU, need not stand still where nothing is added."""
    logits = torch.full((2000, 6), -math.inf)
    logits[:, [1, 3]] = 0.0
    exact = torch.Tensor.cumsum

    def rounded(self: torch.Tensor, *arguments, **options) -> torch.Tensor:
        return exact(self, *arguments, **options) + torch.where(self == 0, 0.05, 0.0)

    monkeypatch.setattr(torch.Tensor, "cumsum", rounded)
    drawn = pick(logits, Sampling(), [row_generator(0, row) for row in range(2000)])
    assert drawn.unique().tolist() == [1, 3]


def test_row_streams_differ_by_seed_and_by_row() -> None:
    streams = {(seed, row): torch.rand(4, generator=row_generator(seed, row)).tolist() for seed in (0, 1, -1, 2**32)
               for row in range(3)}  # fmt: skip
    assert len({tuple(stream) for stream in streams.values()}) == len(streams)
    assert torch.rand(4, generator=row_generator(1, 2)).tolist() == streams[1, 2]
    assert row_generator(1, 2).initial_seed() % 2**64 == 12069646666850839610  # the same in every version


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
    ],
)
def test_a_bad_value_is_named(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^{name} must be .* not {value}$"):
        Sampling(**{name: value})

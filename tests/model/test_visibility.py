"""Who sees whom: the past only, the own document only, never padding.

Equalities are to 1e-12 in fp64: other masks take other paths through the same sums, so not every last bit agrees.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.configs import POSITIONS, build, small

SHAPES = ["decoder", "encoder", "encoder-decoder"]


def ids(*shape: int) -> Tensor:
    return torch.randint(29, shape)


def assert_equal(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def changed_places(before: Tensor, after: Tensor) -> list[int]:
    """Places of the one row whose logits moved."""
    return ((before - after).abs().amax(-1)[0] > 1e-9).nonzero().flatten().tolist()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("position", list(POSITIONS))
def test_changing_a_token_changes_no_past_logit(position: str, window: int | None) -> None:
    model = build(small(position=POSITIONS[position], attention={"window": window}, layers=2))
    before = ids(1, 12)
    after = before.clone()
    after[0, 5] = (after[0, 5] + 1) % 29
    with torch.no_grad():
        first, second = model(before), model(after)
    assert torch.equal(first[:, :5], second[:, :5])  # the same sums of the same numbers: bit for bit
    reached = 12 if window is None else 5 + 2 * (window - 1) + 1  # two blocks hand a token on twice
    assert changed_places(first, second) == list(range(5, reached))


@pytest.mark.parametrize("position", list(POSITIONS))
def test_the_decoder_of_two_stacks_sees_the_past_and_all_of_the_source(position: str) -> None:
    model = build(small(shape="encoder-decoder", position=POSITIONS[position]))
    before, source = ids(1, 8), ids(1, 6)
    after, other = before.clone(), source.clone()
    after[0, 4] = (after[0, 4] + 1) % 29
    other[0, 5] = (other[0, 5] + 1) % 29
    with torch.no_grad():
        first = model(before, source=source)
        assert torch.equal(first[:, :4], model(after, source=source)[:, :4])
        assert changed_places(first, model(after, source=source)) == [4, 5, 6, 7]
        assert changed_places(first, model(before, source=other)) == list(range(8))


def test_an_encoder_sees_both_sides_of_its_window() -> None:
    model = build(small(shape="encoder", layers=1, attention={"window": 3}))
    before = ids(1, 12)
    after = before.clone()
    after[0, 6] = (after[0, 6] + 1) % 29
    with torch.no_grad():
        assert changed_places(model(before), model(after)) == [4, 5, 6, 7, 8]


PADDINGS = {"left": [[-1, -1, 0, 0, 0, 0, 0]], "right": [[0, 0, 0, 0, 0, -1, -1]], "both": [[-1, 0, 0, 0, 0, 0, -2]]}


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"softcap": 1.0}], ids=str)
@pytest.mark.parametrize("side", list(PADDINGS))
@pytest.mark.parametrize("position", list(POSITIONS))
@pytest.mark.parametrize("shape", ["decoder", "encoder"])
def test_padding_changes_nothing(shape: str, position: str, side: str, options: dict[str, Any]) -> None:
    model = build(small(shape=shape, position=POSITIONS[position], attention=options))
    segments, padded = torch.tensor(PADDINGS[side]), ids(1, 7)
    real = segments[0] >= 0
    with torch.no_grad():
        assert_equal(model(padded, segments=segments)[:, real], model(padded[:, real]))


@pytest.mark.parametrize("side", list(PADDINGS))
@pytest.mark.parametrize("position", list(POSITIONS))
def test_padding_of_either_side_of_an_encoder_decoder_changes_nothing(position: str, side: str) -> None:
    model = build(small(shape="encoder-decoder", position=POSITIONS[position]))
    segments, source, decoded = torch.tensor(PADDINGS[side]), ids(1, 7), ids(1, 7)
    real = segments[0] >= 0
    with torch.no_grad():
        expected = model(decoded, source=source[:, real])
        assert_equal(model(decoded, source=source, source_segments=segments), expected)
        expected = model(decoded[:, real], source=source[:, real])
        got = model(decoded, segments=segments, source=source, source_segments=segments)
        assert_equal(got[:, real], expected)


@pytest.mark.parametrize("options", [{}, {"window": 3}], ids=str)
@pytest.mark.parametrize("position", list(POSITIONS))
@pytest.mark.parametrize("shape", ["decoder", "encoder"])
def test_packed_documents_equal_separate_ones(shape: str, position: str, options: dict[str, Any]) -> None:
    model = build(small(shape=shape, position=POSITIONS[position], attention=options))
    documents = [ids(1, length) for length in (4, 1, 6, 3)]
    segments = torch.tensor([[7] * 4 + [2] + [5] * 6 + [-1] * 3])  # the ids in no order; the last is padding
    with torch.no_grad():
        packed = model(torch.cat(documents, 1), segments=segments).split([4, 1, 6, 3], 1)
        for document, logits in zip(documents[:3], packed[:3], strict=True):
            assert_equal(logits, model(document))


@pytest.mark.parametrize("position", list(POSITIONS))
def test_packed_pairs_of_an_encoder_decoder_equal_separate_ones(position: str) -> None:
    model = build(small(shape="encoder-decoder", position=POSITIONS[position]))
    sources, targets = [ids(1, n) for n in (5, 2)], [ids(1, n) for n in (3, 6)]
    with torch.no_grad():
        packed = model(
            torch.cat(targets, 1),
            segments=torch.tensor([[0] * 3 + [1] * 6]),
            source=torch.cat(sources, 1),
            source_segments=torch.tensor([[0] * 5 + [1] * 2]),
        ).split([3, 6], 1)
        for source, target, logits in zip(sources, targets, packed, strict=True):
            assert_equal(logits, model(target, source=source))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("position", list(POSITIONS))
def test_padding_gets_no_gradient(shape: str, position: str) -> None:
    """Token 28 stands only where there is padding: nothing that counts may depend on it, not even by 1e-30."""
    model = build(small(shape=shape, position=POSITIONS[position], tied=False)).train()
    segments = torch.tensor([[0, 0, 0, 1, 1, -1, -1], [-1, -1, 0, 0, 0, 0, 0]])
    tokens = torch.randint(28, (2, 7)).masked_fill(segments < 0, 28)
    source = {"source": tokens, "source_segments": segments} if shape == "encoder-decoder" else {}
    logits = model(tokens, segments=segments, **source)
    logits[segments >= 0].square().sum().backward()
    gradient = model.embedding.weight.grad
    assert torch.equal(gradient[28], torch.zeros(16, dtype=torch.float64))
    assert gradient[tokens[segments >= 0]].abs().amax(-1).min() > 0

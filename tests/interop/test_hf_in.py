"""Folders that Transformers wrote, read as models of ours: the same logits, padded or not."""

from typing import Any

import pytest
import torch

from minillm.interop.hf import POOLER, build, is_hf, read_hf
from minillm.model.transformer import Transformer
from tests.interop.theirs import VARIANTS, V, make, name_of, output, save

TOLERANCE = 1e-4
LENGTHS = (9, 4, 6)


def ours_of(folder) -> Transformer:
    config, weights, _ = read_hf(folder)
    return build(config, weights)


def compute(model: Transformer, has_head: bool, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **inputs) if has_head else model.states(ids, **inputs)


def padding(side: str, T: int) -> torch.Tensor:
    """[B, T] 1 where a token is real."""
    places = torch.arange(T).expand(len(LENGTHS), T)
    lengths = torch.tensor(LENGTHS).unsqueeze(1)
    return (places < lengths if side == "right" else places >= T - lengths).long()


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_the_same_output_with_and_without_padding(variant, tmp_path):
    family, architecture, changes = variant
    theirs = make(family, architecture, **changes)
    ours = ours_of(save(theirs, tmp_path))
    has_head = not architecture.endswith("Model") or architecture == "GPT2LMHeadModel"
    T = max(LENGTHS)
    ids = torch.randint(3, V, (len(LENGTHS), T))
    for side in (None, "right", "left"):
        real = torch.ones_like(ids) if side is None else padding(side, T)
        hf: dict[str, Any] = {"attention_mask": real}
        mine: dict[str, Any] = {} if side is None else {"segments": real - 1}
        if family == "bart":
            if side == "left":
                continue  # their positions count the padding: see the test below
            source = torch.randint(3, V, (len(LENGTHS), T))
            hf = {"input_ids": source, "attention_mask": real, "decoder_input_ids": ids, "decoder_attention_mask": real}
            mine = {"source": source, "source_segments": mine.get("segments"), **mine}
        else:
            hf |= {"input_ids": ids, "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
        if family == "bert":
            types = torch.randint(0, changes.get("type_vocab_size", 2), ids.shape)
            hf["token_type_ids"], mine["token_types"] = types, types
        expected, actual = output(theirs, **hf), compute(ours, has_head, ids, **mine)
        difference = (expected - actual).abs()[real.bool()].max().item()
        assert expected.abs().max() > 0.5  # else the tolerance would mean nothing
        assert difference < TOLERANCE, (side, difference)


def test_bart_padded_on_the_left_is_each_row_alone(tmp_path):
    theirs = make("bart", "BartForConditionalGeneration")
    ours = ours_of(save(theirs, tmp_path))
    source = torch.randint(3, V, (len(LENGTHS), 9))
    ids = torch.randint(3, V, (len(LENGTHS), 9))
    segments = padding("left", 9) - 1
    actual = compute(ours, True, ids, source=source, segments=segments, source_segments=segments)
    for row, length in enumerate(LENGTHS):
        alone = output(
            theirs, input_ids=source[row : row + 1, -length:], decoder_input_ids=ids[row : row + 1, -length:]
        )
        assert (actual[row, -length:] - alone[0]).abs().max() < TOLERANCE


def test_the_pooler_is_handed_on(tmp_path):
    theirs = make("bert", "BertModel")
    config, weights, _ = read_hf(save(theirs, tmp_path))
    ids = torch.randint(3, V, (2, 7))
    with torch.no_grad():
        states = build(config, weights).states(ids)
        pooled = torch.tanh(states[:, 0] @ weights[POOLER[0]].T + weights[POOLER[1]])
        assert (pooled - theirs(ids).pooler_output).abs().max() < TOLERANCE
    assert is_hf(tmp_path)

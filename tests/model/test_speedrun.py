"""The lever of the speed recipe: what an embedding of n tokens depends on, and that it learns."""

import math

import pytest
import torch

from minillm.config import TrainConfig, UserError, from_dict
from minillm.data.batch import Batch
from minillm.interop.writing import family_of
from minillm.model.cache import KVCache
from minillm.model.speedrun import NgramEmbedding, tokens_before
from minillm.model.transformer import Transformer, call_block
from minillm.training.objectives import training_objective
from tests.model.configs import build, small

LEVERS = {"ngrams": 4, "ngram_rows": 64, "ngram_dim": 8}


def speedrun(**changes):
    return small(**{"tied": False, "norm": {"embedding": True}, "speedrun": LEVERS, **changes})


def test_what_stands_before_a_token_ends_with_its_text() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [0, 1, 2, 3]])
    documents = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    assert tokens_before(ids, 2, None).tolist() == [[[0, 6, 7, 8], [0, 1, 2, 3]], [[0, 0, 6, 7], [0, 0, 1, 2]]]
    assert tokens_before(ids, 2, documents).tolist() == [[[0, 6, 0, 8], [0, 1, 2, 3]], [[0, 0, 0, 0], [0, 0, 1, 2]]]


def test_an_embedding_depends_on_exactly_its_last_tokens() -> None:
    torch.manual_seed(2)
    embed = NgramEmbedding(speedrun(speedrun={"ngrams": 3, "ngram_rows": 997, "ngram_dim": 6}))
    ids = torch.tensor([[9, 1, 2, 3, 8, 8, 1, 2, 3, 9, 7, 2, 3]])
    x = embed(ids, tokens_before(ids, 2, None))[0]
    assert x.shape == (13, 16)
    torch.testing.assert_close(x[3], x[8], rtol=0, atol=0)  # 1 2 3 behind other tokens
    assert not torch.allclose(x[3], x[12])  # 7 2 3: the pair is the same, the three are not
    assert not torch.allclose(x[0], x[9])  # a text's first token has no pair


def test_rows_are_used_evenly() -> None:
    """All pairs of 40 tokens in a table of 64 rows: a hash that lost a token would leave rows empty."""
    embed = NgramEmbedding(speedrun(speedrun={"ngrams": 2, "ngram_rows": 64, "ngram_dim": 64}))
    with torch.no_grad():
        embed.tables[0].weight.copy_(torch.eye(64))
        embed.project.weight.zero_()[:, :] = torch.arange(64.0)
    first, second = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    rows = embed(first.reshape(1, -1), second.reshape(1, 1, -1) + 1)[0, :, 0].long()
    counts = torch.bincount(rows, minlength=64)
    assert counts.min() >= 8 and counts.max() <= 50, counts  # 25 on average
    prime = 2**31 - 1  # a saved table fits this hash and no other: here in integers that cannot overflow
    for one, other in ((0, 1), (29, 3), (39, 39)):
        before, ids = torch.tensor([[[other + 1]]]), torch.tensor([[one]])
        key = ((one + 1) * 1_000_003 + other + 1) % prime
        assert embed(ids, before)[0, 0, 0] == key * 1_000_003 % prime % 64


def test_training_leaves_out_whole_rows_and_keeps_their_sum() -> None:
    torch.manual_seed(9)
    embed = NgramEmbedding(speedrun(speedrun={"ngrams": 3, "ngram_rows": 64, "ngram_dim": 4, "ngram_dropout": 0.25}))
    with torch.no_grad():
        for table in embed.tables:
            table.weight.fill_(1.0)
        embed.project.weight.zero_()[0, :4] = embed.project.weight[1, 4:] = 1.0  # feature 0: pairs, 1: threes
    ids = torch.randint(29, (8, 500))
    pairs, threes = embed(ids, tokens_before(ids, 2, None))[..., :2].unbind(-1)
    for kept in (pairs, threes):
        assert sorted(kept.unique().tolist()) == pytest.approx([0, 4 / 0.75])
        assert (kept == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert ((pairs == 0) & (threes == 0)).float().mean().item() == pytest.approx(0.0625, abs=0.02)
    assert (embed.eval()(ids, tokens_before(ids, 2, None))[..., :2] == 4).all()


def test_documents_in_one_row_are_read_as_alone() -> None:
    torch.manual_seed(3)
    model = build(speedrun())
    ids = torch.randint(29, (1, 20))
    documents = (torch.arange(20) >= 9).long().unsqueeze(0)
    together = model(ids, segments=documents)
    torch.testing.assert_close(together[:, :9], model(ids[:, :9]))
    torch.testing.assert_close(together[:, 9:], model(ids[:, 9:]))


def test_the_cache_knows_what_stood_before() -> None:
    """Token by token, rows of different lengths, and the rows in another order, as continuous batching has them."""
    torch.manual_seed(4)
    model = build(speedrun())
    ids = torch.randint(29, (2, 12))
    whole = model(ids)
    cache = KVCache(model.config, 2, 4, ids.device, torch.float64)
    with torch.no_grad():
        model(ids[:, :4], cache=cache, new=torch.tensor([4, 3]))
        cache.grow(8)
        cache.keep(torch.tensor([1, 0]))
        swapped = ids[[1, 0]]
        for i in range(3, 11):
            step = torch.stack((swapped[0, i], swapped[1, i + 1])).unsqueeze(1)
            out = model(step, cache=cache)[:, 0]
            torch.testing.assert_close(out, torch.stack((whole[1, i], whole[0, i + 1])))


def test_levers_need_a_pre_norm_decoder() -> None:
    for wrong in ({"shape": "encoder"}, {"norm": {"placement": "post"}}):
        with pytest.raises(UserError, match=r"model\.speedrun needs"):
            speedrun(**wrong)
    with pytest.raises(UserError, match="ngrams must be 0, or 2 to 16, not 1"):
        from_dict(type(speedrun()), {"speedrun": {"ngrams": 1}})


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_no_published_format_has_a_place_for_a_lever(position) -> None:
    with pytest.raises(UserError, match=r"speedrun\.ngrams"):
        gpt2 = {"norm": {"kind": "layer"}, "mlp": {"kind": "gelu"}} if position == "learned" else {}
        family_of(small(speedrun={"ngrams": 4}, position={"kind": position}, **gpt2))


def test_only_training_goes_through_the_compiled_blocks() -> None:
    torch.manual_seed(7)
    model, calls = Transformer(speedrun()), []

    def compiled(block, *inputs):
        calls.append((inputs[0].dtype, inputs[0].requires_grad))
        return call_block(block, *inputs)

    ids = torch.randint(29, (2, 8))
    expected = model(ids)
    model.decoder.compile_blocks(compiled)
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=0)
    assert len(calls) == 2 and len(set(calls)) == 1, "a second compilation for the first block"
    model.eval()(ids)
    with torch.no_grad():
        model.train()(ids)
    assert len(calls) == 2
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
    assert calls[2:] == [(torch.bfloat16, True)] * 2


def test_a_few_steps_learn_what_follows_what() -> None:
    """Pairs decide here: n-grams alone, frozen attention and all, get below what single tokens allow."""
    torch.manual_seed(8)
    model = Transformer(speedrun(layers=1, vocab_size=8))
    first = torch.randint(4, (16, 12))
    ids = torch.stack((first, 4 + torch.roll(first, 1, 1) % 4), -1).flatten(1)  # x, then what came before x
    batch = Batch(ids=ids[:, :-1], targets=ids[:, 1:], samples=tuple(range(16)))
    optimizer, objective = torch.optim.Adam(model.parameters(), lr=0.02), training_objective(TrainConfig())
    start = objective(model, batch).item() / batch.counted
    assert start == pytest.approx(math.log(8), rel=0.02)
    for _ in range(25):
        optimizer.zero_grad()
        loss = objective(model, batch) / batch.counted
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.85

"""Steps that a GPU repeats without the host: the same texts, whatever happens to the rows between them.

On a CPU a stand-in of the CUDA graph takes part: it computes nothing while recording, repeats the step at the same
addresses, and leaves what the host counts as it was.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.config import SpeedrunConfig
from minillm.inference import recorded
from minillm.inference.beam import beam_search
from minillm.inference.generate import generate
from minillm.inference.reader import Reader
from minillm.model.cache import KVCache
from tests.inference.test_generate import GREEDY, RAGGED, VARIANTS, greedy_by_hand, model_of
from tests.kernels.compare import CUDA

EVEN = [[1, 2, 3], [4, 5, 6], [9, 8, 7]]
replays: list[int] = []


def stand_in(step: Callable[[Tensor], Tensor], ids: Tensor) -> tuple[Callable[[], None], Tensor]:
    cache: KVCache = step.__self__.cache  # type: ignore[attr-defined]
    tensors = (cache.buffer, cache.lengths, cache.ids)
    before = [x.clone() for x in tensors]
    result = step(ids)
    for x, was in zip(tensors, before, strict=True):
        x.copy_(was)

    def replay() -> None:
        assert all(x is y for x, y in zip(tensors, (cache.buffer, cache.lengths, cache.ids), strict=True)), "moved"
        host = cache.longest, cache.ragged
        cache.longest = 0  # a graph knows no host: its shapes are those of the recording
        result.copy_(step(ids))
        cache.longest, cache.ragged = host

    return replay, result


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=CUDA)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    replays.clear()
    record = stand_in if request.param == "cpu" else recorded.replaying

    def counted(step: Callable[[Tensor], Tensor], ids: Tensor) -> tuple[Callable[[], None], Tensor]:
        replay, result = record(step, ids)

        def counting() -> None:
            replays.append(len(ids))
            replay()

        return counting, result

    monkeypatch.setattr(recorded, "possible", lambda device: True)
    monkeypatch.setattr(recorded, "replaying", counted)
    with torch.device(request.param):
        yield request.param


SPEEDRUN = {"speedrun": SpeedrunConfig(ngrams=3, ngram_rows=64, ngram_dim=8)}


@pytest.mark.parametrize("variant", [*VARIANTS, "n-grams"])
def test_recorded_steps_are_those_of_the_definition(variant: str, device: str) -> None:
    model = model_of(**VARIANTS.get(variant, SPEEDRUN)).to(device)
    for prompts in (RAGGED, EVEN):
        expected = [greedy_by_hand(model, prompt, 20) for prompt in prompts]
        replays.clear()
        assert generate(model, prompts, max_new_tokens=20, sampling=GREEDY) == expected
        assert replays == [3] * 18  # the prompts, one token as it is written, and the rest


def test_the_source_of_an_encoder_decoder_stays(device: str) -> None:
    model, sources = model_of(shape="encoder-decoder", decoder_layers=2).to(device), [[3, 1, 2, 7], [5, 6], [9, 9, 8]]
    arguments: dict[str, Any] = {"max_new_tokens": 12, "sampling": GREEDY, "sources": sources}
    expected = generate(model, EVEN, use_cache=False, **arguments)
    assert generate(model, EVEN, **arguments) == expected
    assert replays == [3] * 10


def test_rows_that_leave_and_texts_beyond_the_context(device: str) -> None:
    model = model_of(context=16).to(device)
    for prompts in (EVEN, RAGGED):  # of even rows all are read anew at once, into a new cache
        whole = generate(model, prompts, max_new_tokens=40, sampling=GREEDY, use_cache=False)
        assert generate(model, prompts, max_new_tokens=40, sampling=GREEDY) == whole
        assert len(replays) > 20
        replays.clear()
    stop = whole[1][12]
    expected = [row[: row.index(stop)] if stop in row else row for row in whole]
    assert generate(model, RAGGED, max_new_tokens=40, sampling=GREEDY, stop_ids=[stop]) == expected
    assert {3, 2} <= set(replays) or {3, 1} <= set(replays)


def test_a_cache_that_is_full_is_not_written_beyond(device: str) -> None:
    model = model_of().to(device).eval()
    reader, text = Reader(model, None, new_tokens=2), [1, 2, 3]
    with torch.no_grad():
        for token in (4, 5, 6):
            reader.next_logits([text])
            text.append(token)
        with pytest.raises(ValueError, match=r"the cache holds 5 tokens, and 5 \+ 1 do not fit"):
            reader.next_logits([text])
    assert replays == [1]


def test_a_beam_search_whose_rows_branch(device: str) -> None:
    model = model_of().to(device)
    arguments: dict[str, Any] = {"beams": 3, "max_new_tokens": 12, "stop_ids": [5]}
    expected = beam_search(model, RAGGED, use_cache=False, **arguments)
    assert beam_search(model, RAGGED, **arguments) == expected

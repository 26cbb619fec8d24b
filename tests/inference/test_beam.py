"""Beam search against every text there is, against greedy generation, and against Transformers."""

import itertools
import os

import pytest
import torch

from minillm.config import ModelConfig, PositionConfig, UserError
from minillm.inference.beam import beam_search
from minillm.inference.generate import generate
from minillm.inference.sampling import Sampling
from minillm.model.transformer import Transformer

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported for the first time
GREEDY = Sampling(temperature=0)
RAGGED = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
SOURCES = [[7, 8, 9, 10, 11], [12, 13], [14]]


def model_of(vocab_size: int = 31, **options) -> Transformer:
    torch.manual_seed(2)
    values = {"layers": 2, "heads": 4, "dim": 32, "context": 64, "vocab_size": vocab_size, "init_std": 0.3, **options}
    return Transformer(ModelConfig(**values)).eval()


@torch.no_grad()
def likeliest(model: Transformer, prompt: list[int], longest: int, stops: set[int], banned: set[int], alpha: float,
              **inputs) -> list[int]:  # fmt: skip
    """The definition: every text of up to `longest` new tokens, the stop counted among them."""
    words = sorted(set(range(model.config.vocab_size)) - stops - banned)
    counted = len(prompt) - 1 if "source" in inputs else 0
    texts = [
        (*begin, stop) for n in range(longest) for begin in itertools.product(words, repeat=n) for stop in stops
    ] + list(itertools.product(words, repeat=longest))
    scores = []
    for text in texts:
        logits = model(torch.tensor([[*prompt, *text]]), **inputs)[0, len(prompt) - 1 : -1]  # [T, V]
        logits[:, sorted(banned)] = float("-inf")
        log_p = logits.log_softmax(-1).gather(1, torch.tensor(text)[:, None]).sum().item()
        scores.append(log_p / (len(text) + counted) ** alpha)
    best = texts[max(range(len(texts)), key=scores.__getitem__)]
    return [token for token in best if token not in stops]


@pytest.mark.parametrize("shape", ["decoder", "encoder-decoder"])
def test_with_room_for_every_text_it_finds_the_likeliest(shape: str) -> None:
    found = set()
    for seed in range(3):
        torch.manual_seed(seed)
        model = Transformer(
            ModelConfig(shape=shape, layers=1, heads=2, dim=8, context=8, vocab_size=6, init_std=1.0)
        ).eval()
        sources = None if shape == "decoder" else [[1, 2, 3]]
        inputs = {} if sources is None else {"source": torch.tensor(sources)}
        for alpha in (0.0, 1.0, 2.0):
            wanted = likeliest(model, [2, 4], 4, {0, 5}, {3}, alpha, **inputs)
            (got,) = beam_search(
                model, [[2, 4]], beams=81, max_new_tokens=4, length_penalty=alpha, sources=sources, stop_ids={0, 5},
                banned_ids={3},
            )  # fmt: skip
            assert got == wanted
            found.add(len(got))
    assert len(found) > 1, "texts of one length do not tell what the penalty does"


@pytest.mark.parametrize("shape", ["decoder", "encoder-decoder"])
def test_one_beam_is_greedy(shape: str) -> None:
    model = model_of(context=16, shape=shape, position=PositionConfig(kind="learned"))
    sources = None if shape == "decoder" else SOURCES
    options = {"max_new_tokens": 25, "sources": sources, "banned_ids": {8, 30}}
    full = generate(model, RAGGED, sampling=GREEDY, **options)
    for stop_ids in (set(), {full[0][6], full[1][3]}):
        wanted = generate(model, RAGGED, sampling=GREEDY, stop_ids=stop_ids, **options)
        assert beam_search(model, RAGGED, beams=1, stop_ids=stop_ids, **options) == wanted
    assert {len(text) for text in wanted} != {25}


@pytest.mark.parametrize("shape", ["decoder", "encoder-decoder"])
def test_beams_keep_their_own_caches_and_prompts_apart(shape: str) -> None:
    """Against no cache, and each prompt alone; past the context too, where windows move at different times."""
    model = model_of(context=12, shape=shape)
    sources = None if shape == "decoder" else SOURCES
    options = {"beams": 3, "max_new_tokens": 20, "stop_ids": {0, 9}}
    together = beam_search(model, RAGGED, sources=sources, **options)
    assert together == beam_search(model, RAGGED, sources=sources, use_cache=False, **options)
    alone = [
        beam_search(model, [prompt], sources=sources and [sources[row]], **options)[0]
        for row, prompt in enumerate(RAGGED)
    ]
    assert together == alone
    assert len({tuple(text) for text in together}) == 3 and max(map(len, together)) > 9


def test_it_finds_what_greedy_misses() -> None:
    """Total log p over ten tokens, added up from the model itself."""
    model = model_of()

    @torch.no_grad()
    def log_p(prompt: list[int], text: list[int]) -> float:
        logits = model(torch.tensor([prompt + text]))[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(text)[:, None]).sum().item()

    greedy = generate(model, RAGGED, max_new_tokens=10, sampling=GREEDY)
    found = beam_search(model, RAGGED, beams=8, max_new_tokens=10)
    gains = [log_p(p, new) - log_p(p, old) for p, new, old in zip(RAGGED, found, greedy, strict=True)]
    assert min(gains) >= 0 and max(gains) > 0.1, gains


@pytest.mark.parametrize(
    "family, architecture", [("llama", "LlamaForCausalLM"), ("bart", "BartForConditionalGeneration")]
)
def test_the_texts_are_those_of_transformers(family: str, architecture: str, tmp_path) -> None:
    from minillm.interop.hf import build, read_hf
    from tests.interop.theirs import V, make, save

    torch.manual_seed(1)
    theirs = make(family, architecture, eos_token_id=2, forced_eos_token_id=None)
    ours = build(read_hf(save(theirs, tmp_path)))
    ids = torch.randint(3, V, (4, 5))
    prompts = ids.tolist() if family == "llama" else [[theirs.config.decoder_start_token_id]] * len(ids)
    sources = None if family == "llama" else ids.tolist()
    common = {"sources": sources, "max_new_tokens": 9}
    likely = sorted({i for text in generate(ours, prompts, sampling=GREEDY, **common) for i in text})
    lengths = set()
    for alpha, beams, stops in ((1.0, 2, likely[:1]), (0.0, 3, likely[1:4]), (2.0, 4, likely[:2]), (-1.0, 5, [2, 9])):
        answer = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, early_stopping=True, pad_token_id=0,
            num_beams=beams, length_penalty=alpha, max_new_tokens=9, eos_token_id=stops,
        )  # fmt: skip
        new = answer[:, len(prompts[0]) :].tolist()
        wanted = [list(itertools.takewhile(lambda i, stops=stops: i not in stops, text)) for text in new]
        got = beam_search(ours, prompts, beams=beams, length_penalty=alpha, stop_ids=stops, **common)
        assert got == wanted, (alpha, beams)
        lengths |= {len(text) for text in got}
    assert len(lengths) > 3, "too alike to tell anything"


def test_what_makes_no_sense_is_refused_by_name() -> None:
    model = model_of()
    for arguments, message in [
        ({"beams": 0}, "beams must be at least 1, not 0"),
        ({"length_penalty": float("nan")}, "length_penalty must be a finite number"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
    ]:
        with pytest.raises(UserError, match=message):
            beam_search(model, **{"prompts": [[1]], "beams": 2, "max_new_tokens": 3, **arguments})
    assert beam_search(model, [], beams=2, max_new_tokens=3) == []
    with torch.no_grad():
        model.decoder.blocks[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="logits are NaN or infinite after 0 new tokens"):
        beam_search(model, [[1]], beams=2, max_new_tokens=3)

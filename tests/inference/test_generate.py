"""Generation with a cache against the model read anew for each token, and rows against rows alone."""

import copy
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.config import AttentionConfig, MLPConfig, ModelConfig, NormConfig, PositionConfig, UserError
from minillm.inference.generate import generate
from minillm.inference.reader import Reader, window_start
from minillm.inference.sampling import Sampling
from minillm.model.transformer import Transformer

V = 61
GREEDY = Sampling(temperature=0)
RAGGED = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]


def model_of(**options) -> Transformer:
    """Random weights, so wide that greedy texts do not run in circles at once."""
    torch.manual_seed(0)
    return Transformer(ModelConfig(**{"layers": 2, "heads": 4, "dim": 32, "context": 64, "vocab_size": V,
                                      "init_std": 0.3, **options}))  # fmt: skip


@torch.no_grad()
def greedy_by_hand(model: Transformer, prompt: list[int], steps: int, **inputs) -> list[int]:
    """The definition: the whole text through the whole model, the likeliest token, again."""
    model.eval()
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids]), **inputs)[0, -1].argmax()))
    return ids[len(prompt) :]


VARIANTS = {
    "none": {"position": PositionConfig(kind="none")},
    "learned": {"position": PositionConfig(kind="learned")},
    "sinusoidal": {"position": PositionConfig(kind="sinusoidal")},
    "rope": {},
    "alibi": {"position": PositionConfig(kind="alibi")},
    "grouped heads": {"kv_heads": 2, "attention": AttentionConfig(qk_norm=True)},
    "one key head": {"kv_heads": 1, "position": PositionConfig(kind="alibi")},
    "window": {"attention": AttentionConfig(window=5)},
    "softcap": {"attention": AttentionConfig(softcap=5.0), "softcap": 8.0},
    "post-norm": {"norm": NormConfig(kind="layer", placement="post"), "mlp": MLPConfig(kind="relu")},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_equals_uncached_equals_the_definition(variant: str) -> None:
    model = model_of(**VARIANTS[variant])
    expected = [greedy_by_hand(model, prompt, 20) for prompt in RAGGED]
    assert generate(model, RAGGED, max_new_tokens=20, sampling=GREEDY) == expected
    assert generate(model, RAGGED, max_new_tokens=20, sampling=GREEDY, use_cache=False) == expected
    assert generate(model, RAGGED[:1], max_new_tokens=20, sampling=GREEDY) == expected[:1]
    assert len({token for row in expected for token in row}) > 7, "texts too poor to tell anything"


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_bf16_a_cache_is_as_close_to_the_truth_as_none(variant: str) -> None:
    """Logits after each token, against fp64: rows of one length and of several."""
    model = model_of(**VARIANTS[variant]).bfloat16().eval()
    exact = copy.deepcopy(model).double()
    for prompts in (RAGGED, [[1, 2, 3]] * 2):
        texts, errors = [list(prompt) for prompt in prompts], torch.zeros(2)
        readers = [Reader(model, None, 12, use_cache) for use_cache in (True, False)]
        for token in range(12):
            for text in texts:
                text.append(token)
            truth = torch.stack([exact(torch.tensor([text]))[0, -1] for text in texts])
            errors += torch.stack([(reader.next_logits(texts) - truth).norm() / truth.norm() for reader in readers])
        assert errors[0] < 1.2 * errors[1] and errors[1] < 12 * 0.05
        assert readers[0].cache is not None and readers[0].cache.buffer.dtype == torch.float32


@pytest.mark.parametrize("kind", ["none", "learned", "sinusoidal", "rope", "alibi"])
def test_an_encoder_decoder_reads_its_sources(kind: str) -> None:
    model = model_of(shape="encoder-decoder", decoder_layers=3, position=PositionConfig(kind=kind))
    sources = [[7, 8, 9, 10, 11], [12, 13], [14]]
    starts = [[2], [2], [2, 5, 6]]
    expected = [
        greedy_by_hand(model, start, 12, source=torch.tensor([source]))
        for start, source in zip(starts, sources, strict=True)
    ]
    for use_cache in (True, False):
        texts = generate(model, starts, sources=sources, max_new_tokens=12, sampling=GREEDY, use_cache=use_cache)
        assert texts == expected
    assert expected[0] != expected[1]
    stop = expected[1][4]  # a row leaves, and the others' sources stay theirs
    ended = [text[: text.index(stop)] if stop in text else text for text in expected]
    assert generate(model, starts, sources=sources, max_new_tokens=12, sampling=GREEDY, stop_ids={stop}) == ended
    assert {len(text) for text in ended} != {12}


def test_the_window_keeps_at_least_half_a_context_and_never_goes_back() -> None:
    for context in (1, 2, 7, 16):
        starts = [window_start(n, context) for n in range(1, 5 * context)]
        assert all(start == 0 for start in starts[:context])
        assert all(context // 2 < n - start <= context for n, start in enumerate(starts, 1) if start)
        assert all(0 <= later - start <= context - context // 2 for start, later in pairwise(starts))
    assert [window_start(n, 8) for n in (8, 9, 12, 13)] == [0, 4, 4, 8]


@pytest.mark.parametrize("kind", ["learned", "rope"])
@pytest.mark.parametrize("shape", ["decoder", "encoder-decoder"])
def test_beyond_the_context_it_goes_on_from_the_last_half(kind: str, shape: str) -> None:
    model = model_of(context=8, shape=shape, position=PositionConfig(kind=kind)).eval()
    prompts = [[1, 2, 3], list(range(10, 30))]  # the second is longer than the context
    inputs = {} if shape == "decoder" else {"source": torch.tensor([[3, 4, 5]])}
    sources = None if shape == "decoder" else [[3, 4, 5]] * 2
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(25):
            ids += greedy_by_hand(model, ids[window_start(len(ids), 8) :], 1, **inputs)
        expected.append(ids[len(prompt) :])
    for use_cache in (True, False):
        assert (
            generate(model, prompts, sources=sources, max_new_tokens=25, sampling=GREEDY, use_cache=use_cache)
            == expected
        )


def test_of_one_token_there_is_nothing_to_remember() -> None:
    model = model_of(context=1)
    texts = [generate(model, RAGGED, max_new_tokens=5, sampling=GREEDY, use_cache=use) for use in (True, False)]
    assert texts[0] == texts[1] and len(texts[0][0]) == 5


def test_without_a_cache_the_whole_text_is_read_for_each_token() -> None:
    model = model_of()
    read: list[int] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    generate(model, [[1, 2, 3]], max_new_tokens=4, sampling=GREEDY, use_cache=False)
    assert read == [3, 4, 5, 6]


def test_a_row_whose_window_moves_is_read_anew_alone() -> None:
    model = model_of(context=8)
    read: list[tuple[int, ...]] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: read.append(tuple(inputs[0].shape[:2])))
    prompts = [[1, 2, 3], [4] * 8, [5] * 6]
    texts = generate(model, prompts, max_new_tokens=4, sampling=GREEDY)
    # in the second step the second row has 9 tokens and moves to its last 5, the newest of which joins the other rows'
    assert read == [(3, 8), (1, 4), (3, 1), (3, 1), (1, 4), (3, 1)]
    assert texts == [generate(model, [prompt], max_new_tokens=4, sampling=GREEDY)[0] for prompt in prompts]


def test_the_source_is_encoded_once_even_where_the_window_moves() -> None:
    model = model_of(context=8, shape="encoder-decoder")
    passes: list[int] = []
    model.encoder.register_forward_pre_hook(lambda *_: passes.append(1))
    generate(model, [[2]], sources=[[3, 4, 5]], max_new_tokens=25, sampling=GREEDY)
    assert len(passes) == 1


def test_a_long_row_that_has_ended_leaves_its_room_to_the_others() -> None:
    model = model_of(context=10)
    expected = generate(model, RAGGED[:2], max_new_tokens=7, sampling=GREEDY)
    texts = generate(model, RAGGED, max_new_tokens=7, sampling=GREEDY, on_token=lambda row, _: row == 2)
    assert texts[:2] == expected and len(texts[2]) == 1


def test_a_row_does_not_depend_on_the_others_and_the_seed_decides() -> None:
    model, sampling = model_of(), Sampling(temperature=1.0, top_p=0.95)
    together = generate(model, RAGGED, max_new_tokens=16, sampling=sampling, seed=5)
    assert generate(model, RAGGED, max_new_tokens=16, sampling=sampling, seed=5) == together
    assert generate(model, RAGGED, max_new_tokens=16, sampling=sampling, seed=6) != together
    assert generate(model, RAGGED[:1], max_new_tokens=16, sampling=sampling, seed=5) == together[:1]
    assert generate(model, [RAGGED[0], [9] * 12, [1]], max_new_tokens=16, sampling=sampling, seed=5)[0] == together[0]
    assert generate(model, RAGGED[1:], max_new_tokens=16, sampling=sampling, seed=5, first_row=1) == together[1:]
    twins = generate(model, [[1, 2]] * 2, max_new_tokens=16, sampling=sampling, seed=5)
    assert twins[0] != twins[1]


class Calls(TorchDispatchMode):
    """Which operators run while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_step_of_a_block_calls_few_operators() -> None:
    """Of a small model that is what a step on a CPU costs: a microsecond or two each, whatever they work on."""
    found = []
    for layers in (1, 2):
        model = model_of(layers=layers, kv_heads=2, attention=AttentionConfig(qk_norm=True)).bfloat16().eval()
        reader, texts = Reader(model, None, 4), [[1, 2, 3], [4, 5, 6]]
        reader.next_logits(texts)
        for text in texts:
            text.append(7)
        with Calls() as calls:
            reader.next_logits(texts)
        found.append(Counter(calls.names))
    block = found[1] - found[0]
    assert block.total() <= 96, block
    assert not {name for name in block if name.startswith(("scatter", "arange", "index"))}


def test_the_global_random_state_and_the_models_mode_stay_as_they_were() -> None:
    model = model_of(dropout=0.5).train()
    model.decoder.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    first = generate(model, RAGGED, max_new_tokens=8)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert generate(model, RAGGED, max_new_tokens=8) == first, "dropout was on"
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_ended_rows_leave_the_batch() -> None:
    model = model_of()
    full = generate(model, RAGGED, max_new_tokens=20, sampling=GREEDY)
    stop = full[1][3]
    rows: list[int] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    texts = generate(model, RAGGED, max_new_tokens=20, sampling=GREEDY, stop_ids={stop})
    ended = [text.index(stop) if stop in text else 20 for text in full]
    assert texts == [text[:end] for text, end in zip(full, ended, strict=True)]
    assert rows == [
        sum(end >= step for end in ended) for step in range(max(20, 1)) if any(end >= step for end in ended)
    ]


def test_on_token_sees_every_token_and_can_end_a_row() -> None:
    model = model_of()
    full = generate(model, RAGGED, max_new_tokens=10, sampling=GREEDY)
    heard: list[tuple[int, int]] = []

    def listen(row: int, token: int) -> bool:
        heard.append((row, token))
        return row == 1 and sum(r == 1 for r, _ in heard) == 4

    texts = generate(model, RAGGED, max_new_tokens=10, sampling=GREEDY, on_token=listen)
    assert texts == [full[0], full[1][:4], full[2]]
    assert [[token for r, token in heard if r == row] for row in range(3)] == texts
    assert heard[:3] == [(row, full[row][0]) for row in range(3)]


def test_banned_ids_never_come() -> None:
    model = model_of()
    allowed = {3, 8, 21}
    banned = set(range(V + 5)) - allowed  # ids without a row in the model are harmless
    texts = generate(model, RAGGED, max_new_tokens=30, banned_ids=banned)
    assert {token for text in texts for token in text} == allowed


def test_a_repetition_penalty_counts_the_prompt_and_what_was_said() -> None:
    model = model_of()
    texts = generate(model, RAGGED, max_new_tokens=40, sampling=Sampling(temperature=0, repetition_penalty=1e9))
    for prompt, text in zip(RAGGED, texts, strict=True):
        assert len({*prompt, *text}) == len(prompt) + len(text), "a token came twice"
    stop = texts[0][5]  # a row that leaves must take its own record along
    ended = generate(model, RAGGED, max_new_tokens=40, sampling=Sampling(temperature=0, repetition_penalty=1e9),
                     stop_ids={stop})  # fmt: skip
    assert ended == [text[: text.index(stop)] if stop in text else text for text in texts]


def test_what_does_not_fit_is_refused_by_name() -> None:
    model = model_of()
    for arguments, message in [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, V]]}, "prompt 0 holds ids outside"),
        ({"prompts": [[-1]]}, "prompt 0 holds ids outside"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"banned_ids": range(V)}, "every token of the vocabulary is banned"),
        ({"sources": [[1]]}, "`sources` are for an encoder-decoder"),
    ]:
        with pytest.raises(UserError, match=message):
            generate(model, **{"prompts": [[1]], "max_new_tokens": 3, **arguments})
    with pytest.raises(UserError, match="an encoder: it cannot generate"):
        generate(model_of(shape="encoder"), [[1]], max_new_tokens=3)
    with pytest.raises(UserError, match="2 sources do not fit 1 prompts"):
        generate(model_of(shape="encoder-decoder"), [[1]], sources=[[1], [2]], max_new_tokens=3)
    assert generate(model, [], max_new_tokens=3) == []


def test_a_model_with_nan_weights_says_so() -> None:
    model = model_of()
    with torch.no_grad():
        model.decoder.blocks[1].mlp.down_proj.weight[0, 0] = torch.nan
    for sampling in (GREEDY, Sampling()):
        with pytest.raises(UserError, match="logits are NaN or infinite after 3 tokens of row 0"):
            generate(model, RAGGED, max_new_tokens=3, sampling=sampling)

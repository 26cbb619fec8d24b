"""What is shown while a model learns: whole functions, their share that parses, guesses in the place of gaps."""

import pytest
import torch

from minillm.data.batch import IGNORED
from minillm.inference import showcase
from minillm.model.transformer import Transformer
from tests.model.configs import small
from tokenizer import train

CODE = ["def add(a, b):\n    return a + b\n\n\ndef main():\n    print(add(1, 2))\n"] * 60


@pytest.fixture(scope="module")
def tokenizer():
    return train(CODE, type="bpe", vocab_size=330)


def model(tokenizer, shape: str = "decoder") -> Transformer:
    torch.manual_seed(0)
    return Transformer(small(shape=shape, vocab_size=tokenizer.vocab_size, context=64)).train()


@pytest.mark.parametrize(
    "text, function",
    [
        ("f(x):\n    return x\n\ndef g():\n    pass\n", "f(x):\n    return x\n"),
        ("f(\n    x,\n):\n    return x\nprint(1)", "f(\n    x,\n):\n    return x\n"),
        ("f():\n\n    return 1\n    cut off he", "f():\n\n    return 1\n"),
        ("f(): pass", "f(): pass\n"),
        ("f():\n\treturn 1\n# end", "f():\n\treturn 1\n"),
    ],
)
def test_the_first_function_of_a_sample(text: str, function: str) -> None:
    assert showcase.first_function(text) == function


def test_what_parses() -> None:
    assert showcase.parses("def f(x):\n    return x\n")
    for broken in ("def f(x:\n    return x\n", "def f(x):\nreturn x\n", "x = \0", "(" * 5000):
        assert not showcase.parses(broken)


def test_the_share_is_of_the_functions_that_were_sampled(tokenizer, monkeypatch) -> None:
    texts = ["f():\n    return 1\nx"] * 3 + ["f(:\n    return 1\nx"]
    monkeypatch.setattr(showcase, "continuation", lambda *_: texts)
    found = showcase.functions(None, tokenizer, 10)
    assert found == {"prompt": "\n\ndef ", "text": "f():\n    return 1\n", "parses": 0.75, "tried": 4}


def test_samples_are_the_same_each_time_and_leave_torchs_generator_alone(tokenizer) -> None:
    net = model(tokenizer)
    state = torch.get_rng_state()
    first = showcase.continuation(net, tokenizer, "def ", 12, rows=3)
    assert torch.equal(torch.get_rng_state(), state) and net.training
    torch.randn(5)
    assert showcase.continuation(net, tokenizer, "def ", 12, rows=3) == first
    assert len(set(first)) == 3 and all(first)


def test_an_encoders_guesses_stand_in_the_gaps(tokenizer, monkeypatch) -> None:
    net = model(tokenizer, "encoder")
    ids = torch.tensor(tokenizer.encode("return a + b"))
    hidden = ids.clone()
    hidden[[0, 2]] = tokenizer.mask_id
    targets = torch.full_like(ids, IGNORED)
    targets[[0, 2]] = ids[[0, 2]]
    logits = torch.zeros(1, len(ids), tokenizer.vocab_size)
    logits[0, 0, ids[0]] = 1.0  # right
    logits[0, 2, ids[1]] = 1.0  # wrong
    monkeypatch.setattr(net, "forward", lambda _: logits)
    text = showcase.filled_masks(net, tokenizer, hidden, targets, IGNORED)
    piece = [tokenizer.decode([i]) for i in ids.tolist()]
    assert text == f"⟦{piece[0]}⟧{piece[1]}⟦{piece[1]}≠{piece[2]}⟧{''.join(piece[3:])}" and net.training


def test_an_encoder_decoders_spans_stand_in_the_gaps(tokenizer, monkeypatch) -> None:
    one, two = tokenizer.sentinel_ids[:2]
    words = {word: tokenizer.encode(word) for word in ("def ", "add", "return")}
    monkeypatch.setattr(showcase, "generate", lambda *_, **__: [[one, *words["add"], two, *words["return"]]])
    source = [*words["def "], one, *tokenizer.encode("(a)"), two]
    text = showcase.filled_spans(model(tokenizer, "encoder-decoder"), tokenizer, source, 9)
    assert text == "def ⟦add⟧(a)⟦return⟧"

"""An encoder-decoder that knows nothing learns to write what it reads, forwards and backwards, on texts never seen.

source  s₁ … sₙ     text  1 s₁ … sₙ 2 (copy)  or  1 sₙ … s₁ 2 (reverse)     n from 1 to 6, of 8 symbols
"""

import pytest
import torch
import torch.nn.functional as F

from minillm.config import ModelConfig, PositionConfig
from minillm.inference.generate import generate
from minillm.inference.sampling import Sampling
from minillm.model.transformer import Transformer

BEGIN, END, FIRST, SYMBOLS, LONGEST = 1, 2, 3, 8, 6
STEPS, ROWS = 500, 64


def texts(count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LONGEST + 1, (count,), generator=generator).tolist()
    return [torch.randint(FIRST, FIRST + SYMBOLS, (n,), generator=generator).tolist() for n in lengths]


def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    return torch.tensor([[*row, *[fill] * (LONGEST + 1 - len(row))] for row in rows])


@pytest.mark.parametrize("step", [1, -1], ids=["copy", "reverse"])
def test_it_writes_what_it_reads(step: int) -> None:
    torch.manual_seed(0)
    sizes = {"layers": 1, "decoder_layers": 1, "heads": 4, "dim": 64, "context": 16, "vocab_size": FIRST + SYMBOLS}
    model = Transformer(ModelConfig(shape="encoder-decoder", position=PositionConfig(kind="learned"), **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS)
    batches = [texts(ROWS, seed=1 + at) for at in range(STEPS)]
    for sources in batches:
        targets = [[*source[::step], END] for source in sources]
        logits = model(
            padded([[BEGIN, *target[:-1]] for target in targets], 0),
            source=padded(sources, 0),
            source_segments=padded([[0] * len(source) for source in sources], -1),
        )  # [B, T, V]
        loss = F.cross_entropy(logits.flatten(0, 1), padded(targets, -100).flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    known = {tuple(source) for sources in batches for source in sources}
    held = [source for source in texts(2000, seed=0) if tuple(source) not in known]
    assert len(held) > 500 and max(map(len, held)) == LONGEST
    options = {"max_new_tokens": LONGEST + 1, "sampling": Sampling(temperature=0.0), "stop_ids": {END}}
    written = generate(model, [[BEGIN]] * len(held), sources=held, **options)
    right = sum(text == source[::step] for text, source in zip(written, held, strict=True))
    assert right > 0.99 * len(held), f"{right} of {len(held)}"

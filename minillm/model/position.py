"""How a token knows where it stands: five schemes, one interface.

Learned and sinusoidal positions are added to the embeddings; RoPE rotates queries and keys by an angle that grows
with the position; ALiBi lowers each score in proportion to the distance. `at` holds the position of each token
inside its own document, [T] or [B, T].
"""

import math

import torch
from torch import Tensor, nn

from minillm.config import ModelConfig, PositionConfig


class Position(nn.Module):
    """No positions at all, and the interface of the others."""

    def __init__(self, config: ModelConfig):
        super().__init__()

    def add(self, x: Tensor, at: Tensor) -> Tensor:
        """x [B, T, dim], with whatever is added to embeddings."""
        return x

    def rotation(self, at: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos, sin [(B,) T, D/2] that rotate queries and keys; computed once for all blocks."""
        return None

    def slopes(self, device: torch.device) -> Tensor | None:
        """[H] by which a head's scores fall with each step of distance."""
        return None


class Learned(Position):
    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.context, config.dim)

    def add(self, x: Tensor, at: Tensor) -> Tensor:
        return x + self.embedding(at)


class Sinusoidal(Position):
    """Even features are sines, odd ones cosines (Vaswani et al. 2017, §3.5)."""

    def add(self, x: Tensor, at: Tensor) -> Tensor:
        N = x.shape[-1]
        frequency = torch.exp(torch.arange(0, N, 2, device=x.device) * (-math.log(10_000.0) / N))
        angle = at.unsqueeze(-1) * frequency  # [(B,) T, N/2]
        return x + torch.stack((angle.sin(), angle.cos()), -1).flatten(-2).type_as(x)


class Rope(Position):
    """Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864), halves rotated as in Llama."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.head_width, self.config = config.head_width, config.position

    def rotation(self, at: Tensor) -> tuple[Tensor, Tensor]:
        angle = at.unsqueeze(-1) * rope_frequencies(self.head_width, self.config, at.device)
        return angle.cos(), angle.sin()


def rope_frequencies(D: int, config: PositionConfig, device: torch.device | None = None) -> Tensor:
    """[D/2] radians a token: theta ** (-2i / D), slowed down where the config scales the context."""
    frequency = config.theta ** (-torch.arange(0, D, 2, device=device, dtype=torch.float32) / D)
    if config.scaling == "linear":
        return frequency / config.scaling_factor
    if config.scaling == "llama3":  # wavelengths that fit the old context often stay, those that never did are slowed
        turns = config.original_context * frequency / (2 * math.pi)
        low, high = config.low_frequency_factor, config.high_frequency_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (keep + (1 - keep) / config.scaling_factor)
    return frequency


class Alibi(Position):
    """Linear biases (Press et al. 2021, https://arxiv.org/abs/2108.12409)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.heads = config.heads
        self.known: Tensor | None = None

    def slopes(self, device: torch.device) -> Tensor:
        if self.known is None or self.known.device != device:  # once: no copy from the host in a recorded step
            self.known = torch.tensor(alibi_slopes(self.heads), device=device)
        return self.known


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8/n), 2^(-16/n), …; for other than powers of two filled up with every other slope of the next power."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]


POSITIONS = {"none": Position, "learned": Learned, "sinusoidal": Sinusoidal, "rope": Rope, "alibi": Alibi}


def build_position(config: ModelConfig) -> Position:
    return POSITIONS[config.position.kind](config)


def document_positions(segments: Tensor) -> Tensor:
    """Position of each token inside its own document: counts anew wherever the id in segments [B, T] changes."""
    index = torch.arange(segments.shape[1], device=segments.device)
    starts = torch.zeros_like(segments, dtype=torch.long)
    starts[:, 1:] = torch.where(segments[:, 1:] != segments[:, :-1], index[1:], 0)
    return index - starts.cummax(1).values

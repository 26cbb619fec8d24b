"""What stands in front of every document: trained keys and values, or trained embeddings.

    prefix   keys and values of P virtual tokens in each block (Li & Liang 2021, https://arxiv.org/abs/2101.00190)
    prompt   P embeddings that go through the blocks like any others (Lester et al. 2021, arXiv:2104.08691)

B rows, T tokens, P virtual tokens, G key/value heads, D head width, C documents side by side in a row. Tokens count
their positions from P on. A prefix's keys have no position: they go in unrotated, as PEFT has it. Packed rows hold
one copy for each document, of the document's own id; with a cache the virtual tokens are its first P entries.
"""

import torch
from torch import Tensor, nn

from minillm.config import ModelConfig, UserError
from minillm.model.attention import View
from minillm.model.cache import KVCache
from minillm.model.transformer import Front, Stack


def documents(segments: Tensor | None, *, by_distance: bool) -> Tensor | None:
    """The ids [C] of all documents in segments [B, T]; None where each row is one.

    Args:
        by_distance: attention counts how far keys are away (a sliding window, ALiBi). That is true of what stands in
            front of the first document of a row only.

    Raises:
        UserError: `by_distance`, and rows hold several documents or begin with padding.
    """
    if segments is None:
        return None
    ids = segments.unique()
    ids = ids[ids >= 0]
    if by_distance and (len(ids) > 1 or bool((segments[:, 0] < 0).any())):
        raise UserError(
            "prefix and prompt with a sliding window or ALiBi need one document a row, beginning at its first token: "
            "switch packing off, and pad on the right"
        )
    return ids


def _by_distance(config: ModelConfig) -> bool:
    return config.attention.window is not None or config.position.kind == "alibi"


class PrefixFront(Front):
    """Keys and values of P virtual tokens for each block of one stack; they begin as small random numbers.

    Args:
        layers: blocks of the stack.
        length: P.
        hidden: width of a network tanh(e W₁ + b₁) W₂ + b₂ that makes them while they are trained (Li & Liang, §4.3:
            trained by themselves they are unstable). None: no network.
    """

    def __init__(self, config: ModelConfig, layers: int, length: int, hidden: int | None, like: Tensor):
        super().__init__()
        self.length, self.by_distance = length, _by_distance(config)
        self.shape = (length, layers, 2, config.key_value_heads, config.head_width)
        width = 2 * layers * config.key_value_heads * config.head_width
        if hidden is None:
            self.prefix = nn.Parameter(0.02 * torch.randn(length, width).to(like))  # [P, layers · 2 · G · D]
            self.network = None
        else:
            self.prefix = nn.Parameter(torch.randn(length, config.dim).to(like))
            self.network = nn.Sequential(nn.Linear(config.dim, hidden), nn.Tanh(), nn.Linear(hidden, width)).to(like)

    def vectors(self) -> Tensor:
        """[P, layers · 2 · G · D], as PEFT's files have them."""
        return self.prefix if self.network is None else self.network(self.prefix)

    def keys_and_values(self) -> Tensor:
        """[layers, 2, G, P, D]"""
        return self.vectors().view(self.shape).permute(1, 2, 3, 0, 4)

    def forward(self, x: Tensor, at: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Leaves tokens and positions alone, and puts the prefix into what the blocks see."""
        view.prefix = self.keys_and_values()
        ids = documents(view.segments, by_distance=self.by_distance)
        if ids is not None:
            view.prefix = view.prefix.repeat(1, 1, 1, len(ids), 1)  # [layers, 2, G, C · P, D]
            view.prefix_segments = ids.repeat_interleave(self.length)
        return x, at

    def fill(self, cache: KVCache, stack: Stack, view: View) -> None:
        cache.grow(self.length)
        cache.begin(self.length, None)
        for layer, (k, v) in enumerate(self.keys_and_values()):
            cache.write(layer, k.expand(len(cache.lengths), -1, -1, -1), v.expand(len(cache.lengths), -1, -1, -1))


class PromptFront(Front):
    """P trained embeddings in front of one stack's input, which begin as those of `words`.

    Args:
        words: [P, dim] embeddings of real tokens: random ones learn more slowly (Lester et al., §3.2).
    """

    def __init__(self, config: ModelConfig, words: Tensor):
        super().__init__()
        self.length, self.by_distance = len(words), _by_distance(config)
        self.prompt = nn.Parameter(words.detach().clone())

    def forward(self, x: Tensor, at: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """x [B, C · P + T, dim] and their positions; the segments grow likewise."""
        B, P = len(x), self.length
        copies = 1
        ids = documents(view.segments, by_distance=self.by_distance)
        if ids is not None:
            copies = len(ids)
            view.segments = torch.cat((ids.repeat_interleave(P).expand(B, -1), view.segments), 1)
        first = torch.arange(P, device=at.device).repeat(copies).expand(*at.shape[:-1], -1)
        return torch.cat((self.prompt.repeat(copies, 1).expand(B, -1, -1).type_as(x), x), 1), torch.cat((first, at), -1)

    def fill(self, cache: KVCache, stack: Stack, view: View) -> None:
        cache.grow(self.length)
        cache.begin(self.length, None)
        stack(self.prompt.expand(len(cache.lengths), -1, -1), cache.at, view)

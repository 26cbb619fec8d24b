"""One token a row as a CUDA graph: the host starts a step by one call instead of some hundred.

A step of generation is many small kernels, some ten a block, and to launch one costs the host longer than a GPU needs
for it. A graph records the launches of a step once and repeats them. It repeats shapes and addresses too, so in such a
step nothing may depend on how long the texts are: the cache is read and written in place, where its lengths, on the
device, say (`KVCache.whole`), the new tokens come in through one tensor and the logits go out through another.

B rows, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minillm.model.cache import KVCache


def possible(device: torch.device) -> bool:
    """Whether steps can be recorded there."""
    return device.type == "cuda"


def replaying(step: Callable[[Tensor], Tensor], ids: Tensor) -> tuple[Callable[[], None], Tensor]:
    """(what does all that `step(ids)` has launched once more, the tensor that its result comes out in).

    Nothing is computed yet. The step must have run before with such shapes: compilers and libraries that set themselves
    up on first use cannot do so in a recording.
    """
    graph = torch.cuda.CUDAGraph()
    # What other threads ask of the GPU meanwhile, as those of a group of processes do, is no part of it and no fault.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = step(ids)
    return graph.replay, result


class RecordedStep:
    """`step` on these rows of the cache, as often as wanted, until rows leave or are read anew.

    Args:
        step: [B, 1] new tokens -> logits [B, V]; writes behind what the cache holds.
        ids: [B, 1] of the next step, not yet taken; later ones are put into this tensor.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], cache: KVCache, ids: Tensor):
        self.cache, self.ids = cache, ids
        longest = cache.longest
        self.replay, self.logits = replaying(step, self.ids)
        cache.longest = longest  # what the host counts was counted while recording, and is not when replaying

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [B, V] in a tensor that the next call overwrites."""
        self.cache.take(1)
        self.ids.copy_(ids)
        self.replay()
        return self.logits

"""torch.compile for training: the whole step on a GPU, on a CPU one block for all; without it where none works."""

from collections.abc import Callable

import torch
from torch import nn

from minillm.data.batch import Batch
from minillm.model.transformer import Stack, Transformer, call_block
from minillm.training.plan import autocast


def compile_objective(objective, model: nn.Module, micro: Batch, context, say: Callable[[str], None]):
    """torch.compile of the objective, or the objective itself, with one line, where no compiler works.

    It is tried with a micro-batch as training will have them: a whole batch need not fit the memory.
    """
    compiled = torch.compile(objective)
    return compiled if _works(compiled, model, micro, context, say) else objective


def compile_blocks(objective, model: Transformer, micro: Batch, dtype: str, say: Callable[[str], None]) -> bool:
    """Compiles the blocks alone, once for all of them: seconds on a CPU, where the whole step takes a minute.

    Returns whether that works; where it does not, one line says so, and the blocks stay as they are written.
    """
    for stack in _stacks(model):
        stack.compile_blocks(torch.compile(call_block, dynamic=False))
    if _works(objective, model, micro, autocast("cpu", dtype), say):
        return True
    blocks_as_written(model)
    return False


def blocks_as_written(model: Transformer) -> None:
    """Takes `compile_blocks` back."""
    for stack in _stacks(model):
        stack.compile_blocks(None)


def _stacks(model: Transformer) -> list[Stack]:
    return [stack for stack in (model.encoder, model.decoder) if stack is not None]


def _works(objective, model: nn.Module, micro: Batch, context, say: Callable[[str], None]) -> bool:
    """Whether a step can be compiled; one line where it cannot."""
    try:
        with context():
            loss = objective(model, micro)
        loss.backward()
    except Exception as error:  # inductor, dynamo and the C++ toolchain raise without a common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        say(f"warning: torch.compile does not work here ({reason[:160]}); training without it")
        return False
    finally:
        model.zero_grad(set_to_none=True)
    return True

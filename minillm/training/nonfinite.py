"""Where a NaN or an infinity came from: named by layer and by sample, for whoever has to mend it."""

import torch
from torch import Tensor, nn

from minillm.data.batch import Batch
from minillm.training.objectives import Objective


def _finite(x: object) -> bool:
    tensors = x if isinstance(x, tuple) else (x,)
    return all(bool(t.isfinite().all()) for t in tensors if isinstance(t, Tensor) and t.is_floating_point())


def locate(model: nn.Module, batch: Batch, objective: Objective) -> tuple[str, list[int]]:
    """The first layer whose weights, output or gradient is not finite, and the samples whose loss is not.

    A forward pass is repeated to find them, in evaluation mode and row by row; gradients are read as they stand.
    """
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"{name} (weight)", list(batch.samples)
    found: list[str] = []

    def watch(name: str):
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not _finite(output):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled code would pass the hooks by
            bad = [row.samples[0] for row in batch.split(1) if not _finite(objective(model, row))]
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if found:
        return f"{found[0]} (output)", bad
    if bad:
        return "loss", bad
    gradients = [name for name, p in model.named_parameters() if not _finite(p.grad)]
    return (f"{gradients[-1]} (gradient)" if gradients else "loss"), list(batch.samples)

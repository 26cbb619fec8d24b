"""A model over several processes: a whole copy on each, or a part of every tensor on each.

Both work where a module's `forward` begins and ends, so one call of an objective is made a module of its own: all
weights that an objective touches, inside blocks and outside, are then used within one forward pass.
"""

import warnings
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from minillm.config import TrainConfig
from minillm.data.batch import Batch
from minillm.training.distributed import Call
from minillm.training.objectives import Objective

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class _Step(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, objective: Objective, batch: Batch) -> Tensor:
        return objective(self.model, batch)


def replicated(model: nn.Module, config: TrainConfig, size: int) -> Call:
    """DistributedDataParallel: gradients are averaged while the backward pass of the last micro-batch still runs."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.nn.parallel import DistributedDataParallel

    with warnings.catch_warnings():  # 2.13 has another name for broadcast_buffers, 2.11 only this one
        warnings.simplefilter("ignore", FutureWarning)
        step = DistributedDataParallel(_Step(model), broadcast_buffers=False, gradient_as_bucket_view=True)
    if config.reduce_dtype == "bf16":
        step.register_comm_hook(None, default_hooks.bf16_compress_hook)

    def call(objective: Objective, model: nn.Module, batch: Batch, *, last: bool = True) -> Tensor:
        with nullcontext() if last else step.no_sync():
            return step(objective, batch)

    return call


def sharded(model: nn.Module, config: TrainConfig, size: int) -> Call:
    """fully_shard (FSDP2), block by block; what is outside the blocks is gathered once for a whole pass."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = next(model.parameters()).device.type
    ranks = config.shard_ranks or size
    if ranks == size:
        mesh = init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(device, (size // ranks, ranks), mesh_dim_names=("replicate", "shard"))
    gathered = torch.bfloat16 if config.gather_dtype == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=_DTYPES[config.reduce_dtype])
    step = _Step(model)
    for stack in (model.encoder, model.decoder):
        for block in stack.blocks if stack is not None else ():
            fully_shard(block, mesh=mesh, reshard_after_forward=config.reshard, mp_policy=policy)
    fully_shard(step, mesh=mesh, mp_policy=policy)

    def call(objective: Objective, model: nn.Module, batch: Batch, *, last: bool = True) -> Tensor:
        if torch.is_grad_enabled():
            step.set_requires_gradient_sync(last)
        return step(objective, batch)

    return call

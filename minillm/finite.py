"""Weights of others that hold no numbers: refused by name, before anything is computed with them."""

from collections.abc import Mapping

from torch import Tensor

from minillm.config import UserError


def require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises `UserError` by the name of the first tensor that holds NaN or, read as fp32, an infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not (finite := tensor.float().isfinite()).all():
            wrong = finite.numel() - int(finite.sum())
            raise UserError(
                f"{where}: {name} holds NaN or infinity in {wrong:,} of {finite.numel():,} places; take weights of a "
                "training that did not diverge, saved in a type that holds them (fp16 ends at 65,504)"
            )

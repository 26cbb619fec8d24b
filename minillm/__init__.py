"""minillm: a Transformer language model from scratch.

from minillm import ModelConfig, Transformer, load
"""

from typing import TYPE_CHECKING

from minillm.config import ModelConfig

if TYPE_CHECKING:
    from minillm.loading import load
    from minillm.model.transformer import Transformer

__all__ = ["ModelConfig", "Transformer", "load"]
__version__ = "0.1.0"


def __getattr__(name: str):
    """Torch is imported with the first use of a model, so that `minillm --help` answers at once."""
    if name == "Transformer":
        from minillm.model.transformer import Transformer

        return Transformer
    if name == "load":
        from minillm.loading import load

        return load
    raise AttributeError(f"module 'minillm' has no attribute {name!r}")

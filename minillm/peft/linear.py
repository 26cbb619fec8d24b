"""A linear layer that keeps its weight and gains something: what LoRA, AdaLoRA and adapters have in common.

The layer takes over the parameters of the one it replaces under the same names, so that a checkpoint of the plain
model still fits, and putting the old layer back is all that removing takes.
"""

from torch import Tensor, nn

from minillm.model.linear import Linear


class GrownLinear(Linear):
    """y = W x + b, with the very parameters of `linear`, and parameters of its own."""

    own: tuple[str, ...]
    """Names of what it adds: parameters, and buffers that are saved with them."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)  # nn.Linear's would draw weights only to be replaced
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def new(self, *shape: int) -> nn.Parameter:
        """A parameter of zeros, of the type and on the device of the weight."""
        return nn.Parameter(self.weight.new_zeros(shape))

    def delta(self) -> Tensor | None:
        """What could be added to the weight, [out, in]; None: what it adds is no matrix."""
        return None

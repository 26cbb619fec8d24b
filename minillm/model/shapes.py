"""A model as shapes alone, for weights that are about to be put into it, or to be counted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_DRAWS: set[Callable[..., Any]] = {nn.init.normal_, nn.init.uniform_, nn.init.xavier_uniform_, nn.init.kaiming_uniform_}


class _Undrawn(TorchFunctionMode):
    """First weights are not drawn. Of a tensor without memory torch would draw them by its compiler's operators, whose
    import takes more than a second."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Modules built in this block have shapes and no memory: `load_state_dict(..., assign=True)` gives it to them."""
    with torch.device("meta"), _Undrawn():
        yield

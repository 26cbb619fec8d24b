"""Tensors from a safetensors file that nobody vouches for."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minillm.config import DamagedFile

LARGEST_HEADER = 10 << 20
"""Bytes. A hundred thousand tensors take six million; of the library's own limit, ten times this, a header can be made
that costs it gigabytes of memory and many seconds."""


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors by name, on the CPU. Raises `DamagedFile` where it is no safetensors file."""
    try:
        check_header(path)
        return load_file(path)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, OverflowError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedFile(f"{path} is damaged: it is no safetensors file ({reason[:200]})") from None


def check_header(path: Path) -> None:
    """Raises ValueError for a header that is longer than any model's, before it is parsed."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > LARGEST_HEADER:
        raise ValueError(f"its header claims {size:,} bytes, and {LARGEST_HEADER:,} are the most that is read")

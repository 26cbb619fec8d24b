"""Tensors that several processes hold parts of, as safetensors files: each process writes its own part.

    folder/shard-R-model-F-of-2.safetensors     what rank R − 1 holds; F = 1: weights, 2: training state

The format is that of torch.distributed.checkpoint's Hugging Face writer, so that its reader opens it too: each file's
header says where in the whole tensor its part lies. No code hides in such a file (unlike the default one's pickles).
"""

import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from minillm.config import DamagedFile
from minillm.tensors import check_header

WEIGHTS, STATE = "model.", "state."
"""What the names of the two kinds of tensors begin with."""


def write(folder: Path, tensors: dict[str, Tensor], group: Any) -> Future:
    """Begins to write tensors (DTensors, or the same one everywhere) from all ranks of `group`.

    The values are copied before this returns; the future is for `settle`.
    """
    from torch.distributed import checkpoint as dcp

    files = {name: 1 if name.startswith(WEIGHTS) else 2 for name in tensors}
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dcp.async_save(tensors, storage_writer=writer, process_group=group)  # type: ignore[return-value]


def settle(written: Future) -> None:
    """Waits for the end of `write`. Raises what went wrong on some rank, on all of them."""
    from torch.distributed import checkpoint as dcp

    try:
        written.result()
    except dcp.CheckpointException as error:  # a BaseException, with the tracebacks of all ranks for its text
        first = next(failure for failure, _ in error.failures.values())
        raise first from None


def read(folder: Path, kind: str) -> dict[str, Tensor]:
    """The whole tensors of one kind, on the CPU, by their names without the kind; any number of ranks wrote them.

    Raises `DamagedFile` where the files do not add up to them.
    """
    from torch.distributed import checkpoint as dcp

    try:
        for path in folder.glob("*.safetensors"):
            check_header(path)
        reader = dcp.HuggingFaceStorageReader(str(folder))
        found = reader.read_metadata().state_dict_metadata
        whole = {
            name: torch.empty(about.size, dtype=about.properties.dtype)
            for name, about in found.items()
            if name.startswith(kind) and sum(part.sizes.numel() for part in about.chunks) == about.size.numel()
        }
        missing = [name for name in found if name.startswith(kind) and name not in whole]
        if missing:
            raise ValueError(f"parts of {missing[0]} are missing")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(whole, storage_reader=reader, no_dist=True)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, dcp.CheckpointException) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DamagedFile(f"{folder} is damaged: its files do not make a checkpoint ({reason[:200]})") from None
    return {name.removeprefix(kind): tensor for name, tensor in whole.items()}

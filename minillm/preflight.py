"""What a run will need, found out before it starts: parameters, arithmetic, memory, disk.

Memory is not estimated by a formula but rehearsed: two real training steps run on tensors that have shapes but no
content (PyTorch's FakeTensorMode), and each tensor's bytes are counted from its birth to its release. So every option
of the model, the loss and the optimizer counts as what it is, in a fraction of a second and without the memory.
"""

import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillm import ops
from minillm.config import ModelConfig, Settings, UserError
from minillm.data.batch import Batch
from minillm.data.corpus import SpanCorruption
from minillm.model.transformer import Transformer
from minillm.training.objectives import training_objective
from minillm.training.optim import build_optimizers

SPARE = 0.9
"""Share of the free memory that a run may plan with; the rest is for what allocators cannot give back in one piece."""

HEAP, PROCESS = 0.57, 4 * 2**20
"""What a process on a CPU grows by besides its tensors: a share of them, and the libraries' own buffers.

An estimate, no more: the share lies in holes of the C library's heap, and changes from run to run. Fifteen runs of six
presets, of 4 to 14 steps, in fp32 and bf16, with one thread and two, grew by 1.47 to 1.73 times their tensors, which
this meets within 13 %; earlier versions of the code had from 1.15 to over 2 times, and why is not known. Fixed
thresholds for what malloc maps and gives back, and huge pages, made it no more even (1.47 to 1.86). Without a heap
(MALLOC_MMAP_THRESHOLD_=65536 in the environment, which made a step of 1.2 s one of 2.1 s) tensors and buffers alone
explain what is measured within 7 %: `make prove` repeats that."""

_PARTS = {  # the first word that is found in a module's name tells its part
    "ngram_embedding.project": "mlp",  # a product, unlike what else stands under embeddings
    "head": "head",
    "position": "positions",
    "norm": "norms",
    "attention": "attention",
    "mlp": "mlp",
    "embedding": "embeddings",
}
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CGROUPS = [  # a container's limit and what it uses of it: version 2, version 1
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
]


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part: embeddings, positions, attention (cross-attention too), mlp, norms, head; the sum is all.

    A tied output matrix counts once, among the embeddings. Nothing is allocated.
    """
    with torch.device("meta"):
        model = Transformer(config)
    counts = dict.fromkeys(("embeddings", "positions", "attention", "mlp", "norms", "head"), 0)
    for name, weight in model.named_parameters():
        counts[next(part for word, part in _PARTS.items() if word in name)] += weight.numel()
    return counts


def flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations of one training step, forward and backward, for each token.

        6 N + 12 · A · w · S

    N counts the weights that are multiplied (without positions, and without embeddings that are only looked up), A the
    attention layers, w the width of all their heads, S the keys of each query: the context, or the window where that is
    smaller. Causal attention is counted in full (PaLM, https://arxiv.org/abs/2204.02311, appendix B). Of an
    encoder-decoder it is one token on either side together.
    """
    return sum(flops_by_part(config))


def flops_by_part(config: ModelConfig, *, all_pairs: bool = True) -> tuple[float, float]:
    """The two terms of `flops_per_token`: of the matrices, and of attention.

    Args:
        all_pairs: of query and key, those that a causal mask hides too, as PaLM counts; else half of them.
    """
    counts = parameters(config)
    output = (config.vocab_size or 0) * config.dim
    looked_up = counts["embeddings"] - (output if config.tied else 0)
    multiplied = sum(counts.values()) - counts["positions"] - looked_up
    window = config.attention.window
    keys = min(config.context, window or config.context)
    causal = keys if all_pairs or (window or config.context) < config.context else keys / 2
    both = config.shape == "encoder-decoder"
    deciding = config.blocks if config.shape == "decoder" else config.blocks - config.layers  # the decoder's blocks
    own = (config.blocks - deciding) * keys + deciding * causal
    other = (config.decoder_layers or config.layers) * config.context if both else 0
    return 6 * multiplied, 12 * config.heads * config.head_width * (own + other)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the device at the moment of a step that needs the most; `total` is what counts."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What that moment adds to the three above: saved for the backward pass, logits, temporaries of the operators."""
    overhead: int
    """On a CPU what the allocator holds beyond the tensors (see HEAP)."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.overhead


def memory(settings: Settings, rows: int, *, device: torch.device, dtype: str = "fp32") -> Memory:
    """Predicts the peak of training with `rows` sequences in each forward and backward pass, uncompiled.

    Args:
        settings: the model with its vocabulary size, and all that changes a step: optimizer, packing, smoothing,
            activation checkpointing.
        rows: the micro-batch.
        dtype: of the matrix products: fp32, bf16 or fp16.

    Rehearsed on PyTorch's operators: ours need less, and the interpreted ones look at values, which are not there.
    On a CPU: with the heap's share (see HEAP), what a process grows by; compiled steps need less.
    """
    passes = 1 if rows == settings.train.batch else 2  # a second micro-batch meets the gradients of the first
    with ops.on_torch(), FakeTensorMode(), _Ledger() as ledger:
        with device:
            model = Transformer(settings.model)
        weights = ledger.live
        for stack in (model.encoder, model.decoder):
            if stack is not None:
                stack.checkpoint_activations = settings.train.checkpoint_activations
        optimizers = build_optimizers(model, settings.optim)
        batch, objective = _empty_batch(settings, rows, device), training_objective(settings.train)
        resident, state = ledger.live, 0
        for _ in range(2):  # the optimizer's state exists from the second step on
            ledger.begin_step()
            for _ in range(passes):
                with torch.autocast(device.type, _AUTOCAST.get(dtype), enabled=dtype in _AUTOCAST):
                    loss = objective(model, batch)
                loss.backward()
                del loss
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            state = ledger.live - resident
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=state,
        activations=ledger.peak - weights - gradients - state,
        overhead=int(HEAP * ledger.peak) + PROCESS if device.type == "cpu" else 0,
    )


def disk(settings: Settings) -> int:
    """Bytes that the checkpoints of a run take at most: those kept, the best one, and the one that is being written."""
    moments = {"sgd": 1}.get(settings.optim.name, 2)  # of Muon it is an upper bound: its matrices have one
    return (settings.train.keep + 2) * 4 * sum(parameters(settings.model).values()) * (1 + moments)


def device_memory(device: torch.device) -> int:
    """Bytes that are free on the device now; on a CPU what the machine and the container's limit leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
    for limit, used in _CGROUPS:
        if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
            free.append(int(text) - int(used.read_text()))
    return max(0, min(free))


def micro_batch(
    settings: Settings,
    *,
    device: torch.device,
    dtype: str,
    free: int | None = None,
    batch: int | None = None,
    parts: int = 1,
) -> int:
    """The most sequences for one forward and backward pass: the largest divisor of the batch that fits the memory.

    A divisor, so that accumulating keeps the tokens of a step. Raises `UserError` with what would help where not even
    one sequence fits.

    Args:
        free: bytes. None: the device's free memory.
        batch: of one of several processes, its share of the batch. None: all of it.
        parts: over how many processes weights, gradients and optimizer are divided.
    """
    batch = batch or settings.train.batch

    def need(rows: int) -> float:
        whole = memory(settings, rows, device=device, dtype=dtype)
        return whole.total - (whole.weights + whole.gradients + whole.optimizer) * (1 - 1 / parts)

    room = SPARE * (device_memory(device) if free is None else free)
    divisors = [rows for rows in range(1, batch + 1) if batch % rows == 0]
    if need(batch) <= room:
        return batch
    low, high = -1, len(divisors) - 1  # divisors[high] is too much, divisors[low] fits
    while high - low > 1:
        middle = (low + high) // 2
        fits = need(divisors[middle]) <= room
        low, high = (middle, high) if fits else (low, middle)
    if low < 0:
        raise UserError(
            f"training needs {need(1) / 2**30:.1f} GiB even with one sequence at a time, and {room / 2**30:.1f} GiB of "
            f"{device.type} memory can be used; lower --model.dim, --model.layers or --model.context"
            + ("" if settings.train.checkpoint_activations else ", or take --train.checkpoint-activations")
        )
    return divisors[low]


class _Ledger(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, by their storages: views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.storages: set[int] = set()

    def begin_step(self) -> None:
        self.peak = self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._enter(x.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages.add(key)
            self.live += size
            weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.live -= size


def _empty_batch(settings: Settings, rows: int, device: torch.device) -> Batch:
    """Ids and shapes as the run's objective makes them."""
    T = settings.model.context
    source = None
    if settings.objective == "span":
        cut = SpanCorruption(
            document_id=0,
            end_id=0,
            sentinel_ids=range(T),
            rate=settings.data.mask_rate,
            span_length=settings.data.span_length,
        )
        length = cut.sizes(T)[0]
        removed, spans = cut.counts(length)
        source, T = torch.zeros(rows, length - removed + spans, dtype=torch.long, device=device), removed + spans + 1
    ids = torch.zeros(rows, T, dtype=torch.long, device=device)
    packed = settings.data.separate or settings.objective != "next-token"
    return Batch(
        ids=ids,
        targets=ids.clone(),
        samples=tuple(range(rows)),
        segments=torch.zeros_like(ids) if packed else None,
        source=source,
        source_segments=None if source is None else torch.zeros_like(source),
    )

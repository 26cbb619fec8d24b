"""One run's settings: tokenizer, data, optimizer, loop, and what they add up to."""

from dataclasses import dataclass, field
from typing import Literal

from minillm.config.model import ModelConfig
from minillm.config.strict import check_types, require


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    type: Literal["bpe", "unigram", "char"] = "bpe"
    vocab_size: int = 4096
    """Pieces, special tokens included; char takes every character of the training text instead."""
    path: str | None = None
    """Folder of a tokenizer to use as it is. None: train one on the training text."""

    def __post_init__(self) -> None:
        check_types(self, "tokenizer.")
        require(self.vocab_size >= 1, f"tokenizer.vocab_size must be positive, not {self.vocab_size}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    objective: Literal["next-token", "masked", "span"] | None = None
    """What is predicted. None: next-token for a decoder, masked for an encoder, span for an encoder-decoder."""
    validation: float = 0.05
    """Share of the documents held out, chosen by the hash of each; of a single file its last part (see `--data`)."""
    separate: bool = True
    """Packed documents do not see each other, and positions restart in each."""
    mask_rate: float = 0.15
    """masked, span: share of the tokens that is hidden."""
    whole_words: bool = False
    """masked: hide whole words instead of single pieces."""
    span_length: float = 3.0
    """span: mean length of a hidden span, in tokens (T5)."""
    workers: int | None = None
    """Processes that tokenize. None: as many as there are cores."""

    def __post_init__(self) -> None:
        check_types(self, "data.")
        require(0 < self.validation < 1, f"data.validation must be in (0, 1), not {self.validation}")
        require(0 < self.mask_rate < 1, f"data.mask_rate must be in (0, 1), not {self.mask_rate}")
        require(self.span_length >= 1, f"data.span_length must be at least 1, not {self.span_length}")
        require(self.workers is None or self.workers >= 1, f"data.workers must be at least 1, not {self.workers}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: Literal["adamw", "adam", "sgd", "muon"] = "adamw"
    """muon: Muon for the matrices inside the blocks, AdamW for the rest."""
    lr: float = 1e-3
    """Peak learning rate; with muon that of AdamW's share."""
    embedding_lr: float | None = None
    """Peak learning rate of what is looked up: embeddings of tokens, positions and n-grams. None: `lr`."""
    transfer: bool = False
    """`lr` is that of a model 256 wide: AdamW moves a matrix that is w wide by lr · 256 / w, so that one rate suits all
    widths (muP, https://arxiv.org/abs/2203.03466); Muon's steps have the same size at any width."""
    muon_lr: float = 0.02
    weight_decay: float = 0.1
    """Decoupled, on matrices and embeddings only: norms and biases are left alone."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    """sgd, muon."""
    clip: float | None = 1.0
    """Largest norm of the whole gradient."""
    l1: float = 0.0
    """Adds l1 · Σ|w| over the matrices to the loss."""
    l2: float = 0.0
    """Adds l2 / 2 · Σw² over the matrices to the loss (coupled, unlike weight_decay)."""
    schedule: Literal["cosine", "linear", "wsd", "constant", "range"] = "cosine"
    """wsd: warm-up, stable, decay; only the last `decay` share of the steps falls, linearly. range: rises from
    lr / 10,000 to lr, to find out which rate suits a run: give it a high one, as 1, and some 100 steps."""
    warmup: float = 0.02
    """Share of the steps in which the rate rises from 0."""
    decay: float = 0.3
    """wsd: share of the steps in which the rate falls."""
    final_lr: float = 0.1
    """Where the rate ends, as a share of its peak."""

    def __post_init__(self) -> None:
        check_types(self, "optim.")
        for name in ("lr", "embedding_lr", "muon_lr", "eps"):
            value = getattr(self, name)
            require(value is None or value > 0, f"optim.{name} must be positive, not {value}")
        for name in ("weight_decay", "l1", "l2"):
            require(getattr(self, name) >= 0, f"optim.{name} must not be negative, not {getattr(self, name)}")
        for name in ("beta1", "beta2", "momentum"):
            require(0 <= getattr(self, name) < 1, f"optim.{name} must be in [0, 1), not {getattr(self, name)}")
        for name in ("warmup", "decay", "final_lr"):
            require(0 <= getattr(self, name) <= 1, f"optim.{name} must be in [0, 1], not {getattr(self, name)}")
        require(self.clip is None or self.clip > 0, f"optim.clip must be positive, not {self.clip}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    batch: int = 32
    """Sequences in one optimizer step."""
    micro_batch: int | None = None
    """Sequences in one forward and backward pass; a step accumulates as many as it needs. None: what fits; a long run
    on a CPU tries whether fewer are faster."""
    eval_every: int | None = None
    """Steps between validations. None: a tenth of the run, of `minutes` a fifth; more where that would take over a
    twentieth of the time (a fifth where they choose the best step)."""
    save_every: int | None = None
    """Steps between checkpoints. None: a tenth of the run, of `minutes` a fifth, or `eval_every`."""
    log_every: int | None = None
    """Steps between lines of the log. None: a hundredth of the run."""
    keep: int = 2
    """Checkpoints that stay: the newest ones; the best one stays too."""
    patience: int | None = None
    """Early stopping: end after so many validations without a better loss, and restore the best."""
    skip_spikes: int | None = None
    """So many steps in a row, at most, are passed over whose loss or gradient is not finite, or whose gradient is far
    larger than usual (see training/guard.py); one more ends the run. None: the first that is not finite ends it."""
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    """Adds z_loss · log²Z of the softmax's denominator Z (PaLM)."""
    checkpoint_activations: bool = False
    """Recompute each block's inside in the backward pass: less memory, about a third more time."""
    threads: int | None = None
    """CPU threads. None: as many as there are cores; a long run tries whether fewer are faster."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: ddp, a whole model on each process; fsdp, a part of every tensor on each (fully_shard)."""
    shard_ranks: int | None = None
    """fsdp: over how many processes a tensor is divided; groups of so many hold copies of each other. None: all."""
    reshard: bool = True
    """fsdp: let go of a block's gathered weights after its forward pass, and gather them again for the backward."""
    gather_dtype: Literal["fp32", "bf16"] = "fp32"
    """fsdp: in what weights travel and are computed with; the weights that are trained stay fp32."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Under torchrun: in what gradients travel and are summed."""
    stall_seconds: float = 20.0
    """Under torchrun: a process for which the others have waited so long ends the run, which names it."""
    sample_prompt: str | None = None
    """What is continued at 0 %, 25 % and 100 % of the run. None: a prompt that suits the data."""
    sample_tokens: int = 160

    def __post_init__(self) -> None:
        check_types(self, "train.")
        counts = ("batch", "micro_batch", "eval_every", "save_every", "log_every", "keep", "patience", "skip_spikes")
        for name in (*counts, "threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"train.{name} must be at least 1, not {value}")
        require(self.shard_ranks is None or self.shard_ranks >= 1, "train.shard_ranks must be at least 1")
        require(self.stall_seconds >= 1, f"train.stall_seconds must be at least 1, not {self.stall_seconds}")
        if self.parallel == "ddp":
            for name, off in (("shard_ranks", None), ("reshard", True), ("gather_dtype", "fp32")):
                require(getattr(self, name) == off, f"train.{name} needs train.parallel=fsdp")
        require(self.sample_tokens >= 0, f"train.sample_tokens must not be negative, not {self.sample_tokens}")
        require(0 <= self.label_smoothing < 1, f"train.label_smoothing must be in [0, 1), not {self.label_smoothing}")
        require(self.z_loss >= 0, f"train.z_loss must not be negative, not {self.z_loss}")


Kernels = Literal["auto", "triton", "torch"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run: what is trained, on what, for how long."""

    preset: str = "default"
    source: str = "stdlib"
    """SOURCE: stdlib, installed, a file, a folder of text, or a folder of prepared shards."""
    steps: int | None = None
    """Optimizer steps. None: as many as `minutes` allows."""
    minutes: float | None = None
    """Time for training; the speed is measured first, and the schedule planned to end on time."""
    seed: int = 1
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the matrix products; weights stay fp32. auto: bf16 where the hardware multiplies it and the model is wide
    enough, else fp32; a long run on a CPU tries both."""
    kernels: Kernels = "auto"
    """auto: our Triton kernels on a GPU, PyTorch's elsewhere."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. auto: on a GPU, and on a CPU where a run of ten minutes or more finds it faster."""
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_types(self)
        require(self.seed >= 0, f"seed must not be negative, not {self.seed}")
        require(self.steps is None or self.steps >= 1, f"steps must be at least 1, not {self.steps}")
        require(self.minutes is None or self.minutes > 0, f"minutes must be positive, not {self.minutes}")
        require(
            self.optim.schedule != "range" or self.train.skip_spikes is None,
            "train.skip_spikes does not go with optim.schedule=range, which ends where the loss is not finite",
        )
        fits = {"decoder": "next-token", "encoder": "masked", "encoder-decoder": "span"}[self.model.shape]
        require(
            self.data.objective in (None, fits),
            f"data.objective={self.data.objective} does not fit model.shape={self.model.shape}, which learns by {fits}",
        )
        require(
            self.model.shape == "decoder" or self.tokenizer.type != "char",
            f"tokenizer.type=char has no mask tokens, which model.shape={self.model.shape} needs; take bpe or unigram",
        )
        micro = self.train.micro_batch
        require(
            micro is None or self.train.batch % micro == 0,
            f"train.batch ({self.train.batch}) is not a multiple of train.micro_batch ({micro})",
        )

    @property
    def objective(self) -> str:
        return {"decoder": "next-token", "encoder": "masked", "encoder-decoder": "span"}[self.model.shape]

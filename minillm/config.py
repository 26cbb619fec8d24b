"""Settings: frozen dataclasses, five sections (model, tokenizer, data, optim, train) and the run they add up to.

Values are checked where they are made: an impossible combination raises `UserError`, which names the field.
`None` means off, or "follows from the others"; the docstring under each field says which.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """What the user gave is wrong: one line that says what, where and how to mend it (exit code 2)."""


class DamagedFile(UserError):
    """A file is not what was once written (exit code 3)."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_types(config: Any, section: str = "") -> None:
    """Settings made in Python are held to what `from_dict` asks of a file: types, names of variants, finite numbers."""
    for name, hint in typing.get_type_hints(type(config)).items():
        _convert(hint, getattr(config, name), section + name)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Who looks at whom, and how the scores are made."""

    bias: bool = False
    """Whether the query, key, value and output projections have biases."""
    qk_norm: bool = False
    """RMSNorm over the head width of queries and keys, before they are rotated (Qwen3)."""
    window: int | None = None
    """Sliding window: how many tokens a token sees to its left, itself included (Mistral). None: all."""
    softcap: float | None = None
    """Scores become softcap · tanh(score / softcap) (Gemma 2)."""

    def __post_init__(self) -> None:
        _check_types(self, "attention.")
        _require(
            self.window is None or 1 <= self.window < 2**31,
            f"attention.window must be between 1 and 2³¹, not {self.window}",
        )
        _require(self.softcap is None or self.softcap > 0, f"attention.softcap must be positive, not {self.softcap}")


MLPKind = Literal["gelu", "gelu-tanh", "relu", "relu2", "silu", "tanh", "swiglu", "geglu"]


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """The feed-forward half of a block."""

    kind: MLPKind = "swiglu"
    """Activation; swiglu and geglu have a gate, and so a third matrix."""
    hidden_dim: int | None = None
    """Width inside. None: 4 · dim, or with a gate 8/3 · dim rounded up to a multiple of 64 (equal parameters)."""
    bias: bool = False

    def __post_init__(self) -> None:
        _check_types(self, "mlp.")
        _require(
            self.hidden_dim is None or 1 <= self.hidden_dim < 2**31,
            f"mlp.hidden_dim must be between 1 and 2³¹, not {self.hidden_dim}",
        )

    @property
    def gated(self) -> bool:
        return self.kind in ("swiglu", "geglu")


@dataclass(frozen=True, kw_only=True)
class PositionConfig:
    """How a token knows where it stands."""

    kind: Literal["none", "learned", "sinusoidal", "rope", "alibi"] = "rope"
    theta: float = 10_000.0
    """RoPE: base of the wavelengths."""
    scaling: Literal["linear", "llama3"] | None = None
    """RoPE beyond the context it was trained for: all frequencies divided, or only the slow ones (Llama 3.1)."""
    scaling_factor: float = 8.0
    original_context: int = 8192
    """llama3: the context before scaling."""
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0

    def __post_init__(self) -> None:
        _check_types(self, "position.")
        _require(self.theta > 0, f"position.theta must be positive, not {self.theta}")
        _require(self.scaling_factor > 0, f"position.scaling_factor must be positive, not {self.scaling_factor}")
        _require(self.original_context >= 1, f"position.original_context must be positive, not {self.original_context}")
        _require(
            self.high_frequency_factor > self.low_frequency_factor,
            "position.high_frequency_factor must be above position.low_frequency_factor",
        )


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """What keeps the scale of the residual stream in hand."""

    kind: Literal["layer", "rms"] = "rms"
    placement: Literal["pre", "post"] = "pre"
    """pre: x + f(norm(x)), with one more norm at the end; post: norm(x + f(x)), as the original and BERT."""
    eps: float = 1e-6
    bias: bool = False
    """LayerNorm's bias; RMSNorm has none."""
    embedding: bool = False
    """Also a norm directly on the embeddings (BERT, BART)."""

    def __post_init__(self) -> None:
        _check_types(self, "norm.")
        _require(self.eps > 0, f"norm.eps must be positive, not {self.eps}")
        _require(not (self.bias and self.kind == "rms"), "norm.bias needs norm.kind=layer: RMSNorm has no bias")


@dataclass(frozen=True, kw_only=True)
class SpeedrunConfig:
    """What only the speed recipe uses (minillm/model/speedrun.py); such a model has no published format."""

    ngrams: int = 0
    """The longest run of tokens with an embedding of its own, by its hash; 4: pairs, triples and fours. 0: none."""
    ngram_rows: int = 16384
    """Rows of the table of each length."""
    ngram_dim: int = 64
    """Width of a table's rows."""
    ngram_dropout: float = 0.0
    """Share of the rows that training leaves out, each length by itself: for texts that are read several times."""
    mix: bool = False
    """Each block reads a · stream + b · embeddings, with a and b learned."""

    def __post_init__(self) -> None:
        _check_types(self, "speedrun.")
        fits = self.ngrams == 0 or 2 <= self.ngrams <= 16
        _require(fits, f"speedrun.ngrams must be 0, or 2 to 16, not {self.ngrams}")
        for name in ("ngram_rows", "ngram_dim"):
            value = getattr(self, name)
            _require(1 <= value < 2**31, f"speedrun.{name} must be between 1 and 2³¹, not {value}")
        rate = self.ngram_dropout
        _require(0 <= rate < 1, f"speedrun.ngram_dropout must be in [0, 1), not {rate}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One Transformer: its shape, its sizes, its parts."""

    shape: Literal["decoder", "encoder", "encoder-decoder"] = "decoder"
    layers: int = 6
    """Blocks; of an encoder-decoder those of the encoder."""
    decoder_layers: int | None = None
    """Blocks of an encoder-decoder's decoder. None: as many as `layers`."""
    heads: int = 6
    kv_heads: int | None = None
    """Key/value heads, shared by heads / kv_heads query heads each (GQA). None: as many as `heads`."""
    head_dim: int | None = None
    """Width of one head. None: dim / heads."""
    dim: int = 384
    """Width of the residual stream."""
    context: int = 256
    """Tokens that the model is trained to see at once."""
    vocab_size: int | None = None
    """Rows of the embedding. None: the tokenizer's size, filled in when it is known."""
    token_types: int = 0
    """Rows of a second embedding for sentence pairs (BERT has 2)."""
    source_embedding: bool = False
    """The encoder of an encoder-decoder has an embedding of its own; else both sides share one."""
    tied: bool = True
    """The output matrix is the embedding."""
    dropout: float = 0.0
    """On embeddings and on what each half-block adds; not on attention probabilities."""
    embedding_scale: bool = False
    """Embeddings are multiplied by sqrt(dim), as in the original."""
    output_transform: bool = False
    """A dense layer, an activation and a norm before the output matrix (BERT's masked-LM head)."""
    output_bias: bool = False
    """A bias on the logits (BERT, BART)."""
    softcap: float | None = None
    """Logits become softcap · tanh(logit / softcap)."""
    init: Literal["normal", "xavier", "scaled"] = "normal"
    """normal: N(0, init_std), what ends a half-block divided by sqrt(2 · layers) (GPT-2); xavier: Glorot's uniform;
    scaled: by each matrix's width, what ends a half-block 0 (see model/initialize.py)."""
    init_std: float = 0.02
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mlp: MLPConfig = field(default_factory=MLPConfig)
    position: PositionConfig = field(default_factory=PositionConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    speedrun: SpeedrunConfig = field(default_factory=SpeedrunConfig)

    def __post_init__(self) -> None:
        _check_types(self, "model.")
        for name in ("layers", "decoder_layers"):  # each is a module: a damaged number would take hours to build
            value = getattr(self, name)
            _require(value is None or 1 <= value <= 4096, f"model.{name} must be between 1 and 4096, not {value}")
        for name in ("heads", "kv_heads", "head_dim", "dim", "context", "vocab_size"):
            value = getattr(self, name)
            _require(value is None or 1 <= value < 2**31, f"model.{name} must be between 1 and 2³¹, not {value}")
        _require(
            self.head_dim is not None or self.dim % self.heads == 0,
            f"model.dim ({self.dim}) is not a multiple of model.heads ({self.heads}); or give model.head_dim",
        )
        _require(
            self.heads % self.key_value_heads == 0,
            f"model.heads ({self.heads}) is not a multiple of model.kv_heads ({self.kv_heads})",
        )
        _require(
            self.position.kind != "rope" or self.head_width % 2 == 0,
            f"position.kind=rope rotates pairs: the head width ({self.head_width}) must be even",
        )
        _require(
            self.position.kind != "sinusoidal" or self.dim % 2 == 0,
            f"position.kind=sinusoidal pairs sines with cosines: model.dim ({self.dim}) must be even",
        )
        _require(0 <= self.dropout < 1, f"model.dropout must be in [0, 1), not {self.dropout}")
        _require(self.softcap is None or self.softcap > 0, f"model.softcap must be positive, not {self.softcap}")
        _require(self.init_std > 0, f"model.init_std must be positive, not {self.init_std}")
        _require(0 <= self.token_types < 2**31, f"model.token_types must be between 0 and 2³¹, not {self.token_types}")
        _require(
            self.decoder_layers is None or self.shape == "encoder-decoder",
            f"model.decoder_layers needs model.shape=encoder-decoder, not {self.shape}",
        )
        _require(
            not self.source_embedding or self.shape == "encoder-decoder",
            f"model.source_embedding needs model.shape=encoder-decoder, not {self.shape}",
        )
        plain = not (self.speedrun.ngrams or self.speedrun.mix)
        _require(
            plain or (self.shape == "decoder" and self.norm.placement == "pre"),
            "model.speedrun needs model.shape=decoder and norm.placement=pre",
        )

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.dim // self.heads

    @property
    def mlp_width(self) -> int:
        if self.mlp.hidden_dim:
            return self.mlp.hidden_dim
        return 64 * math.ceil(8 * self.dim / 3 / 64) if self.mlp.gated else 4 * self.dim

    @property
    def blocks(self) -> int:
        """All blocks of the model, encoder and decoder together."""
        return self.layers + (self.decoder_layers or self.layers if self.shape == "encoder-decoder" else 0)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    type: Literal["bpe", "unigram", "char"] = "bpe"
    vocab_size: int = 4096
    """Pieces, special tokens included; char takes every character of the training text instead."""
    path: str | None = None
    """Folder of a tokenizer to use as it is. None: train one on the training text."""

    def __post_init__(self) -> None:
        _check_types(self, "tokenizer.")
        _require(self.vocab_size >= 1, f"tokenizer.vocab_size must be positive, not {self.vocab_size}")


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
        _check_types(self, "data.")
        _require(0 < self.validation < 1, f"data.validation must be in (0, 1), not {self.validation}")
        _require(0 < self.mask_rate < 1, f"data.mask_rate must be in (0, 1), not {self.mask_rate}")
        _require(self.span_length >= 1, f"data.span_length must be at least 1, not {self.span_length}")
        _require(self.workers is None or self.workers >= 1, f"data.workers must be at least 1, not {self.workers}")


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
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """wsd: warm-up, stable, decay; only the last `decay` share of the steps falls, linearly."""
    warmup: float = 0.02
    """Share of the steps in which the rate rises from 0."""
    decay: float = 0.3
    """wsd: share of the steps in which the rate falls."""
    final_lr: float = 0.1
    """Where the rate ends, as a share of its peak."""

    def __post_init__(self) -> None:
        _check_types(self, "optim.")
        for name in ("lr", "embedding_lr", "muon_lr", "eps"):
            value = getattr(self, name)
            _require(value is None or 0 < value < math.inf, f"optim.{name} must be positive, not {value}")
        for name in ("weight_decay", "l1", "l2"):
            _require(getattr(self, name) >= 0, f"optim.{name} must not be negative, not {getattr(self, name)}")
        for name in ("beta1", "beta2", "momentum"):
            _require(0 <= getattr(self, name) < 1, f"optim.{name} must be in [0, 1), not {getattr(self, name)}")
        for name in ("warmup", "decay", "final_lr"):
            _require(0 <= getattr(self, name) <= 1, f"optim.{name} must be in [0, 1], not {getattr(self, name)}")
        _require(self.clip is None or self.clip > 0, f"optim.clip must be positive, not {self.clip}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    batch: int = 32
    """Sequences in one optimizer step."""
    micro_batch: int | None = None
    """Sequences in one forward and backward pass; a step accumulates as many as it needs. None: what fits."""
    eval_every: int | None = None
    """Steps between validations. None: a tenth of the run; of `minutes` as many as cost a twentieth of them."""
    save_every: int | None = None
    """Steps between checkpoints. None: as often as validations; in `minutes` at least five."""
    log_every: int | None = None
    """Steps between lines of the log. None: a hundredth of the run."""
    keep: int = 2
    """Checkpoints that stay: the newest ones; the best one stays too."""
    patience: int | None = None
    """Early stopping: end after so many validations without a better loss, and restore the best."""
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    """Adds z_loss · log²Z of the softmax's denominator Z (PaLM)."""
    checkpoint_activations: bool = False
    """Recompute each block's inside in the backward pass: less memory, about a third more time."""
    threads: int | None = None
    """CPU threads. None: as many as there are cores."""
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
        _check_types(self, "train.")
        for name in ("batch", "micro_batch", "eval_every", "save_every", "log_every", "keep", "patience", "threads"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"train.{name} must be at least 1, not {value}")
        _require(self.shard_ranks is None or self.shard_ranks >= 1, "train.shard_ranks must be at least 1")
        _require(self.stall_seconds >= 1, f"train.stall_seconds must be at least 1, not {self.stall_seconds}")
        if self.parallel == "ddp":
            for name, off in (("shard_ranks", None), ("reshard", True), ("gather_dtype", "fp32")):
                _require(getattr(self, name) == off, f"train.{name} needs train.parallel=fsdp")
        _require(self.sample_tokens >= 0, f"train.sample_tokens must not be negative, not {self.sample_tokens}")
        _require(0 <= self.label_smoothing < 1, f"train.label_smoothing must be in [0, 1), not {self.label_smoothing}")
        _require(self.z_loss >= 0, f"train.z_loss must not be negative, not {self.z_loss}")


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
    """Of the matrix products; weights stay fp32. auto: bf16 on a GPU that has it, else fp32."""
    kernels: Kernels = "auto"
    """auto: our Triton kernels on a GPU, PyTorch's elsewhere."""
    compile: Literal["auto", "on", "off"] = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self.seed >= 0, f"seed must not be negative, not {self.seed}")
        _require(self.steps is None or self.steps >= 1, f"steps must be at least 1, not {self.steps}")
        _require(self.minutes is None or 0 < self.minutes < math.inf, f"minutes must be positive, not {self.minutes}")
        fits = {"decoder": "next-token", "encoder": "masked", "encoder-decoder": "span"}[self.model.shape]
        _require(
            self.data.objective in (None, fits),
            f"data.objective={self.data.objective} does not fit model.shape={self.model.shape}, which learns by {fits}",
        )
        _require(
            self.model.shape == "decoder" or self.tokenizer.type != "char",
            f"tokenizer.type=char has no mask tokens, which model.shape={self.model.shape} needs; take bpe or unigram",
        )
        micro = self.train.micro_batch
        _require(
            micro is None or self.train.batch % micro == 0,
            f"train.batch ({self.train.batch}) is not a multiple of train.micro_batch ({micro})",
        )

    @property
    def objective(self) -> str:
        return {"decoder": "next-token", "encoder": "masked", "encoder-decoder": "span"}[self.model.shape]


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` laid on top, section by section."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            value = merge(merged[key], value)
        merged[key] = value
    return merged


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass of settings as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """Builds a dataclass of settings from plain JSON values; what is missing takes its default.

    Raises `UserError` that names the field for an unknown name, a value of the wrong type or a bad combination.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where.rstrip('.') or cls.__name__} must be a table of settings, not {_show(values)}")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1) if isinstance(name, str) else []
            shown = name if isinstance(name, str) and name.isprintable() and len(name) <= 40 else _show(name)
            raise UserError(f"unknown setting {where}{shown}" + (f"; did you mean {where}{near[0]}?" if near else ""))
    return cls(**{name: _convert(hints[name], value, where + name) for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint` asks, where JSON and TOML know fewer types than Python."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        return from_dict(hint, value, where + ".")
    options = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # int | None; Literal[…] | None makes the second
        if value is None and type(None) in options:
            return None
        return _convert(next(option for option in options if option is not type(None)), value, where)
    if typing.get_origin(hint) is Literal:
        _require(value in options, f"{where} must be one of {', '.join(map(str, options))}, not {_show(value)}")
        return value
    if type(value) is int:
        _require(abs(value) < 2**63, f"{where} must be below 2⁶³, not {_show(value)}")
        value = float(value) if hint is float else value
    _require(type(value) is hint, f"{where} must be of type {hint.__name__}, not {_show(value)}")
    _require(hint is not float or math.isfinite(value), f"{where} must be finite, not {value}")
    return value


def _show(value: Any) -> str:
    """A value in a few characters, however long it is; what may be nested without end is not looked into."""
    if isinstance(value, list | tuple | Mapping):
        return f"a {type(value).__name__}"
    if type(value) is int and abs(value) >= 2**63:
        return f"a number of {value.bit_length()} bits"
    text = repr(value[:40] if isinstance(value, str) else value)
    return text if len(text) <= 42 else text[:42] + "…"

"""One Transformer's settings: its shape, its sizes, its parts."""

import math
from dataclasses import dataclass, field
from typing import Literal

from minillm.config.strict import check_types, require


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
        check_types(self, "attention.")
        require(
            self.window is None or 1 <= self.window < 2**31,
            f"attention.window must be between 1 and 2³¹, not {self.window}",
        )
        require(self.softcap is None or self.softcap > 0, f"attention.softcap must be positive, not {self.softcap}")


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
        check_types(self, "mlp.")
        require(
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
        check_types(self, "position.")
        require(self.theta > 0, f"position.theta must be positive, not {self.theta}")
        require(self.scaling_factor > 0, f"position.scaling_factor must be positive, not {self.scaling_factor}")
        require(self.original_context >= 1, f"position.original_context must be positive, not {self.original_context}")
        require(
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
        check_types(self, "norm.")
        require(self.eps > 0, f"norm.eps must be positive, not {self.eps}")
        require(not (self.bias and self.kind == "rms"), "norm.bias needs norm.kind=layer: RMSNorm has no bias")


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

    def __post_init__(self) -> None:
        check_types(self, "speedrun.")
        fits = self.ngrams == 0 or 2 <= self.ngrams <= 16
        require(fits, f"speedrun.ngrams must be 0, or 2 to 16, not {self.ngrams}")
        for name in ("ngram_rows", "ngram_dim"):
            value = getattr(self, name)
            require(1 <= value < 2**31, f"speedrun.{name} must be between 1 and 2³¹, not {value}")
        rate = self.ngram_dropout
        require(0 <= rate < 1, f"speedrun.ngram_dropout must be in [0, 1), not {rate}")


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
    init: Literal["normal", "xavier"] = "normal"
    """normal: N(0, init_std), what ends a half-block divided by sqrt(2 · layers) (GPT-2); xavier: Glorot's uniform."""
    init_std: float = 0.02
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mlp: MLPConfig = field(default_factory=MLPConfig)
    position: PositionConfig = field(default_factory=PositionConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    speedrun: SpeedrunConfig = field(default_factory=SpeedrunConfig)

    def __post_init__(self) -> None:
        check_types(self, "model.")
        for name in ("layers", "decoder_layers"):  # each is a module: a damaged number would take hours to build
            value = getattr(self, name)
            require(value is None or 1 <= value <= 4096, f"model.{name} must be between 1 and 4096, not {value}")
        for name in ("heads", "kv_heads", "head_dim", "dim", "context", "vocab_size"):
            value = getattr(self, name)
            require(value is None or 1 <= value < 2**31, f"model.{name} must be between 1 and 2³¹, not {value}")
        require(
            self.head_dim is not None or self.dim % self.heads == 0,
            f"model.dim ({self.dim}) is not a multiple of model.heads ({self.heads}); or give model.head_dim",
        )
        require(
            self.heads % self.key_value_heads == 0,
            f"model.heads ({self.heads}) is not a multiple of model.kv_heads ({self.kv_heads})",
        )
        require(
            self.position.kind != "rope" or self.head_width % 2 == 0,
            f"position.kind=rope rotates pairs: the head width ({self.head_width}) must be even",
        )
        require(
            self.position.kind != "sinusoidal" or self.dim % 2 == 0,
            f"position.kind=sinusoidal pairs sines with cosines: model.dim ({self.dim}) must be even",
        )
        require(0 <= self.dropout < 1, f"model.dropout must be in [0, 1), not {self.dropout}")
        require(self.softcap is None or self.softcap > 0, f"model.softcap must be positive, not {self.softcap}")
        require(self.init_std > 0, f"model.init_std must be positive, not {self.init_std}")
        require(0 <= self.token_types < 2**31, f"model.token_types must be between 0 and 2³¹, not {self.token_types}")
        require(
            self.decoder_layers is None or self.shape == "encoder-decoder",
            f"model.decoder_layers needs model.shape=encoder-decoder, not {self.shape}",
        )
        require(
            not self.source_embedding or self.shape == "encoder-decoder",
            f"model.source_embedding needs model.shape=encoder-decoder, not {self.shape}",
        )
        require(
            not self.speedrun.ngrams or (self.shape == "decoder" and self.norm.placement == "pre"),
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

"""The Transformer, in its three shapes: decoder (GPT, Llama), encoder (BERT), encoder-decoder (the original, BART).

    ids -> embedding -> stack of blocks -> head -> logits

B batch, T tokens, S source tokens (of the encoder, where there are two), V vocabulary, dim the stream's width.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillm import ops
from minillm.config import ModelConfig, UserError
from minillm.model.attention import View
from minillm.model.block import PostNormBlock, PreNormBlock
from minillm.model.cache import KVCache
from minillm.model.initialize import initialize
from minillm.model.linear import Linear
from minillm.model.mlp import ACTIVATIONS
from minillm.model.norm import build_norm
from minillm.model.position import build_position, document_positions
from minillm.model.speedrun import NgramEmbedding, tokens_before


class Front(nn.Module):
    """What stands in front of every document of a stack: nothing in a plain model.

    Prefix tuning and soft prompts (minillm/peft/prefix.py) put their own here. Tokens count their positions from
    `length` on.
    """

    length = 0

    def forward(self, x: Tensor, at: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """x [B, T, dim], at [T] or [B, T] as a stack is given them; what is put before them is cut off its output."""
        return x, at

    def fill(self, cache: KVCache, stack: "Stack", view: View) -> None:
        """Writes what stands in front into an empty cache; without one `forward` puts it there."""


class Stack(nn.Module):
    """Positions, then `layers` blocks: an encoder (causal=False) or a decoder.

    Args:
        cross: each block also reads an encoder's output.
    """

    def __init__(self, config: ModelConfig, layers: int, *, causal: bool, cross: bool):
        super().__init__()
        self.front = Front()
        self.position = build_position(config)
        self.embedding_norm = build_norm(config.dim, config.norm) if config.norm.embedding else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.pre_norm = config.norm.placement == "pre"
        block = PreNormBlock if self.pre_norm else PostNormBlock
        self.blocks = nn.ModuleList(block(config, i, causal=causal, cross=cross) for i in range(layers))
        self.final_norm = build_norm(config.dim, config.norm) if self.pre_norm else None
        self.checkpoint_activations = False
        self.compiled: Callable[..., Any] | None = None

    def compile_blocks(self, compiled: Callable[..., Any] | None) -> None:
        """Training goes through `compiled`, torch.compile's version of `call_block`; None: as written.

        One compilation serves all blocks, since they differ in their weights alone: a fraction of what the compilation
        of the whole model takes. Validation and generation, whose shapes differ, run as written.
        """
        self.compiled = compiled

    def forward(self, x: Tensor, at: Tensor, view: View) -> Tensor:
        """x [B, T, dim] token embeddings, at [T] or [B, T] their positions -> [B, T, dim]"""
        T = x.shape[1]
        if view.cache is None:
            x, at = self.front(x, at, view)
        view.rotation, view.slopes = self.position.rotation(at), self.position.slopes(x.device)
        x = self.dropout(self.embedding_norm(self.position.add(x, at)))
        if not self.pre_norm:
            for block in self.blocks:
                x = self._run(block, x, view)
            return x[:, x.shape[1] - T :]
        new, stream = torch.zeros_like(x, dtype=_product_dtype(x)), x
        if self.compiled is not None:  # as all later blocks find it, so that one compilation serves them
            new.requires_grad_(x.requires_grad)
        for block in self.blocks:
            new, stream = self._run(block, new, stream, view)
        x, _ = self.final_norm(new, stream)
        return x[:, x.shape[1] - T :]

    def _run(self, block: nn.Module, *inputs):
        compiled = self.compiled if self.training and torch.is_grad_enabled() else None
        call = call_block if compiled is None else compiled
        if self.checkpoint_activations and self.training:
            return checkpoint(call, block, *inputs, use_reentrant=False)
        return call(block, *inputs)


def call_block(block: nn.Module, *inputs):
    return block(*inputs)


def _product_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer makes of x here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Head(nn.Module):
    """Final states [B, T, dim] -> logits [B, T, V]; a tied output matrix is the embedding's, and is passed in."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.vocab_size is not None  # Transformer has asked
        self.softcap = config.softcap
        self.dense = Linear(config.dim, config.dim) if config.output_transform else None
        if config.output_transform:
            self.activation = ACTIVATIONS[config.mlp.kind]
            self.norm = build_norm(config.dim, config.norm)
        self.weight = None if config.tied else nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.output_bias else None

    def transform(self, x: Tensor) -> Tensor:
        """What stands between the last block and the output matrix: nothing, or BERT's dense layer and norm."""
        return x if self.dense is None else self.norm(self.activation(self.dense(x)))

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        logits = ops.linear(self.transform(x), weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _token_ids(ids: Tensor, name: str) -> Tensor:
    """int64: shards hold uint16, which torch does not look up, and hashes of int32 would overflow."""
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UserError(f"`{name}` must be integers [B, T], not {ids.dtype} of shape {list(ids.shape)}")
    return ids.long()


class Transformer(nn.Module):
    """The one model definition; `config.shape` says which of its two stacks exist.

    Raises `UserError` where the config still lacks its vocabulary size or combines what cannot work.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.vocab_size is None:
            raise UserError("model.vocab_size is not set; give it, or let a tokenizer fill it in")
        if config.output_transform and config.mlp.gated:
            raise UserError(f"model.output_transform needs an MLP without a gate, not mlp.kind={config.mlp.kind}")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.source_embedding = nn.Embedding(config.vocab_size, config.dim) if config.source_embedding else None
        self.type_embedding = nn.Embedding(config.token_types, config.dim) if config.token_types else None
        self.ngram_embedding = NgramEmbedding(config) if config.speedrun.ngrams else None
        has_encoder, has_decoder = config.shape != "decoder", config.shape != "encoder"
        self.encoder = Stack(config, config.layers, causal=False, cross=False) if has_encoder else None
        layers = config.decoder_layers or config.layers
        self.decoder = Stack(config, layers, causal=True, cross=has_encoder) if has_decoder else None
        self.head = Head(config)
        initialize(self, config)

    @property
    def output_weight(self) -> Tensor:
        """[V, dim]"""
        return self.embedding.weight if self.head.weight is None else self.head.weight

    def forward(self, ids: Tensor, **inputs) -> Tensor:
        """ids [B, T] -> logits [B, T, V]; `inputs` as for `states`."""
        return self.head(self.states(ids, **inputs), self.output_weight)

    def states(
        self,
        ids: Tensor,
        *,
        segments: Tensor | None = None,
        source: Tensor | None = None,
        source_segments: Tensor | None = None,
        token_types: Tensor | None = None,
        cache: KVCache | None = None,
        new: Tensor | None = None,
    ) -> Tensor:
        """The last block's output [B, T, dim], which task heads and the output matrix read.

        Args:
            ids: [B, T] tokens, of any integer dtype; of an encoder-decoder the decoder's.
            segments: [B, T] document of each token. Tokens see their own document only, and positions count within
                it. Negative ids are padding. None: each row is one document.
            source: [B, S] the encoder's tokens, of an encoder-decoder; may be None once a cache has read them.
            source_segments: [B, S] like `segments`; a decoder's token reads the source of its own id (0 by default).
                A cache remembers them with the source.
            token_types: [B, T] sentence of a pair, for models with `token_types`.
            cache: holds the tokens before `ids`, and takes these too; decoders only.
            new: [B] with a cache, how many of the T tokens of each row are real (the rest is padding on the right).

        Raises:
            UserError: ids that are none, an input that this shape cannot read, or more tokens than learned positions or
                the cache hold.
        """
        self._check(segments, source, token_types, cache, new)
        ids = _token_ids(ids, "ids")
        if self.decoder is None:
            assert self.encoder is not None
            x = self._embed(ids, token_types, self.embedding)
            return self.encoder(x, self._positions(ids, segments, self.encoder), View(segments=segments))
        memory = None
        if self.encoder is not None:
            memory = self._memory(source, source_segments, cache)
        x = self._embed(ids, token_types, self.embedding)
        view = View(segments=segments, memory=memory, memory_segments=source_segments, cache=cache)
        if cache is None:
            if self.ngram_embedding is not None:
                x = x + self.ngram_embedding(ids, tokens_before(ids, self.ngram_embedding.back, segments))
            return self.decoder(x, self._positions(ids, segments, self.decoder), view)
        if source_segments is None:
            view.memory_segments = cache.memory_segments
        cache.memory_segments = view.memory_segments
        if cache.longest == 0:
            self.decoder.front.fill(cache, self.decoder, view)
        self._check_room(cache.longest + ids.shape[1])
        cache.begin(ids.shape[1], new)
        if self.ngram_embedding is not None:
            x = x + self.ngram_embedding(ids, cache.tokens_before(ids, self.ngram_embedding.back))
        return self.decoder(x, cache.at, view)

    def encode(self, source: Tensor, source_segments: Tensor | None = None) -> Tensor:
        """An encoder-decoder's encoder alone: source [B, S] -> [B, S, dim]"""
        assert self.encoder is not None
        source, view = _token_ids(source, "source"), View(segments=source_segments)
        x = self._embed(source, None, self.source_embedding or self.embedding)
        return self.encoder(x, self._positions(source, source_segments, self.encoder), view)

    def _memory(self, source: Tensor | None, source_segments: Tensor | None, cache: KVCache | None) -> Tensor:
        if cache is not None and cache.memory:
            return self.embedding.weight  # never read: the cache holds its keys and values
        if source is None:
            raise UserError("an encoder-decoder needs `source`, the encoder's tokens [B, S]")
        return self.encode(source, source_segments)

    def _check(
        self,
        segments: Tensor | None,
        source: Tensor | None,
        token_types: Tensor | None,
        cache: KVCache | None,
        new: Tensor | None,
    ) -> None:
        if source is not None and self.config.shape != "encoder-decoder":
            raise UserError(f"model.shape={self.config.shape} reads no `source`; only an encoder-decoder does")
        if token_types is not None and self.type_embedding is None:
            raise UserError("`token_types` need a model with model.token_types; this one has none")
        if cache is not None and self.decoder is None:
            raise UserError("an encoder reads all tokens at once: it takes no `cache`")
        if cache is not None and segments is not None:
            raise UserError("with a `cache` each row is one document, padded on the right: give `new`, not `segments`")
        if new is not None and cache is None:
            raise UserError("`new` belongs to a `cache`; without one give `segments`, negative where there is padding")

    def _check_room(self, tokens: int) -> None:
        if tokens > self.config.context and self.config.position.kind == "learned":
            raise UserError(
                f"{tokens} tokens do not fit: learned positions end at model.context ({self.config.context})"
            )

    def _positions(self, ids: Tensor, segments: Tensor | None, stack: Stack) -> Tensor:
        T, first = ids.shape[1], stack.front.length
        self._check_room(first + T)
        return first + (torch.arange(T, device=ids.device) if segments is None else document_positions(segments))

    def _embed(self, ids: Tensor, token_types: Tensor | None, embedding: nn.Embedding) -> Tensor:
        x = embedding(ids)
        if self.config.embedding_scale:
            x = x * math.sqrt(self.config.dim)
        if self.type_embedding is not None:
            x = x + self.type_embedding(torch.zeros_like(ids) if token_types is None else token_types)
        return x

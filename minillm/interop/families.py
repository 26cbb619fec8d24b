"""Which tensor of Hugging Face's is which of ours, as one table a family; read in both directions.

A row is (their module, our modules, how): `{i}` counts blocks, and a row stands for the module's weight and bias alike.

    SAME         the same tensor
    TRANSPOSED   GPT-2's Conv1D keeps [in, out] where a linear layer keeps [out, in]
    SPLIT        the same, and side by side for several of ours: GPT-2's c_attn is query, key and value
    OFFSET       BART's table of positions begins with two rows that are never read
    ROW          BART's final_logits_bias is [1, V]

Names are those without the prefix that a model with a head puts before its body ("transformer.", "model.", "bert.").
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SAME, TRANSPOSED, SPLIT, OFFSET, ROW = "same", "transposed", "split", "offset", "row"
BART_OFFSET = 2


@dataclass(frozen=True)
class Row:
    """One row, spelled out: `theirs` a tensor of the file, `ours` one or several of the Transformer."""

    theirs: str
    ours: tuple[str, ...]
    how: str = SAME

    def to_ours(self, tensor: Tensor) -> dict[str, Tensor]:
        """Their tensor -> ours by name. Raises ValueError where the shape cannot be taken apart like that."""
        if self.how in (TRANSPOSED, SPLIT):
            parts = (tensor.t() if tensor.dim() == 2 else tensor).chunk(len(self.ours), 0)
            if len({part.shape for part in parts}) != 1 or len(parts) != len(self.ours):
                raise ValueError(f"{self.theirs} of shape {tuple(tensor.shape)} has no {len(self.ours)} equal parts")
        elif self.how == OFFSET:
            parts = (tensor[BART_OFFSET:],)
        elif self.how == ROW:
            parts = (tensor.flatten(),)
        else:
            parts = (tensor,)
        return dict(zip(self.ours, parts, strict=True))

    def to_theirs(self, tensors: Sequence[Tensor]) -> Tensor:
        """Ours, in the order of `ours` -> their tensor."""
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        if self.how in (TRANSPOSED, SPLIT):
            return tensor.t().contiguous() if tensor.dim() == 2 else tensor
        if self.how == OFFSET:
            return torch.cat((tensor.new_zeros(BART_OFFSET, tensor.shape[1]), tensor))
        return tensor.unsqueeze(0) if self.how == ROW else tensor


Module = tuple[str, str | tuple[str, ...], str]


@dataclass(frozen=True)
class Family:
    """One family's table, and which architectures it covers."""

    architectures: dict[str, bool]
    """architecture -> whether it has a language model's head."""
    prefix: str
    """What a model with a head puts before the names of its body."""
    modules: tuple[Module, ...]
    blocks: tuple[tuple[str, str, tuple[Module, ...]], ...]
    """(their prefix, our stack, modules) of the blocks, for each stack."""
    head: tuple[Module, ...]
    tensors: tuple[Row, ...] = ()
    """Single tensors that are no module's weight or bias."""
    copies: dict[str, str] = field(default_factory=dict)
    """name -> of which tensor it is a copy where the model is tied; files hold either or both."""
    untied: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """name in the table -> where the model is untied, the tensors that may stand for it; the first one there counts."""
    ignored: str = ""
    """Pattern of what files hold besides weights: masks and frequencies that are computed anew."""
    dropped: str = ""
    """Pattern of weights that have no place here; a note says which were left out."""
    renamed: tuple[tuple[str, str], ...] = ()
    """(pattern, replacement) of names that older files use."""
    zeros: str = ""
    """Pattern of our tensors that the family always has and that add something: where ours has none, zeros say so."""

    def rows(self, layers: Mapping[str, int]) -> Iterator[Row]:
        """Every tensor of a model with so many blocks a stack."""
        for theirs, ours, how in self.modules + self.head:
            yield from _module(theirs, ours, how)
        for theirs_prefix, stack, modules in self.blocks:
            for i in range(layers.get(stack, 0)):
                for theirs, ours, how in modules:
                    names = (ours,) if isinstance(ours, str) else ours
                    inside = tuple(f"{stack}.blocks.{i}.{name}" for name in names)
                    yield from _module(theirs_prefix.format(i=i) + theirs, inside, how)
        yield from self.tensors

    def plain_name(self, name: str, prefixes: tuple[str, ...]) -> str:
        """A name of a file in this table's spelling.

        Args:
            prefixes: what a model with a head may put before the names of its body; as a rule the family's own.
        """
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        return name


def in_head(name: str) -> bool:
    """Whether a tensor, by its plain name, belongs to the head, which has no prefix."""
    return name.startswith(("lm_head.", "cls.", "final_logits_bias"))


def _module(theirs: str, ours: str | tuple[str, ...], how: str) -> Iterator[Row]:
    names = (ours,) if isinstance(ours, str) else ours
    for part in ("weight", "bias"):
        yield Row(f"{theirs}.{part}", tuple(f"{name}.{part}" for name in names), how)


_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")

GPT2 = Family(
    architectures={"GPT2Model": False, "GPT2LMHeadModel": True},
    prefix="transformer.",
    modules=(
        ("wte", "embedding", SAME),
        ("wpe", "decoder.position.embedding", SAME),
        ("ln_f", "decoder.final_norm", SAME),
    ),
    blocks=(
        (
            "h.{i}.",
            "decoder",
            (
                ("ln_1", "attention_norm", SAME),
                ("attn.c_attn", _QKV, SPLIT),
                ("attn.c_proj", "attention.out_proj", TRANSPOSED),
                ("ln_2", "mlp_norm", SAME),
                ("mlp.c_fc", "mlp.up_proj", TRANSPOSED),
                ("mlp.c_proj", "mlp.down_proj", TRANSPOSED),
            ),
        ),
    ),
    head=(("lm_head", "head", SAME),),
    copies={"lm_head.weight": "wte.weight"},
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",
    zeros=r"decoder\.(blocks|final_norm).*\.bias",
)

LLAMA = Family(
    architectures={"LlamaModel": False, "LlamaForCausalLM": True},
    prefix="model.",
    modules=(("embed_tokens", "embedding", SAME), ("norm", "decoder.final_norm", SAME)),
    blocks=(
        (
            "layers.{i}.",
            "decoder",
            (
                ("input_layernorm", "attention_norm", SAME),
                ("self_attn.q_proj", "attention.q_proj", SAME),
                ("self_attn.k_proj", "attention.k_proj", SAME),
                ("self_attn.v_proj", "attention.v_proj", SAME),
                ("self_attn.o_proj", "attention.out_proj", SAME),
                ("self_attn.q_norm", "attention.q_norm", SAME),
                ("self_attn.k_norm", "attention.k_norm", SAME),
                ("post_attention_layernorm", "mlp_norm", SAME),
                ("mlp.gate_proj", "mlp.gate_proj", SAME),
                ("mlp.up_proj", "mlp.up_proj", SAME),
                ("mlp.down_proj", "mlp.down_proj", SAME),
            ),
        ),
    ),
    head=(("lm_head", "head", SAME),),
    copies={"lm_head.weight": "embed_tokens.weight"},
    ignored=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)

QWEN3 = Family(
    architectures={"Qwen3Model": False, "Qwen3ForCausalLM": True},
    prefix=LLAMA.prefix,
    modules=LLAMA.modules,
    blocks=LLAMA.blocks,
    head=LLAMA.head,
    copies=LLAMA.copies,
    ignored=LLAMA.ignored,
)

BERT = Family(
    architectures={"BertModel": False, "BertForMaskedLM": True, "BertForPreTraining": True},
    prefix="bert.",
    modules=(
        ("embeddings.word_embeddings", "embedding", SAME),
        ("embeddings.position_embeddings", "encoder.position.embedding", SAME),
        ("embeddings.token_type_embeddings", "type_embedding", SAME),
        ("embeddings.LayerNorm", "encoder.embedding_norm", SAME),
        ("pooler.dense", "pooler", SAME),
    ),
    blocks=(
        (
            "encoder.layer.{i}.",
            "encoder",
            (
                ("attention.self.query", "attention.q_proj", SAME),
                ("attention.self.key", "attention.k_proj", SAME),
                ("attention.self.value", "attention.v_proj", SAME),
                ("attention.output.dense", "attention.out_proj", SAME),
                ("attention.output.LayerNorm", "attention_norm", SAME),
                ("intermediate.dense", "mlp.up_proj", SAME),
                ("output.dense", "mlp.down_proj", SAME),
                ("output.LayerNorm", "mlp_norm", SAME),
            ),
        ),
    ),
    head=(
        ("cls.predictions.transform.dense", "head.dense", SAME),
        ("cls.predictions.transform.LayerNorm", "head.norm", SAME),
        ("cls.predictions.decoder", "head", SAME),
    ),
    copies={
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.bias": "cls.predictions.decoder.bias",
    },
    untied={"cls.predictions.decoder.bias": ("cls.predictions.decoder.bias", "cls.predictions.bias")},
    ignored=r"embeddings\.(position_ids|token_type_ids)",
    dropped=r"cls\.seq_relationship\.(weight|bias)",
    renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    zeros=r"(encoder\.(blocks|embedding_norm)|head\.(dense|norm)).*\.bias|head\.bias|type_embedding\.weight",
)


def _bart_block(*cross: Module) -> tuple[Module, ...]:
    return (
        *((f"self_attn.{name}", f"attention.{name}", SAME) for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
        ("self_attn_layer_norm", "attention_norm", SAME),
        *cross,
        ("fc1", "mlp.up_proj", SAME),
        ("fc2", "mlp.down_proj", SAME),
        ("final_layer_norm", "mlp_norm", SAME),
    )


BART = Family(
    architectures={"BartModel": False, "BartForConditionalGeneration": True},
    prefix="model.",
    modules=(
        ("shared", "embedding", SAME),
        ("encoder.embed_tokens", "source_embedding", SAME),
        ("encoder.embed_positions", "encoder.position.embedding", OFFSET),
        ("encoder.layernorm_embedding", "encoder.embedding_norm", SAME),
        ("decoder.embed_positions", "decoder.position.embedding", OFFSET),
        ("decoder.layernorm_embedding", "decoder.embedding_norm", SAME),
    ),
    blocks=(
        ("encoder.layers.{i}.", "encoder", _bart_block()),
        (
            "decoder.layers.{i}.",
            "decoder",
            _bart_block(
                *(
                    (f"encoder_attn.{name}", f"cross_attention.{name}", SAME)
                    for name in ("q_proj", "k_proj", "v_proj", "out_proj")
                ),
                ("encoder_attn_layer_norm", "cross_norm", SAME),
            ),
        ),
    ),
    head=(),
    tensors=(Row("lm_head.weight", ("head.weight",)), Row("final_logits_bias", ("head.bias",), ROW)),
    copies={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    },
    untied={"shared.weight": ("decoder.embed_tokens.weight", "shared.weight")},
    zeros=r"(encoder|decoder)\.(blocks|embedding_norm).*\.bias|head\.bias",
)

FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN3, "bert": BERT, "bart": BART}

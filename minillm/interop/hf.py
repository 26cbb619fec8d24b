"""Models in Hugging Face's format as models of ours: GPT-2, Llama, Qwen3, BERT, BART.

    folder -> config.json (configs.py) and tensors (folder.py) -> by the family's table (families.py) -> Transformer

What comes out computes the same: fp32 logits, or the last hidden states where there is no head, agree with
Transformers' within 1e-4. Whatever cannot be taken over is refused by its name.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.config import ModelConfig, UserError
from minillm.interop.configs import Fields, read_config
from minillm.interop.families import FAMILIES, Family, in_head
from minillm.interop.folder import is_hf, read_json, read_tensors
from minillm.model.transformer import Transformer

__all__ = ["POOLER", "is_hf", "load_hf", "read_hf"]

POOLER = ("pooler.weight", "pooler.bias")
"""Names under which `read_hf` hands on BERT's pooler, tanh(x[0] W' + b), [dim, dim] and [dim]: the Transformer has no
such part; a classifier's head may begin with it."""


def read_hf(folder: str | Path) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """A model's settings, its tensors in fp32 under our names, and notes: what differs here, a line each.

    The tensors are exactly those of `Transformer(config).state_dict()`, and BERT's pooler under `POOLER` where the
    folder has one.

    Raises:
        UserError: no such folder; an architecture or option that is not supported; a tensor that is missing, surplus
            or of another shape, by its name. DamagedFile: a file that cannot be read.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    name, architecture = _family(values, folder)
    family, fields = FAMILIES[name], Fields(values, str(folder / "config.json"))
    if "quantization_config" in values:
        raise UserError(f"{fields.where}: quantization_config is set; give the model in fp32, bf16 or fp16")
    tensors = _plain(family, read_tensors(folder), folder, fields.notes)
    lm = family.architectures[architecture] if architecture else any(map(in_head, tensors))
    tied = fields.flag("tie_word_embeddings", name in ("gpt2", "bert", "bart"))
    _settle(family, tensors, tied, folder)
    config = read_config(name, fields, tensors, lm=lm)
    weights = _to_ours(family, config, tensors, folder)
    if kinds := {str(x.dtype).removeprefix("torch.") for x in weights.values() if x.dtype != torch.float32}:
        fields.notes.append(f"weights in {', '.join(sorted(kinds))} were read as fp32")
    return config, {name: tensor.float().contiguous() for name, tensor in weights.items()}, fields.notes


def load_hf(folder: str | Path) -> tuple[Transformer, Any]:
    """The model, ready to predict, and its tokenizer. Raises as `read_hf` and `HFTokenizer.from_folder` do."""
    from minillm.interop.hf_tokenizer import HFTokenizer

    config, weights, _ = read_hf(folder)
    tokenizer = HFTokenizer.from_folder(folder)
    check_vocabulary(tokenizer, config, Path(folder))
    return build(config, weights), tokenizer


def build(config: ModelConfig, weights: dict[str, Tensor]) -> Transformer:
    """A Transformer in evaluation mode with these weights; a pooler among them is left out."""
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict({name: x for name, x in weights.items() if name not in POOLER}, assign=True)
    return model.eval()


def check_vocabulary(tokenizer: Any, config: ModelConfig, folder: Path) -> None:
    """Raises `UserError` where the tokenizer has ids that the model's embedding has no rows for."""
    if tokenizer.vocab_size > (config.vocab_size or 0):
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, and the model {config.vocab_size} rows for them: "
            "the tokenizer files are another model's"
        )


def _family(values: dict[str, Any], folder: Path) -> tuple[str, str | None]:
    """(family, architecture); the latter None where config.json does not say."""
    where = folder / "config.json"
    if "auto_map" in values:
        raise UserError(f"{where}: auto_map asks for code of the model's own, which is never run here")
    listed = values.get("architectures") or []
    architecture = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else None
    for name, family in FAMILIES.items():
        if architecture in family.architectures:
            if values.get("model_type", name) != name:
                raise UserError(f"{where}: architecture {architecture} with model_type {values['model_type']}")
            return name, architecture
    there = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    if architecture:
        raise UserError(f"{where}: the architecture {architecture[:60]} is not supported; there are {there}")
    if values.get("model_type") not in FAMILIES:
        shown = str(values.get("model_type"))[:60]
        raise UserError(f"{where}: the model type {shown} is not supported; there are {', '.join(FAMILIES)}")
    return values["model_type"], None


def _plain(family: Family, tensors: dict[str, Tensor], folder: Path, notes: list[str]) -> dict[str, Tensor]:
    """The tensors under the table's names, without what is no weight or has no place."""
    plain: dict[str, Tensor] = {}
    dropped = []
    for name, tensor in tensors.items():
        known = family.plain_name(name)
        if family.ignored and re.fullmatch(family.ignored, known):
            continue
        if family.dropped and re.fullmatch(family.dropped, known):
            dropped.append(name)
            continue
        if known in plain:
            raise UserError(f"{folder}: {name} is there twice, once with and once without its prefix")
        plain[known] = tensor
    if dropped:
        notes.append(f"left out, having no place here: {', '.join(sorted(dropped))}")
    return plain


def _settle(family: Family, tensors: dict[str, Tensor], tied: bool, folder: Path) -> None:
    """Leaves one tensor where files may hold the same one several times. Raises `UserError` where copies differ."""
    if tied:
        for copy, original in family.copies.items():
            if copy not in tensors:
                continue
            tensor = tensors.pop(copy)
            if not torch.equal(tensors.setdefault(original, tensor), tensor):
                raise UserError(
                    f"{folder}: {copy} differs from {original}, though config.json ties them; "
                    "set tie_word_embeddings to false there if both are meant"
                )
        return
    for name, stand_ins in family.untied.items():
        there = [tensors.pop(other) for other in stand_ins if other in tensors]
        if there:
            tensors[name] = there[0]
    source, own = "encoder.embed_tokens.weight", tensors.get("shared.weight")
    if source in tensors and own is not None and torch.equal(tensors[source], own):
        del tensors[source]


def _to_ours(family: Family, config: ModelConfig, tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The family's table applied. Raises `UserError` naming the tensor that is missing, surplus or of a wrong shape."""
    with torch.device("meta"):
        expected = {name: tuple(x.shape) for name, x in Transformer(config).state_dict().items()}
    if POOLER[0] in {ours for row in family.rows({}) for ours in row.ours} and "pooler.dense.weight" in tensors:
        expected |= {POOLER[0]: (config.dim, config.dim), POOLER[1]: (config.dim,)}
    left, weights = dict(tensors), {}
    for row in family.rows({"encoder": config.layers, "decoder": config.decoder_layers or config.layers}):
        if not all(name in expected for name in row.ours):
            continue
        if row.theirs not in left:
            raise UserError(f"{folder}: the tensor {row.theirs} is missing, which config.json asks for")
        tensor = left.pop(row.theirs)
        try:
            parts = row.to_ours(tensor)
        except (ValueError, RuntimeError, IndexError) as error:
            raise UserError(f"{folder}: {error}") from None
        for name, part in parts.items():
            if tuple(part.shape) != expected[name]:
                raise UserError(
                    f"{folder}: {row.theirs} has the shape {tuple(tensor.shape)}, which does not give the "
                    f"{expected[name]} of {name} that config.json asks for"
                )
            if not part.is_floating_point():
                raise UserError(f"{folder}: {row.theirs} holds {part.dtype}, not floating-point numbers")
        weights |= parts
    if left:
        raise UserError(f"{folder}: the tensor {min(left)} is surplus: config.json describes a model without it")
    if lacking := expected.keys() - weights.keys():
        raise AssertionError(f"the table of the family does not cover {min(lacking)}")
    return weights

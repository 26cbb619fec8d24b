"""Models in Hugging Face's format as models of ours: GPT-2, Llama, Qwen3, BERT, BART.

    folder -> config.json (configs.py) and tensors (folder.py) -> by the family's table (families.py) -> Transformer

What comes out computes the same: fp32 logits, or the last hidden states where there is no head, agree with
Transformers' within 1e-4. Whatever cannot be taken over is refused by its name.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillm.config import ModelConfig, UserError
from minillm.finite import require_finite
from minillm.interop.configs import Fields, read_config
from minillm.interop.families import FAMILIES, Family, in_head
from minillm.interop.folder import is_hf, read_json, read_tensors
from minillm.interop.task_heads import TASK_HEADS, read_task
from minillm.interop.token_roles import decoder_start
from minillm.interop.writing import TITLES
from minillm.model.heads import HeadConfig, TaskModel
from minillm.model.shapes import shapes_alone
from minillm.model.transformer import Transformer

__all__ = ["HFModel", "build", "is_hf", "load_hf", "read_hf"]

_POOLER = ("pooler.weight", "pooler.bias")


@dataclass(frozen=True)
class HFModel:
    """A folder in Hugging Face's format, in our terms; tensors are fp32."""

    config: ModelConfig
    weights: dict[str, Tensor]
    """Exactly those of `Transformer(config).state_dict()`."""
    notes: list[str]
    """What differs here, a line each."""
    pooler: dict[str, Tensor] | None = None
    """BERT's, tanh(x[0] W' + b): weight [dim, dim] and bias [dim]. No part of the Transformer; a classifier's head may
    begin with it."""
    task: dict[str, Any] | None = None
    """Name, head and info of a finetuned model, as config.json of a run of ours has them."""
    head: dict[str, Tensor] | None = None
    """What its `TaskModel` has besides Transformer and pooler."""
    start: list[int] | None = None
    """Of an encoder-decoder the one or two ids that its decoder begins with."""


def read_hf(folder: str | Path) -> HFModel:
    """A model's settings and tensors.

    Raises:
        UserError: no such folder; an architecture or option that is not supported; a tensor that is missing, surplus,
            of another shape or not finite, by its name. DamagedFile: a file that cannot be read.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    name, architecture = _family(values, folder)
    family, fields = FAMILIES[name], Fields(values, str(folder / "config.json"))
    if "quantization_config" in values:
        raise UserError(f"{fields.where}: quantization_config is set; give the model in fp32, bf16 or fp16")
    task = TASK_HEADS.get(architecture or "")
    prefixes = (task.prefix, family.prefix) if task is not None and task.prefix else (family.prefix,)
    tensors = _plain(family, read_tensors(folder), prefixes, folder, fields.notes)
    require_finite(tensors, str(folder))
    lm = task is None and (family.architectures[architecture] if architecture else any(map(in_head, tensors)))
    tied = fields.flag("tie_word_embeddings", name in ("gpt2", "bert", "bart"))
    section, head = (None, None) if task is None else read_task(task, fields, tensors)
    _settle(family, tensors, tied, folder)
    config = read_config(name, fields, tensors, lm=lm)
    weights = _to_ours(family, config, tensors, folder)
    if kinds := {str(x.dtype).removeprefix("torch.") for x in weights.values() if x.dtype != torch.float32}:
        fields.notes.append(f"weights in {', '.join(sorted(kinds))} were read as fp32")
    if task is None and not lm and not (tied and config.shape != "encoder"):
        fields.notes.append(
            "there is no language model's head: until it is finetuned, what it says of tokens is its embedding's and "
            "means nothing"
        )
    weights = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    pooler = {name.removeprefix("pooler."): weights.pop(name) for name in _POOLER if name in weights}
    if head is not None and head["task_head.weight"].shape[1] != config.dim:
        shape = tuple(head["task_head.weight"].shape)
        raise UserError(f"{folder}: the head's weight has the shape {shape}, and the states are {config.dim} wide")
    if task is not None and task.pooler and not pooler:
        raise UserError(f"{folder}: the tensor pooler.dense.weight is missing, which {architecture} asks for")
    start = decoder_start(folder, fields, config.vocab_size or 0) if config.shape == "encoder-decoder" else None
    return HFModel(config, weights, fields.notes, pooler or None, section, head, start)


def load_hf(folder: str | Path) -> tuple[HFModel, Any]:
    """A model and its tokenizer, which fit each other. Raises as `read_hf` and `HFTokenizer.from_folder` do."""
    from minillm.interop.hf_tokenizer import HFTokenizer

    found, tokenizer = read_hf(folder), HFTokenizer.from_folder(folder)
    check_vocabulary(tokenizer, found.config, Path(folder))
    if found.task is not None:
        check_layout(tokenizer, found.task["name"], Path(folder))
    return found, tokenizer


def build(found: HFModel) -> nn.Module:
    """A `Transformer`, or a `TaskModel` around one, in evaluation mode."""
    with shapes_alone():
        transformer = Transformer(found.config)
    transformer.load_state_dict(found.weights, assign=True)
    if found.task is None or found.head is None:
        return transformer.eval()
    model = TaskModel(transformer, HeadConfig(**found.task["head"]), found.pooler)
    model.load_state_dict(found.head, strict=False)
    return model.eval()


def check_vocabulary(tokenizer: Any, config: ModelConfig, folder: Path) -> None:
    """Raises `UserError` where the tokenizer has ids that the model's embedding has no rows for."""
    if tokenizer.vocab_size > (config.vocab_size or 0):
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, and the model {config.vocab_size} rows for them: "
            "the tokenizer files are another model's"
        )


def check_layout(tokenizer: Any, task: str, folder: Path) -> None:
    """Raises `UserError` where a finetuned model was given its texts with other tokens around them than rows here have.

    Rows are `document, text, end`, and of a question and its context `document, question, end, context, end`.
    """
    pair = "a" if task == "span-qa" else None
    begin, text, end = [tokenizer.document_id], tokenizer.encode("a"), [tokenizer.end_id]
    expected = [*begin, *text, *end, *(text + end if pair else [])]
    if tokenizer.wrap("a", pair) != expected:
        raise UserError(
            f"{folder}: the tokenizer does not put {tokenizer.pieces[begin[0]]} before and {tokenizer.pieces[end[0]]} "
            "behind each text, as the rows of a finetuned model have it here; finetune the base model anew"
        )


def _family(values: dict[str, Any], folder: Path) -> tuple[str, str | None]:
    """(family, architecture); the latter None where config.json does not say."""
    where = folder / "config.json"
    if "auto_map" in values:
        raise UserError(f"{where}: auto_map asks for code of the model's own, which is never run here")
    kind, listed = str(values.get("model_type")), values.get("architectures") or []
    architecture = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else None
    for name in FAMILIES:
        if architecture in _architectures(name):
            if kind not in (name, "None"):
                raise UserError(f"{where}: architecture {architecture} with model_type {kind[:60]}")
            return name, architecture
    if architecture:
        there = ", ".join(_architectures(kind) if kind in FAMILIES else TITLES.values())
        raise UserError(f"{where}: the architecture {architecture[:60]} is not supported; there are {there}")
    if kind not in FAMILIES:
        raise UserError(f"{where}: the model type {kind[:60]} is not supported; there are {', '.join(FAMILIES)}")
    return kind, None


def _architectures(family: str) -> list[str]:
    return [*FAMILIES[family].architectures, *(name for name, head in TASK_HEADS.items() if head.family == family)]


def _plain(
    family: Family, tensors: dict[str, Tensor], prefixes: tuple[str, ...], folder: Path, notes: list[str]
) -> dict[str, Tensor]:
    """The tensors under the table's names, without what is no weight or has no place."""
    plain: dict[str, Tensor] = {}
    dropped = []
    for name, tensor in tensors.items():
        known = family.plain_name(name, prefixes)
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
    with shapes_alone():
        expected = {name: tuple(x.shape) for name, x in Transformer(config).state_dict().items()}
    if _POOLER[0] in {ours for row in family.rows({}) for ours in row.ours} and any(
        name.startswith("pooler.") for name in tensors
    ):
        expected |= {_POOLER[0]: (config.dim, config.dim), _POOLER[1]: (config.dim,)}
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

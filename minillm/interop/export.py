"""A model of ours as a folder that Transformers opens without custom code, and that computes the same there.

    config.json  generation_config.json  model.safetensors          the model
    tokenizer.json  tokenizer_config.json  chat_template.jinja      the tokenizer
    tokenizer.model  manifest.json                                  the same as SentencePiece has it, where it is ours

Everything is written under a temporary name, opened again with Transformers' Auto classes, and compared: logits
within 1e-4, ids and texts of a sample equal. Only then does the folder take its name.
"""

import copy
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillm.config import ModelConfig, UserError
from minillm.interop.families import FAMILIES, Family, in_head
from minillm.interop.task_heads import OWN, TASK_HEADS, counterpart, write_task
from minillm.interop.tokenizer_files import with_padding, write_json, write_tokenizer
from minillm.interop.verification import open_theirs, quiet, verify, verify_ids, verify_rows
from minillm.interop.writing import TITLES, architecture, family_of, has_head, write_config
from minillm.model.heads import TaskModel
from minillm.model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What goes out along with a model's weights."""

    task: Mapping[str, Any] | None = None
    """Of a `TaskModel` its name, head and info, as config.json of its run has them."""
    pooler: Mapping[str, Tensor] | None = None
    """Weight and bias of the one that a Transformer came with; goes along where the export has no head."""
    chat_template: str | None = None
    """Jinja2, for `AutoTokenizer.apply_chat_template`."""
    start: Sequence[int] = ()
    """Of an encoder-decoder the one or two ids that its decoder begins with. (): the tokenizer's document id."""
    rows: bool = False
    """Whether the model was finetuned on rows of `document_id, text, end_id`; with a head it was."""


NOTHING = Beside()


@dataclass(frozen=True)
class Content:
    """What is to be written of a model."""

    family: str
    architecture: str
    config: ModelConfig
    weights: Mapping[str, Tensor]
    """A Transformer's, and BERT's pooler where it goes along."""
    lm: bool
    """Whether the language model's head is among them."""
    prefix: str
    """What stands before the body's names."""
    entries: Mapping[str, Any] = field(default_factory=dict)
    """What config.json says besides, of a task."""
    head: Mapping[str, Tensor] = field(default_factory=dict)
    """The task's head, under their names."""


def export(model: nn.Module, tokenizer: Any, out: str | Path, beside: Beside = NOTHING) -> list[str]:
    """Writes the folder `out`; returns what a reader should know, a line each.

    Args:
        model: a Transformer, or a `TaskModel` around one, with plain layers.
        tokenizer: `tokenizer.Tokenizer` or `HFTokenizer`.

    Raises:
        UserError: the model has what no family expresses (by the field's name), or a head that none has; `out` is not
            empty; Transformers is not installed; or what was written does not compute the same: then nothing stays
            behind.
    """
    task, content = beside.task, content_of(model, beside)
    rows = beside.rows or task is not None
    if task is not None and TASK_HEADS[content.architecture].pool == "last" and tokenizer.pad_id == tokenizer.end_id:
        tokenizer = with_padding(tokenizer)
        content = _with_rows(content, tokenizer.vocab_size)
    _require_transformers()
    plain = copy.deepcopy(model).to("cpu", torch.float32).eval()
    with fresh_folder(out) as folder, quiet():
        _write_model(folder, content, tokenizer, [*beside.start] or [tokenizer.document_id])
        write_tokenizer(folder, content.config, tokenizer, beside.chat_template, layout=rows)
        verify(open_theirs(folder, content.architecture), plain, task, content.architecture)
        if rows:
            verify_rows(folder, tokenizer)
        notes = _notes(content, tokenizer, beside.pooler) + verify_ids(folder, tokenizer)
    return notes


@contextmanager
def fresh_folder(out: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` when all went well, and else is gone.

    Raises `UserError` where `out` is not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already and is not empty; name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if out.exists():
            out.rmdir()
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def content_of(model: nn.Module, beside: Beside = NOTHING) -> Content:
    """What `export` writes of a model. Raises `UserError` for what no family expresses."""
    if isinstance(model, TaskModel):
        assert beside.task is not None  # of whoever opened the model
        return _task_model(model, beside.task)
    return _language_model(model, beside.pooler or {})  # type: ignore[arg-type]


def _language_model(model: Transformer, pooler: Mapping[str, Tensor]) -> Content:
    config, family = model.config, family_of(model.config)
    lm, weights = has_head(config), _plain(model)
    if not lm:
        weights |= {f"pooler.{part}": tensor.float().cpu() for part, tensor in pooler.items()}
    return Content(family, architecture(config, family), config, weights, lm, FAMILIES[family].prefix if lm else "")


def _task_model(model: TaskModel, task: Mapping[str, Any]) -> Content:
    """The body without an output matrix, and the head."""
    config = replace(model.config, tied=True, output_bias=False, output_transform=False)
    family = family_of(config)
    name = counterpart(family, TITLES[family], task)
    entries, head = write_task(name, model, task)
    weights = {name: x for name, x in _plain(model.transformer).items() if not name.startswith("head.")}
    if model.pooler is not None:
        weights |= {f"pooler.{part}": x for part, x in _plain(model.pooler).items()}
    prefix = TASK_HEADS[name].prefix or FAMILIES[family].prefix
    return Content(family, name, config, weights, False, prefix, entries, head)


def _plain(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().to("cpu", torch.float32) for name, x in module.state_dict().items()}


def _with_rows(content: Content, rows: int) -> Content:
    """The embedding with so many rows at least; what is added is 0."""
    embedding = content.weights["embedding.weight"]
    more = embedding.new_zeros(max(0, rows - len(embedding)), embedding.shape[1])
    weights = {**content.weights, "embedding.weight": torch.cat((embedding, more))}
    return replace(content, weights=weights, config=replace(content.config, vocab_size=len(embedding) + len(more)))


def to_theirs(content: Content) -> dict[str, Tensor]:
    """Our tensors under the names of the family's files, with zeros for what it always has and ours lacks."""
    family, config, weights, lm = FAMILIES[content.family], content.config, content.weights, content.lm
    layers = {"encoder": config.layers, "decoder": config.decoder_layers or config.layers}
    tensors: dict[str, Tensor] = {}
    for row in family.rows(layers):
        if in_head(row.theirs) and not lm:
            continue
        ours = [weights.get(name) if name in weights else _zeros(name, weights, config, family) for name in row.ours]
        if all(tensor is not None for tensor in ours):
            tensors[row.theirs] = row.to_theirs([tensor for tensor in ours if tensor is not None])
    if config.tied and not config.source_embedding:
        for copied, original in family.copies.items():  # BERT's files have the bias of the logits under the copy's name
            if copied.endswith(".bias") and original in tensors:
                tensors[copied] = tensors.pop(original)
    else:
        for name, stand_ins in family.untied.items():
            tensors |= {other: tensors[name].clone() for other in stand_ins if name in tensors}
        for copied, original in family.copies.items():
            if original in tensors and (lm or not in_head(copied)):
                tensors.setdefault(copied, tensors[original].clone())
    named = {name if in_head(name) else content.prefix + name: x.contiguous() for name, x in tensors.items()}
    return named | {name: x.contiguous() for name, x in content.head.items()}


def _zeros(name: str, weights: Mapping[str, Tensor], config: ModelConfig, family: Family) -> Tensor | None:
    if not family.zeros or not re.fullmatch(family.zeros, name):
        return None
    if name == "type_embedding.weight":
        return torch.zeros(1, config.dim)
    if name == "head.bias":
        return torch.zeros(config.vocab_size or 0)
    matrix = weights.get(name.removesuffix("bias") + "weight")
    return None if matrix is None else torch.zeros(matrix.shape[0])


def _write_model(folder: Path, content: Content, tokenizer: Any, start: Sequence[int]) -> None:
    from safetensors.torch import save_file

    config = content.config
    own = start[0] == tokenizer.document_id  # else the decoder may say it first, and it is to end nothing
    stops = sorted({tokenizer.document_id, tokenizer.end_id} if own else {tokenizer.end_id})
    ids = {"bos_token_id": tokenizer.document_id, "pad_token_id": tokenizer.pad_id}
    ids["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    values = write_config(config, content.family, content.architecture, ids) | content.entries
    generation = {**ids, "suppress_tokens": sorted(_banned(config, tokenizer) - {*stops, *start}) or None}
    if config.shape == "encoder-decoder":
        values["decoder_start_token_id"] = generation["decoder_start_token_id"] = start[0]
        generation["forced_bos_token_id"] = start[1] if len(start) > 1 else None
    write_json(folder / "config.json", values)
    if config.shape != "encoder" and content.lm:
        write_json(folder / "generation_config.json", generation)
    save_file(to_theirs(content), folder / "model.safetensors", metadata={"format": "pt"})


def _banned(config: ModelConfig, tokenizer: Any) -> set[int]:
    """What a text never holds, as generation here has it: special tokens, and rows that no token has."""
    banned = set(tokenizer.special.values()) | set(range(tokenizer.vocab_size, config.vocab_size or 0))
    banned -= {tokenizer.document_id}
    return banned - set(tokenizer.sentinel_ids) if config.shape == "encoder-decoder" else banned


def _notes(content: Content, tokenizer: Any, pooler: Mapping[str, Tensor] | None) -> list[str]:
    config = content.config
    notes = [
        f"Transformers takes the spelling of a special token, such as {tokenizer.pieces[tokenizer.end_id]}, for the "
        "token itself wherever it stands in a text; pass split_special_tokens=True there to have it as text, as here"
    ]
    if config.dropout and config.position.kind == "rope":
        notes.append(f"model.dropout={config.dropout} has no place in the exported config: it matters in training only")
    if content.architecture == "BertModel":
        notes.append("the export is BertModel, without a masked-LM head: model.output_transform is off")
    if pooler and content.lm:
        notes.append(f"the pooler that the model came with is left out: {content.architecture} has none")
    if "threshold" in content.entries.get(OWN, {}):
        notes.append(
            f"thresholds tuned on validation data stand in config.json under {OWN}.threshold; Transformers' pipelines "
            "do not read them"
        )
    return notes


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError('the export is opened with Transformers before it counts: pip install "minillm[hf]"') from None

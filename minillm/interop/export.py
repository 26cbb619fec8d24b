"""A model of ours as a folder that Transformers opens without custom code, and that computes the same there.

    config.json  generation_config.json  model.safetensors          the model
    tokenizer.json  tokenizer_config.json  chat_template.jinja      the tokenizer
    tokenizer.model  manifest.json                                  the same as SentencePiece has it, where it is ours

Everything is written under a temporary name, opened again with Transformers' Auto classes, and compared: logits
within 1e-4, ids and texts of a sample equal. Only then does the folder take its name.
"""

import json
import random
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.config import ModelConfig, UserError
from minillm.interop.families import FAMILIES, Family, in_head
from minillm.interop.hf import HFModel, build
from minillm.interop.hf_tokenizer import FILE, SETTINGS, TEMPLATE, HFTokenizer
from minillm.interop.sentencepiece import tokenizer_json
from minillm.interop.writing import architecture, family_of, has_head, write_config
from minillm.model.transformer import Transformer

TOLERANCE = 1e-4
SAMPLE = (
    "def total(prices: dict[str, float]) -> float:\n    return sum(prices.values())  # in euros\n",
    "class Tree:\n\tdef __init__(self, *children):\n\t\tself.children = list(children)\n\n\n",
    "The quick brown fox, 1,234.5 times; isn't it?  Two spaces,   three.    Four.\r\n",
    "Größe, café, naïve – “quoted” … Привет, мир! 你好，世界。こんにちは 🙂👩‍🚀 ﷽ e\u0301\u200b\ufeff",
    "",
    " ",
    "\n\n \n",
    "<0x41> &amp; \\n \x00\x01\x7f",
)


def export(model: Transformer, tokenizer: Any, out: str | Path, *, chat_template: str | None = None) -> list[str]:
    """Writes the folder `out`; returns what a reader should know, a line each.

    Args:
        tokenizer: `tokenizer.Tokenizer` or `HFTokenizer`.
        chat_template: Jinja2, for `AutoTokenizer.apply_chat_template`.

    Raises:
        UserError: the model has what no family expresses (by the field's name), `out` is not empty, Transformers is
            not installed; or what was written does not compute the same: then nothing stays behind.
    """
    out = Path(out)
    family = family_of(model.config)
    _require_transformers()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already and is not empty; name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        config = model.config
        weights = {name: x.detach().to("cpu", torch.float32) for name, x in model.state_dict().items()}
        _write_model(temporary, config, FAMILIES[family], family, weights, tokenizer)
        _write_tokenizer(temporary, config, tokenizer, chat_template)
        notes = _notes(config, tokenizer)
        with _quiet():
            _verify_logits(temporary, build(HFModel(config, weights, [])))
            notes += _verify_ids(temporary, tokenizer)
        if out.exists():
            out.rmdir()
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return notes


def to_theirs(weights: dict[str, Tensor], config: ModelConfig, family: Family) -> dict[str, Tensor]:
    """Our tensors under the names of the family's files, with zeros for what it always has and ours lacks."""
    head = has_head(config)
    layers = {"encoder": config.layers, "decoder": config.decoder_layers or config.layers}
    tensors: dict[str, Tensor] = {}
    for row in family.rows(layers):
        if in_head(row.theirs) and not head:
            continue
        ours = [weights.get(name) if name in weights else _zeros(name, weights, config, family) for name in row.ours]
        if all(tensor is not None for tensor in ours):
            tensors[row.theirs] = row.to_theirs([tensor for tensor in ours if tensor is not None])
    if config.tied and not config.source_embedding:
        for copy, original in family.copies.items():  # BERT's files have the bias of the logits under the copy's name
            if copy.endswith(".bias") and original in tensors:
                tensors[copy] = tensors.pop(original)
    else:
        for name, stand_ins in family.untied.items():
            tensors |= {other: tensors[name].clone() for other in stand_ins if name in tensors}
        for copy, original in family.copies.items():
            if original in tensors and (head or not in_head(copy)):
                tensors.setdefault(copy, tensors[original].clone())
    prefix = family.prefix if head else ""
    return {name if in_head(name) else prefix + name: x.contiguous() for name, x in tensors.items()}


def _zeros(name: str, weights: dict[str, Tensor], config: ModelConfig, family: Family) -> Tensor | None:
    if not family.zeros or not re.fullmatch(family.zeros, name):
        return None
    if name == "type_embedding.weight":
        return torch.zeros(1, config.dim)
    if name == "head.bias":
        return torch.zeros(config.vocab_size or 0)
    matrix = weights.get(name.removesuffix("bias") + "weight")
    return None if matrix is None else torch.zeros(matrix.shape[0])


def _write_model(
    folder: Path, config: ModelConfig, family: Family, name: str, weights: dict[str, Tensor], tokenizer: Any
) -> None:
    from safetensors.torch import save_file

    stops = sorted({tokenizer.document_id, tokenizer.end_id})
    ids = {"bos_token_id": tokenizer.document_id, "pad_token_id": tokenizer.pad_id}
    ids["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    values = write_config(config, name, ids)
    generation = {**ids, "suppress_tokens": _banned(config, tokenizer, stops) or None}
    if config.shape == "encoder-decoder":
        values["decoder_start_token_id"] = generation["decoder_start_token_id"] = tokenizer.document_id
    _write_json(folder / "config.json", values)
    if config.shape != "encoder":
        _write_json(folder / "generation_config.json", generation)
    save_file(to_theirs(weights, config, family), folder / "model.safetensors", metadata={"format": "pt"})


def _banned(config: ModelConfig, tokenizer: Any, stops: Iterable[int]) -> list[int]:
    """What a text never holds, as generation here has it: special tokens, and rows that no token has."""
    banned = set(tokenizer.special.values()) | set(range(tokenizer.vocab_size, config.vocab_size or 0))
    if config.shape == "encoder-decoder":
        banned -= set(tokenizer.sentinel_ids)
    return sorted(banned - set(stops))


def _write_tokenizer(folder: Path, config: ModelConfig, tokenizer: Any, chat_template: str | None) -> None:
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.save(folder)
        (folder / "roles.json").unlink()
        settings = {**tokenizer.settings, "tokenizer_class": "PreTrainedTokenizerFast"}
        names = {"bos_token": "document", "eos_token": "end", "pad_token": "pad", "unk_token": "unknown"}
        for name, role in {**names, "mask_token": "mask"}.items():
            if role in tokenizer.roles and not settings.get(name):
                settings[name] = tokenizer.pieces[tokenizer.roles[role]]
        chat_template = chat_template or settings.pop("chat_template", None)
        settings.pop("auto_map", None)
    else:
        tokenizer.save(folder)  # tokenizer.model, for those who read SentencePiece; and its manifest
        text = tokenizer_json((folder / "tokenizer.model").read_bytes(), tokenizer.type)
        (folder / FILE).write_text(text, encoding="utf-8")
        named = {"bos_token": "document", "eos_token": "end", "unk_token": "unknown", "pad_token": "pad"}
        named["mask_token"] = "mask"
        settings = {name: tokenizer.pieces[tokenizer.special[role]] for name, role in named.items()}
        others = [tokenizer.pieces[i] for role, i in tokenizer.special.items() if role not in named.values()]
        reads = ["input_ids", "token_type_ids", "attention_mask"] if config.token_types else None
        settings |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "additional_special_tokens": others,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.context,
            "model_input_names": reads or ["input_ids", "attention_mask"],
        }
    if chat_template:
        settings["chat_template"] = chat_template
        (folder / TEMPLATE).write_text(chat_template, encoding="utf-8")
    _write_json(folder / SETTINGS, settings)


def _notes(config: ModelConfig, tokenizer: Any) -> list[str]:
    notes = [
        f"Transformers takes the spelling of a special token, such as {tokenizer.pieces[tokenizer.end_id]}, for the "
        "token itself wherever it stands in a text; pass split_special_tokens=True there to have it as text, as here"
    ]
    if config.dropout and config.position.kind == "rope":
        notes.append(f"model.dropout={config.dropout} has no place in the exported config: it matters in training only")
    if not has_head(config):
        notes.append("the export is BertModel, without a masked-LM head: model.output_transform is off")
    return notes


# Verification


def _verify_logits(folder: Path, model: Transformer) -> None:
    """Raises `UserError` unless the folder, opened by Transformers, computes what `model` does."""
    import transformers

    config = model.config
    kinds = {"decoder": "AutoModelForCausalLM", "encoder-decoder": "AutoModelForSeq2SeqLM"}
    kind = kinds.get(config.shape, "AutoModelForMaskedLM" if has_head(config) else "AutoModel")
    options = {"local_files_only": True, "dtype": torch.float32, "output_loading_info": True}
    opened, found = getattr(transformers, kind).from_pretrained(folder, **options)
    missing = {name for name in found["missing_keys"] if not name.startswith("pooler.")}  # made anew, and not read here
    if wrong := sorted({*missing, *found["unexpected_keys"], *found["mismatched_keys"]}, key=str):
        raise UserError(f"the export does not open as {type(opened).__name__}: {wrong[0]}; nothing was written")
    opened.eval()
    generator = torch.Generator().manual_seed(0)
    T = min(config.context, 48)
    ids = torch.randint(config.vocab_size or 1, (2, T), generator=generator)
    source = torch.randint(config.vocab_size or 1, (2, T), generator=generator)
    with torch.no_grad():
        if config.shape == "encoder-decoder":
            theirs = opened(input_ids=source, decoder_input_ids=ids).logits
            ours = model(ids, source=source)
        elif has_head(config):
            theirs, ours = opened(input_ids=ids).logits, model(ids)
        else:
            theirs, ours = opened(input_ids=ids).last_hidden_state, model.states(ids)
    name = type(opened).__name__
    if name != architecture(config, opened.config.model_type) or theirs.shape != ours.shape:
        raise UserError(f"the export was opened as {name} with outputs {tuple(theirs.shape)}: nothing was written")
    difference = (theirs - ours).abs().max().item()
    if not difference <= TOLERANCE:
        raise UserError(f"the exported {name} differs by {difference:.1e} from the model: nothing was written")


def _verify_ids(folder: Path, tokenizer: Any) -> list[str]:
    """Raises `UserError` unless AutoTokenizer gives the same ids and texts for the sample; returns what to note."""
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    reordered = 0
    spellings = [tokenizer.pieces[i] for i in tokenizer.special.values()]
    texts = [text for text in map(_writable(tokenizer), _sample()) if not any(one in text for one in spellings)]
    for text in texts:
        ids = tokenizer.encode(text)
        theirs = opened.encode(text, add_special_tokens=False)
        same = ids == theirs
        if not same and tokenizer.type == "unigram" and sorted(ids) == sorted(theirs):
            reordered, same = reordered + 1, True
        back = opened.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if not same or back != tokenizer.decode(ids):
            raise UserError(f"the exported tokenizer treats {text[:40]!r} in another way: nothing was written")
    if tokenizer.type == "unigram" and not isinstance(tokenizer, HFTokenizer):
        return [
            "unigram: where the same pieces in another order have the same score, rounding decides, and Transformers "
            f"rounds otherwise ({reordered} of {len(texts)} texts of the sample)"
        ]
    return []


def _sample() -> list[str]:
    """SAMPLE, and seeded strings of its characters in any order, runs of spaces among them."""
    choice = random.Random(0)
    characters = sorted({character for text in SAMPLE for character in text}) + [" "] * 20
    mixed = ["".join(choice.choices(characters, k=choice.randint(1, 40))) for _ in range(200)]
    return [*SAMPLE, *mixed]


def _writable(tokenizer: Any) -> Callable[[str], str]:
    """What the tokenizer can encode of a text: of a character-level one the characters that it knows."""
    if tokenizer.type != "char":
        return lambda text: text
    known = {text.decode() for text in tokenizer.token_bytes if text}
    return lambda text: "".join(character for character in text if character in known)


class _quiet:
    """Transformers' progress bars and hints belong to no line of ours."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._level, self._bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._level)
        if self._bars:
            logging.enable_progress_bar()


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError('the export is opened with Transformers before it counts: pip install "minillm[hf]"') from None


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""A tokenizer as the files that AutoTokenizer opens: tokenizer.json, tokenizer_config.json, chat_template.jinja."""

import json
from pathlib import Path
from typing import Any

from minillm.config import ModelConfig
from minillm.interop.hf_tokenizer import FILE, ROLES_FILE, SETTINGS, TEMPLATE, HFTokenizer
from minillm.interop.sentencepiece import tokenizer_json

_NAMES = {"bos_token": "document", "eos_token": "end", "pad_token": "pad", "unk_token": "unknown", "mask_token": "mask"}


def write_tokenizer(
    folder: Path, config: ModelConfig, tokenizer: Any, chat_template: str | None, *, layout: bool
) -> None:
    """
    Args:
        tokenizer: `tokenizer.Tokenizer`, whose own files go along, or `HFTokenizer`.
        layout: texts get the special tokens around them that the rows of a finetuned model have.
    """
    tokenizer.save(folder)
    if isinstance(tokenizer, HFTokenizer):
        (folder / ROLES_FILE).unlink()
        settings = {**tokenizer.settings, "tokenizer_class": "PreTrainedTokenizerFast"}
        for name, role in _NAMES.items():
            if role in tokenizer.roles and (layout or not settings.get(name)):
                settings[name] = tokenizer.pieces[tokenizer.roles[role]]
        chat_template = chat_template or settings.pop("chat_template", None)
        settings.pop("auto_map", None)
    else:
        text = tokenizer_json((folder / "tokenizer.model").read_bytes(), tokenizer.type)
        (folder / FILE).write_text(text, encoding="utf-8")
        settings = {name: tokenizer.pieces[tokenizer.special[role]] for name, role in _NAMES.items()}
        others = [tokenizer.pieces[i] for role, i in tokenizer.special.items() if role not in _NAMES.values()]
        reads = ["input_ids", "token_type_ids", "attention_mask"] if config.token_types else None
        settings |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "additional_special_tokens": others,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.context,
            "model_input_names": reads or ["input_ids", "attention_mask"],
        }
    if layout:
        _put_layout(folder / FILE, tokenizer)
        types = ["token_type_ids"] if config.token_types > 1 else []
        settings["model_input_names"] = ["input_ids", *types, "attention_mask"]
    if chat_template:
        settings["chat_template"] = chat_template
        (folder / TEMPLATE).write_text(chat_template, encoding="utf-8")
    write_json(folder / SETTINGS, settings)


def _put_layout(path: Path, tokenizer: Any) -> None:
    """The rows of finetuned models as tokenizer.json's template: document, text, end, and of a pair text and end."""
    from tokenizers import Tokenizer, processors

    begin, end = tokenizer.pieces[tokenizer.document_id], tokenizer.pieces[tokenizer.end_id]
    model = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    model.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=list({begin: tokenizer.document_id, end: tokenizer.end_id}.items()),
    )
    path.write_text(model.to_str(), encoding="utf-8")


def with_padding(tokenizer: HFTokenizer) -> HFTokenizer:
    """A tokenizer with one more token, for padding: one that pads with the token that ends a text hides its end from a
    classifier of Transformers', which reads the last token that is no padding."""
    from tokenizers import AddedToken, Tokenizer

    model = Tokenizer.from_str(tokenizer.content.decode())
    model.add_special_tokens([AddedToken("<|pad|>", normalized=False, special=True)])
    settings = {**tokenizer.settings, "pad_token": "<|pad|>"}
    return HFTokenizer(model.to_str().encode(), settings, {**tokenizer.roles, "pad": model.token_to_id("<|pad|>")})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

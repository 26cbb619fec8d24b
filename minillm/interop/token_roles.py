"""Which token begins a document, ends a turn, pads, masks: what the files around tokenizer.json say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillm.config import UserError
from minillm.interop.folder import read_json

SETTINGS = "tokenizer_config.json"
_TOKENS = {"unknown": "unk_token", "pad": "pad_token", "mask": "mask_token"}


def find_roles(model: Any, settings: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """Which id plays which part, from the settings, special_tokens_map.json and config.json, in this order.

    A document begins with the bos token, or BERT's [CLS], or where there is neither with the end of the one before; of
    an encoder-decoder with what its config starts the decoder with. Raises `UserError` where nothing ends a text.
    """
    said = dict(read_json(folder / "special_tokens_map.json")) if (folder / "special_tokens_map.json").is_file() else {}
    said |= {name: value for name, value in settings.items() if value is not None}
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}

    def find(*names: str) -> int | None:
        for name in names:
            value = said.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            i = model.token_to_id(value) if isinstance(value, str) else None
            i = config.get(f"{name}_id") if i is None else i
            i = i[0] if isinstance(i, list) and i else i
            if type(i) is int and 0 <= i < model.get_vocab_size():
                return i
        return None

    end = find("eos_token", "sep_token")
    document = find("bos_token", "cls_token")
    if config.get("is_encoder_decoder"):
        document = find("decoder_start_token") if find("decoder_start_token") is not None else document
    end = document if end is None else end
    if end is None:
        raise UserError(f"{folder}: nothing says which token ends a text; add eos_token to {SETTINGS}")
    roles = {name: i for name, token in _TOKENS.items() if (i := find(token)) is not None}
    return {"pad": end, **roles, "document": end if document is None else document, "end": end}

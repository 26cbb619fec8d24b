"""Which token begins a document, ends a turn, pads, masks: what the files around tokenizer.json say.

BART's encoder reads `<s> text </s>`, and its decoder begins with `</s> <s>`, the decoder_start_token_id and the
forced_bos_token_id of its config.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillm.config import UserError
from minillm.interop.configs import Fields
from minillm.interop.folder import read_json

SETTINGS, GENERATION = "tokenizer_config.json", "generation_config.json"
BART_START = 2
_TOKENS = {"unknown": "unk_token", "pad": "pad_token", "mask": "mask_token"}


def find_roles(model: Any, settings: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """Which id plays which part, from the settings, special_tokens_map.json and config.json, in this order.

    A document begins with the bos token, or BERT's [CLS], or what an encoder-decoder's config starts the decoder with,
    or where there is none of them with the end of the one before. Raises `UserError` where nothing ends a text.
    """
    said = dict(read_json(folder / "special_tokens_map.json")) if (folder / "special_tokens_map.json").is_file() else {}
    said |= {name: value for name, value in settings.items() if value is not None}
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    known = set(model.get_vocab().values())  # ids may have holes, and the highest be no count of them

    def find(*names: str) -> int | None:
        for name in names:
            value = said.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            i = model.token_to_id(value) if isinstance(value, str) else None
            i = config.get(f"{name}_id") if i is None else i
            i = i[0] if isinstance(i, list) and i else i
            if type(i) is int and i in known:
                return i
        return None

    end = find("eos_token", "sep_token")
    document = find("bos_token", "cls_token", "decoder_start_token")
    end = document if end is None else end
    if end is None:
        raise UserError(f"{folder}: nothing says which token ends a text; add eos_token to {SETTINGS}")
    roles = {name: i for name, token in _TOKENS.items() if (i := find(token)) is not None}
    return {"pad": end, **roles, "document": end if document is None else document, "end": end}


def decoder_start(folder: Path, config: Fields, vocab_size: int) -> list[int]:
    """What the decoder of an encoder-decoder begins with there: decoder_start_token_id, and behind it
    forced_bos_token_id where the config has one.

    generation_config.json counts where the folder has one, else config.json; where that names no start it is the bos
    token. Raises `UserError` for what is no id of the model's.
    """
    said = config
    if (folder / GENERATION).is_file():
        said = Fields(read_json(folder / GENERATION), str(folder / GENERATION))
    number = (int, type(None))
    first = said.get("decoder_start_token_id", None, number)
    if first is None:
        first = said.get("bos_token_id", None, number)
    first = config.integer("decoder_start_token_id", BART_START) if first is None else first
    forced = said.get("forced_bos_token_id", None, number)
    start = [first] if forced is None else [first, forced]
    for i in start:
        if not 0 <= i < vocab_size:
            raise UserError(f"{said.where}: the decoder begins with id {i}, and the model has {vocab_size}; restore it")
    return start

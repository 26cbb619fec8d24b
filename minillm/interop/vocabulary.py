"""tokenizer.json made from the files that models came with before it: vocab.txt, or vocab.json and merges.txt."""

from pathlib import Path
from typing import Any

from minillm.config import DamagedFile, UserError
from minillm.interop.folder import read_json


def from_vocabulary(folder: Path, settings: dict[str, Any]) -> bytes:
    """tokenizer.json made from the files that came before it; `settings` learns which tokens are special."""
    if (folder / "vocab.txt").is_file():
        return _wordpiece(folder, settings)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    by_bytes = config.get("model_type") in ("gpt2", "bart")  # others cut words by other rules, which these do not say
    if by_bytes and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _byte_level(folder, settings)
    older = [name for name in ("tokenizer.model", "vocab.json") if (folder / name).is_file()]
    if older:
        raise UserError(
            f"{folder} has {older[0]} without tokenizer.json, which Transformers' AutoTokenizer writes: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    raise UserError(f"{folder} has no tokenizer: no tokenizer.json, no vocab.txt, no vocab.json with merges.txt")


def _wordpiece(folder: Path, settings: dict[str, Any]) -> bytes:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces = (folder / "vocab.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    vocabulary = {piece.rstrip("\r"): i for i, piece in enumerate(pieces) if piece.strip()}
    if "[UNK]" not in vocabulary:
        raise UserError(f"{folder / 'vocab.txt'} has no [UNK]: this is no vocabulary of BERT's")
    model = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    model.pre_tokenizer, model.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    for name, token in (names | {"mask_token": "[MASK]"}).items():
        if token in vocabulary:
            settings.setdefault(name, token)
            model.add_special_tokens([AddedToken(token, normalized=False)])
    if "[CLS]" in vocabulary and "[SEP]" in vocabulary:
        model.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return model.to_str().encode()


def _byte_level(folder: Path, settings: dict[str, Any]) -> bytes:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    try:
        model = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:
        raise DamagedFile(f"{folder}: vocab.json and merges.txt are no vocabulary ({str(error)[:200]})") from None
    space = bool(settings.get("add_prefix_space", False))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    model.decoder = decoders.ByteLevel()
    vocabulary = model.get_vocab()
    for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"):
        if token in vocabulary:
            model.add_special_tokens([AddedToken(token, normalized=False)])
    if "<|endoftext|>" in vocabulary:
        settings.setdefault("eos_token", "<|endoftext|>")
        settings.setdefault("bos_token", "<|endoftext|>")
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"}
    for name, token in names.items():
        if token in vocabulary:
            settings.setdefault(name, token)
    return model.to_str().encode()

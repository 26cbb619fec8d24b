"""A SentencePiece model as a tokenizer.json that gives the same ids.

The models meant are those of this project: bpe, unigram and char with the identity normaliser and, but for char, with
byte fallback. Pieces are written with their spaces, not with SentencePiece's mark for them: so U+2581 is spelled in
bytes there as here, and nothing has to be normalised.

BPE joins the pair whose piece has the best score, the leftmost first. A list of merges ranks pairs instead of pieces;
so all ways to cut a piece in two follow each other, the longest left part first: in a run of one character the leftmost
pair is joined first, and what is left over stands at the right.
"""

from typing import Any

SPACE_MARK = "\u2581"
_NO_TEXT = r"<(?=0x[0-9A-F]{2}>|\|[a-z0-9-]+\|>)"
"""Where unigram's text is cut: the library takes the names of bytes and special tokens for pieces of text."""


def tokenizer_json(model: bytes, type: str) -> str:
    """The content of tokenizer.json.

    Args:
        model: a serialized SentencePiece model.
        type: bpe, unigram or char.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    pieces = SentencePieceProcessor(model_proto=model)
    size = pieces.vocab_size()
    names = [pieces.id_to_piece(i) for i in range(size)]
    special = [i for i in range(size) if pieces.is_control(i) or pieces.is_unknown(i)]
    texts = [names[i] if i in special else names[i].replace(SPACE_MARK, " ") for i in range(size)]
    unknown = names[pieces.unk_id()]
    if type == "unigram":
        scored = [(text, pieces.get_score(i)) for i, text in enumerate(texts)]
        inner: Any = models.Unigram(scored, unk_id=pieces.unk_id(), byte_fallback=True)
    else:
        joined = [
            (texts[i], pieces.get_score(i))
            for i in range(size)
            if i not in special and not pieces.is_byte(i) and texts[i] not in ("\n", "\t")
        ]
        merges = _merges(joined) if type == "bpe" else []
        vocabulary = {text: i for i, text in enumerate(texts)}
        inner = models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, byte_fallback=type == "bpe")
    tokenizer = Tokenizer(inner)
    if type == "unigram":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_NO_TEXT), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(names[i], normalized=False, special=True) for i in special])
    return tokenizer.to_str(pretty=False)


def _merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """Pairs to join, first things first: pieces by falling score, cuts of one by falling length of the left part."""
    known = {piece for piece, _ in pieces}
    merges = []
    for piece, _ in sorted(pieces, key=lambda entry: -entry[1]):
        for cut in range(len(piece) - 1, 0, -1):
            if piece[:cut] in known and piece[cut:] in known:
                merges.append((piece[:cut], piece[cut:]))
    return merges

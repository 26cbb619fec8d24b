"""A tokenizer that needs no training: a word is cut every three characters, the space before it belongs to its first
piece, and ids are handed out as pieces come up."""

import re


class PieceTokenizer:
    pad_id, document_id, end_id = 1, 2, 3

    def __init__(self) -> None:
        self.token_bytes = [b""] * 4
        self._ids: dict[bytes, int] = {}

    def encode(self, text: str) -> list[int]:
        if "\N{SNOWMAN}" in text:
            raise ValueError("the snowman is not in the vocabulary")
        ids = []
        for piece in re.findall(r" ?[^\s]{1,3}|\s", text):
            key = piece.encode()
            if key not in self._ids:
                self._ids[key] = len(self.token_bytes)
                self.token_bytes.append(key)
            ids.append(self._ids[key])
        return ids

    def text(self, ids) -> str:
        return b"".join(self.token_bytes[i] for i in ids if i >= 0).decode()


def encode_chat(tokenizer: PieceTokenizer, messages) -> tuple[list[int], list[int]]:
    """`document_id`, then of each message its content and `end_id`; the replies are targets."""
    ids, mask = [tokenizer.document_id], [0]
    for message in messages:
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"unknown role {message['role']!r}")
        content = [tokenizer.document_id, *tokenizer.encode(message["content"]), tokenizer.end_id]
        ids += content
        mask += [0] + [int(message["role"] == "assistant")] * (len(content) - 1)
    return ids, mask

"""Text from ids that come one by one, of tokenizers of the `tokenizers` library."""

from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class HFStreamDecoder:
    """Text from ids one at a time: all pushes and the flush, joined, equal `decode` of the same ids where these are
    valid UTF-8 (what is not gives U+FFFD in both, not always as many)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # what still matters: the last piece shown, as context, and what is held back
        self._shown = ""

    def push(self, i: int) -> str:
        """The characters that this id completes, possibly none. Raises ValueError for an id outside the vocabulary."""
        text = self._tokenizer.decode([*self._ids, i])
        self._ids.append(i)
        if text.endswith(_INCOMPLETE) or len(text) <= len(self._shown):
            return ""
        new = text[len(self._shown) :]
        self._shrink(i, text)
        return new

    def _shrink(self, last: int, text: str) -> None:
        """Forgets all but the last id where the rest cannot matter: it shows something of its own there."""
        alone = self._tokenizer.decode([last])
        if alone and not alone.endswith(_INCOMPLETE):
            self._ids, self._shown = [last], alone
        else:
            self._shown = text

    def flush(self) -> str:
        """What was held back, U+FFFD for a character left incomplete; the decoder is then as new."""
        text = self._tokenizer.decode(self._ids)
        rest = text[len(self._shown) :]
        self._ids, self._shown = [], ""
        return rest

"""Text out of tokens as they come: never half a character, never a part of a stop string."""

from collections.abc import Sequence
from typing import Any

from minillm.config import ModelConfig, UserError


class TextStream:
    """Turns the tokens of one text into pieces that are safe to print at once.

    What could still become a stop string is held back, so that a stop string that spans tokens is never shown in
    part. The text ends before the stop string that is complete first, wherever tokens begin and end.

    Args:
        tokenizer: its `stream_decoder()` has `push(id) -> str` and `flush() -> str`.
        stops: strings that end the text. Raises `UserError` for an empty one.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        if "" in stops:
            raise UserError("a stop string must not be empty: it would end every text at once")
        self.stops = tuple(stops)
        self.text = ""
        """All that was handed out so far."""
        self.stopped = False
        """Whether a stop string came; what follows it is dropped."""
        self._decoder = tokenizer.stream_decoder()
        self._held = ""

    def push(self, token: int) -> str:
        """What can be printed after one more token; "" while it may be part of a character or a stop string."""
        return "" if self.stopped else self._advance(self._decoder.push(token), ended=False)

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        return "" if self.stopped else self._advance(self._decoder.flush(), ended=True)

    def _advance(self, piece: str, *, ended: bool) -> str:
        text = self._held + piece
        matches = [(start + len(stop), start) for stop in self.stops if (start := text.find(stop)) >= 0]
        if matches:
            self.stopped = True
            ready = text[: min(matches)[1]]
        else:
            ready = text if ended else text[: len(text) - self._open_length(text)]
        self._held = "" if self.stopped else text[len(ready) :]
        self.text += ready
        return ready

    def _open_length(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stops if len(stop) > length):
                return length
        return 0


def stop_and_banned(tokenizer: Any, config: ModelConfig, start: Sequence[int] = ()) -> tuple[set[int], set[int]]:
    """Ids that end a text, and ids that must never come in one: special tokens, and rows without a token.

    An encoder-decoder may say sentinels: they are how it names the spans that it fills in. Where its decoder begins
    with another token than document_id, `start`, it may say that one too, as BART's does first of all.
    """
    stops = {tokenizer.end_id} if start and start[0] != tokenizer.document_id else set[int]()
    stops = stops or {tokenizer.document_id, tokenizer.end_id}
    banned = set(tokenizer.special.values()) | set(range(tokenizer.vocab_size, config.vocab_size or 0))
    if config.shape == "encoder-decoder":
        banned -= set(tokenizer.sentinel_ids)
    return stops, banned - stops - {tokenizer.document_id}

"""Text as it comes: tokens to characters, and an end at stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from loraflow.endings import before_first


class TextStream:
    """Turns tokens into pieces of text that add up to the whole, less the first stop string and what follows it.

    A character of several tokens comes with its last one; text that might be the start of a stop string is held back
    until it is known.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._shown = self._start = 0
        self._held = ""

    def push(self, token: int) -> str:
        """The text that another token brings, which may be empty."""
        if self.stopped:
            return ""
        self._ids.append(token)
        before = self._decode(self._ids[self._shown : self._start])
        text = self._decode(self._ids[self._shown :])
        if text.endswith("\ufffd"):
            return ""
        self._shown, self._start = self._start, len(self._ids)
        return self._release(text[len(before) :])

    def finish(self) -> str:
        """What was held back, once no token follows."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._shown : self._start])
        rest = self._decode(self._ids[self._shown :])[len(before) :] if self._start < len(self._ids) else ""
        text = self._cut(self._held + rest)
        self._held = ""
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _release(self, new: str) -> str:
        text = self._cut(self._held + new)
        self._held = ""
        if self.stopped:
            return text
        longest = max((_overlap(text, stop) for stop in self._stop), default=0)
        if longest:
            text, self._held = text[:-longest], text[-longest:]
        return text

    def _cut(self, text: str) -> str:
        kept = before_first(text, self._stop)
        self.stopped = any(stop in text for stop in self._stop)
        return kept


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text are the first of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

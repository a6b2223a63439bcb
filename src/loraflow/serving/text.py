"""Text as it comes: tokens to characters, and an end at stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from loraflow.endings import before_first

# Tokens that are enough for a tokenizer to know that a text does not begin with the next one; vLLM takes as many.
_CONTEXT = 5


class TextStream:
    """Turns tokens into pieces of text that add up to the whole, less the first stop string and what follows it.

    A character of several tokens comes with its last one; text that might be the start of a stop string is held back
    until it is known.

    Args:
        tokenizer: reads the tokens.
        stop: the stop strings.
        before: the tokens that the text continues, where it is to fit theirs: many tokenizers drop a first space.

    Attributes:
        length: characters that are known so far, those held back included.
        stopped: whether a stop string was found.
    """

    length: int
    stopped: bool

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        self.length = 0
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._shown = self._start = 0
        self._held = ""
        tail = list(before[-_CONTEXT:])
        # What continues a part of a character is read for itself.
        if tail and not self._decode(tail).endswith("\ufffd"):
            self._ids, self._start = tail, len(tail)

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
        self.length += len(text) - len(before)
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


class TokenTexts:
    """What each token adds to a text, for itself; a part of a character is a replacement character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        # Tokens are read behind another one, for many tokenizers drop a first space.
        self._before = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._shown = str(tokenizer.decode(self._before))

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            text = str(self._tokenizer.decode([*self._before, token]))
            fits = text.startswith(self._shown)
            self._known[token] = text[len(self._shown) :] if fits else str(self._tokenizer.decode([token]))
        return self._known[token]


def read_through(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[int]]:
    """A text by its tokens: the whole, and where each token's part of it begins."""
    stream = TextStream(tokenizer)
    pieces, starts = [], []
    for token in ids:
        starts.append(stream.length)
        pieces.append(stream.push(token))
    return "".join([*pieces, stream.finish()]), starts


def show_prompt(tokenizer: PreTrainedTokenizerBase, given: str | None, ids: Sequence[int]) -> tuple[str, list[int]]:
    """A prompt as it is shown, and where each of its tokens begins in that.

    Where a tokenizer changes texts (lower case, say), the decoded text is another one; it is shown where the tokenizer
    cannot say where its tokens come from.

    Args:
        tokenizer: reads texts and tokens.
        given: the text that the tokens are of; None where they were given themselves.
        ids: the tokens.
    """
    text, starts = read_through(tokenizer, ids)
    if given is None or text == given or not tokenizer.is_fast:
        return text, starts
    starts, after = [], 0
    for start, end in tokenizer(given, return_offsets_mapping=True)["offset_mapping"]:
        # Those that a tokenizer adds are nowhere in the text.
        starts.append(start if end > start else after)
        after = max(after, end)
    return given, starts


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text are the first of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

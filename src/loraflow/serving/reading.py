"""The work of reading requests: beside everything else, a client's in its turn, and a long text in parts."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from loraflow.serving.pace import Pace
from loraflow.serving.protocol import ApiError
from loraflow.serving.turns import Turns, current_client, end_reading, let_others_go_first, work_in

Read = TypeVar("Read")

# A text of that many characters for each token that there is room for is read in parts: most have too many tokens then.
_CHARACTERS = 16


class Reader:
    """Reads texts for one server.

    Attributes:
        turns: whose request is read next.
        pace: how soon a client is read again.
        longest: tokens of the longest prompt and answer together.
    """

    turns: Turns
    pace: Pace
    longest: int

    def __init__(self, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
        self.pace = Pace()
        self.turns = Turns()
        self.longest = longest
        self._tokenizer = tokenizer
        # One at a time, for neither tokenizers nor the catalog's store of methods want to be shared.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "loraflow-reader")
        self._weighing = Turns()

    def close(self) -> None:
        """Read nothing more."""
        self._thread.shutdown(wait=False)

    async def do(self, work: Callable[..., Read], *args: Any) -> Read:
        """Do some of the work of reading a request."""
        return await work_in(self._thread, work, *args)

    async def do_apart(self, work: Callable[..., Read], *args: Any) -> Read:
        """Do some that needs neither tokenizers nor the catalog."""
        return await work_in(None, work, *args)

    async def weigh(self, work: Callable[..., Read], *args: Any) -> Read:
        """Do some of the work of weighing prompts, which is passes of the model, or long arithmetic.

        One at a time, each client in its turn. Others are read meanwhile: the request's turn at that ends here.
        """
        await end_reading()
        async with self._weighing.turn(current_client()):
            return await work_in(None, work, *args)

    async def ids(self, text: str) -> list[int]:
        """A text's tokens, in no chat format.

        Raises:
            ApiError: if it is far too long.
        """
        await self.check_length(text)
        return await self.do(self._ids, text)

    async def check_length(self, text: str) -> None:
        """Read a long text from its beginning, more of it each time, until it must be too long or is nearly all read.

        Others who have had less have their turn after each part. A cut may take a token apart, so that tokens of a part
        count for half.

        Raises:
            ApiError: if the text is too long.
        """
        part = _CHARACTERS * self.longest
        while part < len(text):
            if len(await self.do(self._ids, text[:part])) > 2 * self.longest:
                raise ApiError(
                    400,
                    f"The prompt has {len(text)} characters, of which the first {part} are more tokens than prompt and "
                    f"answer together may have ({self.longest}). Shorten it.",
                    code="context_length_exceeded",
                )
            await let_others_go_first()
            part *= 4

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

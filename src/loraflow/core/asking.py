"""How a fusion is asked, and where its answers end."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraflow.answers import pad_prompts, require_tokenizer
from loraflow.bases import AddedTokens
from loraflow.endings import Endings
from loraflow.prompts import Message, PromptFormat


class Asking:
    """A prompt format and the ends that go with it; a part of `Fusion`.

    Attributes:
        prompt_origin: where the format comes from, for people.
        added_tokens: what the adapters' tokenizers have beyond the base's, and `tokenizer` has too.
    """

    base_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    endings: Endings
    prompt_origin: str
    added_tokens: AddedTokens
    _prompt: PromptFormat

    @property
    def prompt(self) -> PromptFormat:
        """How questions become prompts; another one brings its own ends of answers."""
        return self._prompt

    @prompt.setter
    def prompt(self, value: PromptFormat) -> None:
        self.set_prompt(value, self.endings.stop)

    def set_prompt(self, prompt: PromptFormat, stop_strings: Sequence[str] = ()) -> None:
        """Ask in a format from now on; answers end where it ends them, and before these texts."""
        self.prompt_origin = "the format that was given"
        self._prompt = prompt if self.tokenizer is None else prompt.resolve(self.tokenizer)
        self.endings = Endings.find(self._prompt, self.tokenizer, self.base_model.generation_config, stop_strings)

    def encode(self, questions: str | Sequence[str | Sequence[Message]]) -> dict[str, Int[Tensor, "batch seq"]]:
        """Questions as `generate`, `weigh` and `trace` take them, in the fusion's prompt format, padded on the left.

        Args:
            questions: one text, or several; each a question, or a conversation of messages up to the user's turn.
        """
        tokenizer = require_tokenizer(self.tokenizer)
        several = [questions] if isinstance(questions, str) else questions
        turns = [[{"role": "user", "content": q}] if isinstance(q, str) else q for q in several]
        return pad_prompts(
            [self.prompt.prompt_ids(tokenizer, turn) for turn in turns], tokenizer, self.base_model.device
        )

"""How a question becomes a prompt: one format, saved with the fusion and used wherever it reads text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jinja2
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from loraflow.errors import DataError

Message = dict[str, str]


class PromptFormat(BaseModel):
    """How a question becomes the text that the model reads.

    Attributes:
        system_prompt: put before every conversation that has none of its own.
        template: for base models without a chat format: text with `{prompt}` and, optionally, `{system}`.
        chat_template: a Jinja chat template; None takes the tokenizer's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    system_prompt: str | None = None
    template: str | None = None
    chat_template: str | None = None

    def resolve(self, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
        """The same format with nothing left to the tokenizer, so that a later change of it changes no prompt.

        Raises:
            DataError: if both templates are given, or the plain one lacks `{prompt}` or a needed `{system}`.
        """
        if self.template is not None and self.chat_template is not None:
            raise DataError("`template` and `chat_template` exclude each other. Give one of them.")
        if self.template is not None:
            if "{prompt}" not in self.template:
                raise DataError(f"`template` (={self.template!r}) has no {{prompt}} in it. Say where the prompt goes.")
            if self.system_prompt is not None and "{system}" not in self.template:
                raise DataError(
                    f"`template` (={self.template!r}) has no {{system}} for the system prompt. Say where it goes."
                )
            return self
        chat_template = self.chat_template or tokenizer.chat_template
        if not isinstance(chat_template, str | None):
            raise DataError("The tokenizer has several chat templates. Give one as `chat_template`.")
        if chat_template is None:
            return self.model_copy(
                update={"template": "{prompt}" if self.system_prompt is None else "{system}\n\n{prompt}"}
            )
        return self.model_copy(update={"chat_template": chat_template})

    def prompt_text(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
        """The text of a conversation that ends with the user's turn, up to where the answer starts."""
        return self._plain(messages) if self.chat_template is None else self._chat(tokenizer, messages, answered=False)

    def prompt_ids(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
        """The token ids of that text; a chat template writes the special tokens itself."""
        text = self.prompt_text(tokenizer, messages)
        return tokenizer(text, add_special_tokens=self.chat_template is None)["input_ids"]

    def completion_ids(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer: str) -> list[int]:
        """Token ids of the answer to that conversation, with whatever ends the turn."""
        if self.chat_template is not None:
            prompt = self._chat(tokenizer, messages, answered=False)
            whole = self._chat(tokenizer, [*messages, {"role": "assistant", "content": answer}], answered=True)
            # A template that writes past turns differently from the running one (it drops thoughts, say) has no
            # usable rest; then the bare answer and the end token are what generation would give.
            if whole.startswith(prompt) and answer.strip() in whole[len(prompt) :]:
                return tokenizer(whole[len(prompt) :].rstrip("\n"), add_special_tokens=False)["input_ids"]
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*ids, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else ids

    def _plain(self, messages: Sequence[Message]) -> str:
        if [message["role"] for message in messages if message["role"] != "system"] != ["user"]:
            raise DataError("A conversation of several turns needs a chat template. Give one as `chat_template`.")
        if messages[0]["role"] == "system" and "{system}" not in (self.template or ""):
            raise DataError(
                f"`template` (={self.template!r}) has no {{system}} for the system prompt. Say where it goes."
            )
        system = next((m["content"] for m in messages if m["role"] == "system"), self.system_prompt)
        assert self.template is not None
        values = {"{system}": system or "", "{prompt}": messages[-1]["content"]}
        # In one pass: a prompt that itself says "{system}" stays as it is.
        return re.sub(r"\{(system|prompt)\}", lambda match: values[match[0]], self.template)

    def _chat(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answered: bool) -> str:
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        options: dict[str, Any] = {"chat_template": self.chat_template, "tokenize": False}
        try:
            text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=not answered, **options)
        except jinja2.TemplateError as error:
            raise DataError(f"The chat template refuses the conversation: {error}") from error
        assert isinstance(text, str)
        return text

"""How a question becomes a prompt: one format, saved with the fusion and used wherever it reads text."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from loraflow.errors import DataError

Message = dict[str, Any]

# An answer that no template changes, and that none writes itself.
_PROBE = "loraflowprobe"


@dataclass(frozen=True)
class TurnEnd:
    """What a chat template writes behind an answer, up to where the turn is over.

    Attributes:
        text: all of it, such as `<end_of_turn>`, or ` </s>`.
        token_id: the token of the tokenizer's own that ends the turn; None where only text does.
        string: the text before that token, or in its place, without space around it; empty where there is none.
    """

    text: str
    token_id: int | None
    string: str


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
        """Token ids of the answer to that conversation, up to and with what ends the turn."""
        end = self.turn_end(tokenizer, messages)
        text = self.turn_text(tokenizer, messages, {"role": "assistant", "content": answer})
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids if end is not None or tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]

    def turn_text(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], turn: Message) -> str:
        """What the model writes for the assistant's turn behind that conversation, up to and with what ends it."""
        text, end = turn["content"], self.turn_end(tokenizer, messages)
        if self.chat_template is not None:
            around = self._around(tokenizer, messages)
            prompt = self._chat(tokenizer, messages, answered=False)
            whole = self._chat(tokenizer, [*messages, turn], answered=True)
            # A template that writes past turns differently from the running one (it drops thoughts, say) has no
            # usable rest; then the bare answer and the end token are what generation would give.
            if around is not None and around[0].startswith(prompt) and _within(whole, *around, turn["content"].strip()):
                text = whole[len(prompt) : len(whole) - len(around[1])]
        return text + (end.text if end else "")

    def turn_end(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> TurnEnd | None:
        """What ends the answer to a conversation by the chat template; None where none says it, and eos has to.

        A template that writes nothing behind an answer may begin the user's next turn with a token, as GLM's does;
        then the answer ends there.
        """
        around = None if self.chat_template is None else self._around(tokenizer, messages)
        if around is None:
            return None
        end = _first_end(tokenizer, around[1])
        if end is not None:
            return end
        try:
            between = self._around(tokenizer, messages, {"role": "user", "content": _PROBE})
        except DataError:
            return None
        end = None if between is None else _first_end(tokenizer, between[1].partition(_PROBE)[0])
        return end if end is not None and end.token_id is not None and not end.string else None

    def _around(
        self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *following: Message
    ) -> tuple[str, str] | None:
        """What the chat template writes before and behind an answer; None where it does not write the answer."""
        answered = [*messages, {"role": "assistant", "content": _PROBE}, *following]
        before, found, behind = self._chat(tokenizer, answered, answered=True).partition(_PROBE)
        return (before, behind) if found else None

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
        assert self.chat_template is not None
        conversation = self.conversation(tokenizer, messages)
        return _rendered(tokenizer, self.chat_template, conversation, answered=answered)

    def conversation(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Message]:
        """A conversation as the chat template is given it: with the system prompt, in parts where it reads those."""
        given = list(messages)
        if self.system_prompt is not None and (not given or given[0]["role"] != "system"):
            given.insert(0, {"role": "system", "content": self.system_prompt})
        assert self.chat_template is not None
        return [_in_parts(message) for message in given] if _reads_parts(tokenizer, self.chat_template) else given


# Of chat templates: whether they read what a message says as a list of parts.
_reading_parts: dict[str, bool] = {}


def _reads_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a template reads contents as lists of parts, as those of models that see images may, and loses texts.

    Raises:
        DataError: if it writes a user's message in neither form.
    """
    if template not in _reading_parts:
        question: Message = {"role": "user", "content": _PROBE}
        try:
            text = _rendered(tokenizer, template, [question], answered=False)
        except DataError:
            # It wants another conversation, and is asked with that.
            return False
        if _PROBE not in text and _PROBE not in _rendered(tokenizer, template, [_in_parts(question)], answered=False):
            raise DataError(
                "The chat template writes nothing of what a user says, neither as a text nor as a list of parts. Give "
                "another as `chat_template`."
            )
        _reading_parts[template] = _PROBE not in text
    return _reading_parts[template]


def _in_parts(message: Message) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _rendered(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Mapping[str, Any]], *, answered: bool
) -> str:
    conversation = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=not answered, chat_template=template, tokenize=False
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise DataError(f"The chat template refuses the conversation: {error}") from error
    assert isinstance(text, str)
    return text


def _within(whole: str, before: str, behind: str, answer: str) -> bool:
    """Whether a text is an answer, with what stands before and behind it, and perhaps space around it."""
    room = len(whole) - len(before) - len(behind)
    return room >= 0 and whole.startswith(before) and whole.endswith(behind) and answer in whole[len(before) :][:room]


_known_tokens: weakref.WeakKeyDictionary[Any, tuple[int, dict[int, str]]] = weakref.WeakKeyDictionary()


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The tokens of a tokenizer's own that are no space, by id; it makes a table of thousands anew at each question."""
    size = len(tokenizer)
    known = _known_tokens.get(tokenizer)
    if known is None or known[0] != size:
        added = {id_: one.content for id_, one in tokenizer.added_tokens_decoder.items() if not one.content.isspace()}
        _known_tokens[tokenizer] = known = size, added
    return known[1]


def _first_end(tokenizer: PreTrainedTokenizerBase, behind: str) -> TurnEnd | None:
    """The first token of the tokenizer's own in the text behind an answer; where there is none, its first line."""
    added = _added_tokens(tokenizer)
    written = tokenizer(behind, add_special_tokens=False)["input_ids"]
    token = next((one for one in written if one in added and added[one] in behind), None)
    before = behind if token is None else behind[: behind.index(added[token])]
    string = before.strip().partition("\n")[0].strip()
    if len(string) == 1 and not string.isalpha():
        string = ""  # A mark such as "." stands inside answers, too.
    if token is not None:
        return TurnEnd(before + added[token], token, string)
    return TurnEnd(behind[: behind.index(string) + len(string)], None, string) if string else None

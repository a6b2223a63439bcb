"""Which tokens of a conversation are the assistant's earlier answers, for learning from all of its turns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from loraflow.errors import DataError
from loraflow.prompts import Message, PromptFormat

# How a chat template marks what the assistant writes, as transformers looks for it.
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REMEDY = "Learn from the last turn (`train_on='last'`), or give another template as `chat_template`."

Span = tuple[int, int]


def earlier_turns(prompt: PromptFormat, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The places, in the ids of a conversation's prompt, of what the assistant has written in it.

    Where the template marks that (`{% generation %}`), as transformers' `return_assistant_tokens_mask` finds it;
    otherwise each answer from where its own prompt ends to what ends its turn. Both are right only if a template writes
    a turn alike whatever follows: one that drops thoughts from past turns would teach to answer without them.

    Args:
        prompt: the format, resolved.
        tokenizer: the model's.
        messages: the conversation up to the turn that is answered.

    Raises:
        DataError: if the template writes a past turn otherwise than as it was answered, or marks none; or the tokenizer
            does not say where its tokens stand.
    """
    if all(message["role"] != "assistant" for message in messages):
        return []
    if not tokenizer.is_fast:
        raise DataError(
            f"The {type(tokenizer).__name__} does not say where its tokens stand in a text, which learning from all "
            "turns needs. Learn from the last turn (`train_on='last'`), or load the fast tokenizer."
        )
    text = prompt.prompt_text(tokenizer, messages)
    spans = _spans(prompt, tokenizer, messages, text)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # A token that begins before an answer is none that the model would write at its start.
    return [
        place
        for place, (start, end) in enumerate(encoded["offset_mapping"])
        if start < end and any(first <= start < last for first, last in spans)
    ]


def _spans(
    prompt: PromptFormat, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str
) -> list[Span]:
    marked = _MARK.search(prompt.chat_template or "") is not None
    found: list[Span] = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if marked:
            written, spans = _marked(prompt, tokenizer, messages[: place + 1])
        else:
            start = prompt.prompt_text(tokenizer, messages[:place])
            written = start + prompt.turn_text(tokenizer, messages[:place], message)
            spans = [(len(start), len(written))]
        if not text.startswith(written):
            raise DataError(
                f"The chat template writes the assistant's turn (message {place + 1} of the conversation) otherwise "
                f"when it is past than when it is answered; it may drop thoughts, or begin answers with some. {_REMEDY}"
            )
        found += spans
    if not found:
        raise DataError(f"The chat template has `{{% generation %}}` in it, and marks no answer with it. {_REMEDY}")
    return found


def _marked(
    prompt: PromptFormat, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[str, list[Span]]:
    """A conversation up to the end of its last answer, and where the template says that answers stand in it."""
    given: Any = {**tokenizer.special_tokens_map, "return_assistant_tokens_mask": True}
    conversation: Any = [prompt.conversation(tokenizer, messages)]
    try:
        rendered, spans = cast(Any, render_jinja_template)(conversation, chat_template=prompt.chat_template, **given)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise DataError(f"The chat template refuses the conversation: {error}") from error
    return rendered[0][: spans[0][-1][1] if spans[0] else 0], spans[0]

"""What ends an answer: one object, saved with the fusion and used wherever it answers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from transformers import GenerationConfig, PreTrainedTokenizerBase

from loraflow.errors import DataError, LoraflowError
from loraflow.prompts import Message, PromptFormat

# A template may want a system's turn before the user's.
_ASKED: tuple[list[Message], ...] = (
    [{"role": "user", "content": "?"}],
    [{"role": "system", "content": "?"}, {"role": "user", "content": "?"}],
)


class Endings(BaseModel):
    """Where an answer ends. No answer has the text of its end in it.

    Attributes:
        token_ids: tokens that end it: the base's, the tokenizer's, and the one with which the chat template ends a
            turn, which need not be one of those.
        strings: texts that end it where the template ends a turn with text that is no token of the tokenizer's own.
        stop: further texts that somebody asked for; one that is the text of a special token is among the tokens too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_ids: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()

    @classmethod
    def find(
        cls,
        prompt: PromptFormat,
        tokenizer: PreTrainedTokenizerBase | None,
        generation_config: GenerationConfig,
        stop: str | Sequence[str] = (),
    ) -> Endings:
        """The ends of answers to prompts of a format.

        Args:
            prompt: the format, resolved.
            tokenizer: the tokenizer, where there is one.
            generation_config: the base's defaults.
            stop: further texts that end an answer.
        """
        ids, texts = token_ids(generation_config.eos_token_id), generation_config.stop_strings or ()
        found = cls(token_ids=ids, strings=(texts,) if isinstance(texts, str) else tuple(texts))
        if tokenizer is not None:
            found = found._and(token_ids(tokenizer.eos_token_id))
            # What a template refuses to write is refused where it is asked in earnest.
            for messages in _ASKED:
                with_template = found.and_turn_end(prompt, tokenizer, messages)
                if with_template is not None:
                    found = with_template
                    break
        return found.and_stop(stop, tokenizer)

    def and_turn_end(
        self, prompt: PromptFormat, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
    ) -> Endings | None:
        """These, and what the template writes behind an answer to a conversation; None where it refuses that."""
        try:
            end = prompt.turn_end(tokenizer, messages)
        except DataError:
            return None
        if end is None:
            return self
        return self._and(token_ids(end.token_id), (end.string,) if end.string else ())

    def and_stop(self, stop: str | Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> Endings:
        """These, and further texts.

        Raises:
            LoraflowError: if one is empty, or has more in it than a special token; or if there is no tokenizer.
        """
        if not stop:
            return self
        stop = [stop] if isinstance(stop, str) else stop
        for text in stop:
            if not isinstance(text, str) or not text:
                raise LoraflowError(f"The stop string {text!r} must be text, and not empty.")
        if tokenizer is None:
            raise LoraflowError(
                f"The stop string {stop[0]!r} is looked for in text, and the base model came without a tokenizer. Give "
                "it as `tokenizer=`."
            )
        special = {known.content: token for token, known in tokenizer.added_tokens_decoder.items() if known.special}
        for text in stop:
            inside = next((token for token in special if token in text and token != text), None)
            if inside is not None and text not in special:
                raise LoraflowError(
                    f"The stop string {text!r} has the special token {inside!r} in it, which the text of an answer "
                    f"never shows. Give {inside!r} alone, or text without it."
                )
        tokens = tuple(special[text] for text in stop if text in special)
        return self._and(tokens)._with("stop", stop)

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts that end an answer."""
        return tuple(dict.fromkeys((*self.strings, *self.stop)))

    def options(
        self,
        given: Mapping[str, Any],
        generation_config: GenerationConfig | None,
        defaults: GenerationConfig,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> tuple[dict[str, Any], GenerationConfig | None]:
        """What `generate` is called with for these ends, where its caller names no others.

        Args:
            given: the options that it was called with.
            generation_config: and the configuration, if there was one.
            defaults: the base's; a configuration that has the same ends, as a copy has, names none.
            tokenizer: finds texts, unless the caller gives one.

        Returns:
            Options and configuration; transformers wants ends to be named in one of the two.
        """
        options = dict(given)
        config = copy.deepcopy(generation_config)
        for name, ends in (("eos_token_id", self.token_ids), ("stop_strings", self.texts)):
            own = getattr(config, name, None)
            if name in given or own not in (None, getattr(defaults, name)) or not ends:
                continue
            if config is None:
                options[name] = list(ends)
            else:
                setattr(config, name, list(ends))
        if tokenizer is not None and (options.get("stop_strings") or getattr(config, "stop_strings", None)):
            options.setdefault("tokenizer", tokenizer)
        return options, config

    def describe(self, tokenizer: PreTrainedTokenizerBase | None) -> str:
        """All of them, for people."""
        known = {token: repr(tokenizer.decode([token])) for token in self.token_ids} if tokenizer is not None else {}
        tokens = [f"{known[token]} ({token})" if known else str(token) for token in self.token_ids]
        texts = [text for text in map(repr, self.texts) if text not in known.values()]
        return ", ".join([*tokens, *texts]) or "the longest length only"

    def _and(self, tokens: Sequence[int] = (), strings: Sequence[str] = ()) -> Endings:
        return self._with("token_ids", tokens)._with("strings", strings)

    def _with(self, name: str, values: Sequence[Any]) -> Endings:
        return self.model_copy(update={name: tuple(dict.fromkeys((*getattr(self, name), *values)))})


def token_ids(value: Any) -> tuple[int, ...]:
    """End tokens as transformers may write them: none, one, or several; -1 is none."""
    several = value.tolist() if hasattr(value, "tolist") else value
    several = [several] if several is None or isinstance(several, int) else several
    return tuple(dict.fromkeys(int(token) for token in several if token is not None and token >= 0))


def before_first(text: str, stop: Sequence[str]) -> str:
    """A text up to the first stop string in it."""
    found = [(place + len(one), place) for one in stop if (place := text.find(one)) >= 0]
    # The first to be complete, as if characters came one by one: where tokens end must not matter.
    return text[: min(found)[1]] if found else text

"""What stands beside adapters of the tokenizer that they were trained with: a chat template, and tokens of their own.

It is used where all adapters that bring it agree; one that brings none says nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, RootModel, ValidationError
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase
from transformers.utils import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE, cached_file

from loraflow.adapters import AdapterSource
from loraflow.errors import DataError
from loraflow.prompts import PromptFormat


class _Manners(BaseModel):
    """How tokenizers find a token in a text."""

    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = False


class TokenRecord(_Manners):
    """A token beyond a tokenizer's own vocabulary, as tokenizers describe it."""

    model_config = ConfigDict(frozen=True)

    id: int

    def added(self, text: str) -> AddedToken:
        """The same as tokenizers take it."""
        return AddedToken(text, **self.model_dump(exclude={"id"}))


AddedTokens = dict[str, TokenRecord]
"""Tokens by their text."""


class _Named(BaseModel):
    name: str
    template: str


class _Described(_Manners):
    content: str


class _Listed(_Described):
    id: int


class _Config(BaseModel):
    """What is read of `tokenizer_config.json`."""

    chat_template: str | dict[str, str] | list[_Named] | None = None
    added_tokens_decoder: dict[int, _Described] = {}


class _Whole(BaseModel):
    """What is read of `tokenizer.json`."""

    added_tokens: list[_Listed] = []


class _Old(RootModel[dict[str, int]]):
    """What older versions of transformers wrote into `added_tokens.json`."""

    root: dict[str, int] = {}


_File = TypeVar("_File", bound=BaseModel)


@dataclass(frozen=True)
class Beside:
    """What one adapter brings.

    Attributes:
        templates: its chat templates, by name; the usual one is called `default`.
        tokens: all added tokens of its tokenizer.
    """

    templates: Mapping[str, str] = field(default_factory=dict)
    tokens: AddedTokens = field(default_factory=dict)


@dataclass(frozen=True)
class Manner:
    """How a base is asked with some adapters.

    Attributes:
        prompt: the prompt format.
        origin: where its template comes from, for people.
        tokens: the tokens that the base's tokenizer lacks.
        brought: whether the template is the adapters'.
    """

    prompt: PromptFormat
    origin: str
    tokens: AddedTokens = field(default_factory=dict)
    brought: bool = False


def read_beside(source: AdapterSource) -> Beside:
    """What an adapter's directory or repository has of a tokenizer, without loading it.

    Raises:
        DataError: if a file of it is damaged.
    """
    config = _read_as(_Config, source, "tokenizer_config.json")
    found = config.chat_template or {}
    if isinstance(found, list):
        found = {one.name: one.template for one in found}
    templates = {"default": found} if isinstance(found, str) else dict(found)
    path = _file(source, CHAT_TEMPLATE_FILE)
    if path is not None:
        # As in transformers: files go before the configuration. Of further ones it is enough to know that they are
        # there; they are not read, for a link among them may lead anywhere.
        folder = Path(source.path).expanduser() / CHAT_TEMPLATE_DIR
        more = sorted(folder.glob("*.jinja")) if source.is_local else []
        templates = {one.stem: one.name for one in more} | {"default": _read(path)}
    known = {name: text.removesuffix("\n") for name, text in templates.items() if text.strip()}
    return Beside(known, _tokens(source, config))


def choose(
    prompt: PromptFormat, tokenizer: PreTrainedTokenizerBase | None, sources: Mapping[str, AdapterSource], rows: int
) -> Manner:
    """The prompt format for some adapters: the one that is given, that which they bring, or the tokenizer's.

    Args:
        prompt: what is given, which may leave the template open.
        tokenizer: the base's, where there is one.
        sources: where the adapters are, by name.
        rows: how many tokens the base has embeddings for.

    Raises:
        DataError: if they bring different templates or tokens, or one brings several templates, or a template writes
            a token that cannot be had.
    """
    if tokenizer is None:
        return Manner(prompt, "no tokenizer")
    beside = {name: read_beside(source) for name, source in sources.items()}
    if prompt.template is not None or prompt.chat_template is not None:
        kind = "plain" if prompt.chat_template is None else "chat"
        choice = Manner(prompt, f"the {kind} template that was given")
    else:
        choice = _brought(prompt, tokenizer, beside)
    written = choice.prompt.template or choice.prompt.chat_template or ""
    return replace(choice, tokens=_missing(tokenizer, beside, rows, written))


def _brought(prompt: PromptFormat, tokenizer: PreTrainedTokenizerBase, beside: Mapping[str, Beside]) -> Manner:
    """The format with the template that adapters bring, or else with the tokenizer's.

    Raises:
        DataError: if there are several.
    """
    holders: dict[str, list[str]] = {}
    for name, one in beside.items():
        if len(one.templates) > 1:
            raise DataError(
                f"The adapter {name!r} brings several chat templates ({', '.join(sorted(one.templates))}). Give one as "
                "`chat_template=...`."
            )
        for text in one.templates.values():
            holders.setdefault(text, []).append(name)
    if len(holders) > 1:
        groups = "; another: ".join(_names(names) for names in holders.values())
        raise DataError(
            f"The adapters bring different chat templates. One: {groups}. Give the one to use as `chat_template=...`."
        )
    own = tokenizer.chat_template
    # Jinja drops one line end behind a template, so that those with and without it are the same.
    if not holders or (isinstance(own, str) and list(holders) == [own.removesuffix("\n")]):
        return Manner(prompt, "no chat template: plain text" if own is None else "the base tokenizer's chat template")
    ((text, names),) = holders.items()
    origin = f"the chat template of the adapter{'s' * (len(names) > 1)} {_names(names)}"
    if own is not None:
        origin += ", which is not the base's"
    return Manner(prompt.model_copy(update={"chat_template": text}), origin, brought=True)


def _missing(tokenizer: PreTrainedTokenizerBase, beside: Mapping[str, Beside], rows: int, written: str) -> AddedTokens:
    """The tokens that adapters' tokenizers have, and the base's lacks and could have with the same ids.

    A token that cannot be had is no matter where no template writes it: padding is often such a one.

    Raises:
        DataError: if one cannot be had that a template writes, or adapters disagree on one.
    """
    vocabulary = tokenizer.get_vocab()
    missing: AddedTokens = {}
    holders: dict[str | int, tuple[str, str, int]] = {}
    for name, one in beside.items():
        for text, token in one.tokens.items():
            place = token.id
            if vocabulary.get(text) == place:
                continue
            if not (len(tokenizer) <= place < rows) or text in vocabulary:
                _refuse_written(name, text, place, written, vocabulary.get(text), rows)
                continue
            for key in (text, place):
                other, its, there = holders.setdefault(key, (name, text, place))
                if (its, there) != (text, place):
                    raise DataError(
                        f"The adapter {name!r} was trained with the token {text!r} as {place}, and the adapter "
                        f"{other!r} with {its!r} as {there}. Use adapters of one tokenizer."
                    )
            missing[text] = token
    following = len(tokenizer)
    for text, token in sorted(missing.items(), key=lambda item: item[1].id):
        if token.id != following:
            _refuse_written(holders[text][0], text, token.id, written, None, rows)
            del missing[text]
        following += token.id == following
    return missing


def _refuse_written(name: str, text: str, place: int, written: str, base: int | None, rows: int) -> None:
    if text in written:
        there = (
            f"the base's tokenizer has it as {base}" if base is not None else "the base's tokenizer has no room there"
        )
        raise DataError(
            f"The adapter {name!r} was trained with the token {text!r} as {place}, which the template writes, and "
            f"{there}; the base has embeddings for {rows} tokens. Give the adapter's own base, or another template as "
            "`chat_template=...`."
        )


def with_tokens(tokenizer: PreTrainedTokenizerBase, tokens: AddedTokens) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer with added tokens; the tokenizer itself where it lacks none.

    Raises:
        DataError: if one would get another id than it has.
    """
    vocabulary = tokenizer.get_vocab()
    wanted = sorted((token.id, text) for text, token in tokens.items() if vocabulary.get(text) != token.id)
    if not wanted:
        return tokenizer
    extended = copy.deepcopy(tokenizer)
    for place, text in wanted:
        extended.add_tokens([tokens[text].added(text)], special_tokens=tokens[text].special)
        found = extended.convert_tokens_to_ids(text)
        if found != place:
            raise DataError(
                f"The token {text!r} must be {place}, and is {found} in this tokenizer. Give the tokenizer that the "
                "adapters were trained with as `tokenizer=...`."
            )
    return extended


def _tokens(source: AdapterSource, config: _Config) -> AddedTokens:
    """The added tokens of a tokenizer, wherever its version of transformers wrote them."""
    old = _read_as(_Old, source, "added_tokens.json").root
    found = {text: TokenRecord(id=token, special=True) for text, token in old.items()}
    whole = _read_as(_Whole, source, "tokenizer.json").added_tokens
    described = [(one.id, one) for one in whole] + list(config.added_tokens_decoder.items())
    for token, one in described:
        found[one.content] = TokenRecord(**{**one.model_dump(exclude={"content"}), "id": token})
    return found


def _names(names: Sequence[str]) -> str:
    *others, last = map(repr, names)
    return f"{', '.join(others)} and {last}" if others else last


def _file(source: AdapterSource, name: str) -> Path | None:
    """A file of an adapter; None where it has none, or the Hub cannot be asked."""
    if source.is_local:
        path = Path(source.path).expanduser() / name
        return path if path.is_file() else None
    user, repo, *folders = source.path.strip("/").split("/")
    found = cached_file(
        f"{user}/{repo}",
        name,
        subfolder="/".join(folders),
        revision=source.revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} beside an adapter is no UTF-8 text: {error}. Restore or remove it.") from error


def _read_as(kind: type[_File], source: AdapterSource, name: str) -> _File:
    """A JSON file of an adapter; an empty one where it has none."""
    path = _file(source, name)
    try:
        return kind.model_validate({}) if path is None else kind.model_validate_json(_read(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        where = f"{path} beside an adapter" + (f": `{place}`" if place else "")
        raise DataError(f"{where}: {first['msg']}. Restore or remove it.") from error

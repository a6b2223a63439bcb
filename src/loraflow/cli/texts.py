"""Options that say which texts are read, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraflow.cli.groups import panel
from loraflow.errors import LoraflowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loraflow.endings import Endings
    from loraflow.examples import Example, Fields
    from loraflow.prompts import PromptFormat

data_option = panel("Data")
_reading = panel("How text is read")

Dev = Annotated[str | None, data_option("--dev", help="Examples on which the best checkpoint is chosen.")]
TrainOn = Annotated[
    str,
    data_option(
        "--train-on",
        help="Which of the assistant's turns in a conversation are learned: the last one, or all.",
    ),
]


@dataclass(frozen=True)
class FieldNames:
    """Which fields of a record are its prompt and its completion."""

    prompt_field: Annotated[
        str | None,
        data_option(
            "--prompt-field",
            help="Field that is the prompt, `data.0` for the first item of the list `data`; or text with fields in it: "
            "'Question: {question}\\nAnswer:'.",
        ),
    ] = None
    completion_field: Annotated[
        str | None, data_option("--completion-field", help="Field that is the completion, or text with fields.")
    ] = None

    def fields(self) -> Fields | None:
        """The two fields; None where they have their usual names."""
        return named_fields(self.prompt_field, self.completion_field)


@dataclass(frozen=True)
class DevExamples:
    """Dev examples, and the fields of all examples."""

    dev: Dev = None
    names: FieldNames = field(default_factory=FieldNames)
    dev_prompt_field: Annotated[
        str | None, data_option("--dev-prompt-field", help="The same for --dev, where its fields differ.")
    ] = None
    dev_completion_field: Annotated[
        str | None, data_option("--dev-completion-field", help="The same for --dev, where its fields differ.")
    ] = None

    def read(self) -> list[Example] | None:
        """The dev examples, where there are any."""
        from loraflow.examples import read_examples

        prompt = self.dev_prompt_field or self.names.prompt_field
        fields = named_fields(prompt, self.dev_completion_field or self.names.completion_field)
        return None if self.dev is None else read_examples(self.dev, fields)


@dataclass(frozen=True)
class PromptOptions:
    """How conversations become prompts."""

    system_prompt: Annotated[
        str | None, _reading("--system-prompt", help="Put before every conversation; a fusion that is saved keeps it.")
    ] = None
    prompt_template: Annotated[
        str | None,
        _reading("--prompt-template", help="Plain prompt text with {prompt} and {system}; \\n is a new line."),
    ] = None
    chat_template: Annotated[
        Path | None, _reading("--chat-template", help="File with a Jinja chat template, instead of the tokenizer's.")
    ] = None

    def format(self) -> PromptFormat:
        """The prompt format that the options describe.

        Raises:
            LoraflowError: if the chat template's file cannot be read.
        """
        from loraflow.prompts import PromptFormat

        try:
            chat = self.chat_template.read_text(encoding="utf-8") if self.chat_template is not None else None
        except OSError as error:
            raise LoraflowError(f"`--chat-template`: {error}") from error
        plain = _with_new_lines(self.prompt_template) if self.prompt_template is not None else None
        return PromptFormat(system_prompt=self.system_prompt, template=plain, chat_template=chat)

    def over(self, own: PromptFormat) -> PromptFormat:
        """A format with what the options say in place of what it has; a template of either kind is one."""
        given = self.format().model_dump(exclude_none=True)
        unsaid = own.template == "{prompt}" and "system_prompt" in given
        if given.keys() & {"template", "chat_template"} or unsaid:
            # A prompt alone is what a format without a template became; it is chosen anew for the system prompt.
            given = {"template": None, "chat_template": None, **given}
        return own.model_copy(update=given)


Stop = Annotated[
    list[str],
    typer.Option(
        "--stop",
        help="An answer ends before this text too; \\n is a new line; give it again for more.  [default: where the "
        "chat template, the tokenizer or the base ends it]",
        show_default=False,
    ),
]


def stop_strings(stop: Sequence[str]) -> list[str]:
    """What `--stop` says."""
    return [_with_new_lines(text) for text in stop]


def manner_line(origin: str, endings: Endings, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """How a model is asked and where its answers end, for people."""
    return f"prompts: {origin}; answers end at {endings.describe(tokenizer)}"


def _with_new_lines(text: str) -> str:
    return text.replace("\\n", "\n")


def named_fields(prompt: str | None, completion: str | None) -> Fields | None:
    """The fields that options name; None where they name none.

    Raises:
        LoraflowError: if only one of the two is named.
    """
    from loraflow.examples import Fields

    if (prompt is None) != (completion is None):
        raise LoraflowError("`--prompt-field` and `--completion-field` go together. Give both, or neither.")
    if prompt is None or completion is None:
        return None
    return Fields(_with_new_lines(prompt), _with_new_lines(completion))

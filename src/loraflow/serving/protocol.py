"""What requests may say: OpenAI's fields, and this server's beyond them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StrictBool,
    StrictInt,
    field_validator,
    model_validator,
)

from loraflow.errors import LoraflowError
from loraflow.serving.forms import Form
from loraflow.serving.no_ops import (
    ChatNoOps,
    CompletionNoOps,
    MessageNoOps,
    NoOps,
    Nothing,
    Off,
    Only,
    StreamNoOps,
    Whole,
)

# OpenAI takes 4; tasks of lm-evaluation-harness have more.
Stop = Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=16)]
# Each new character is compared with all of them.
_STOP_CHARACTERS = 4000
# Strict: true is no number, nor is a text.
Finite = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Count = Annotated[int, Strict(), Field(ge=1), Whole]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, value: Any) -> Any:
        # As with OpenAI, a field that is null is one that is left out.
        return {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else value


class FusionChoice(_Body):
    """Another method for one request."""

    method: str
    options: dict[str, Any] = {}

    @field_validator("options")
    @classmethod
    def _are_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        # They are sent back with the answer. Python's parser takes NaN and Infinity.
        try:
            json.dumps(value, allow_nan=False)
        except ValueError as error:
            raise ValueError(f"the options are no JSON ({error}). Give finite numbers.") from error
        return value


class AutoChoice(_Body):
    """What the model `auto` may pick for one request; what is left out is as the server has it.

    Attributes:
        adapters: the only adapters that it may pick.
        top_k: how many it may pick at most; no token is sampled by it.
        floor: an adapter that scores less is not picked.
    """

    adapters: Annotated[list[Annotated[str, Field(max_length=1000)]], Field(min_length=1)] | None = None
    top_k: Count | None = None
    floor: Finite | None = None


class StreamOptions(StreamNoOps, _Body):
    """OpenAI's."""

    include_usage: StrictBool = False


class JsonSchema(_Body):
    """OpenAI's: a schema with a name, which is taken and not used. It is always held to, `strict` or not."""

    name: str | None = None
    description: str | None = None
    strict: StrictBool | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(_Body):
    """OpenAI's: the form of an answer."""

    type: Annotated[Any, Only("text", "json_object", "json_schema", vllm=True)]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('`json_schema` and `type` (="json_schema") need each other. Give both, or neither.')
        return self

    def form(self) -> Form | None:
        """What it asks for; None for any text."""
        if self.json_schema is not None:
            return Form.of_schema(self.json_schema.schema_, "response_format")
        return Form.of_schema({"type": "object"}, "response_format") if self.type == "json_object" else None


class StructuredOutputs(_Body):
    """vLLM's: the form of an answer, by exactly one of these."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    json_object: StrictBool | None = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    grammar: Nothing = None
    structural_tag: Nothing = None
    whitespace_pattern: Nothing = None
    disable_any_whitespace: Off = None
    disable_additional_properties: Off = None
    disable_fallback: Off = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [self.json_ is not None, bool(self.json_object), self.regex is not None, self.choice is not None]
        if sum(given) != 1:
            raise ValueError(
                f"{sum(given)} of `json`, `json_object`, `regex` and `choice` are given, and exactly one must be. "
                "Give one."
            )
        return self

    def form(self) -> Form:
        """What it asks for."""
        name = "structured_outputs"
        if self.regex is not None:
            return Form("regex", self.regex, name)
        if self.choice is not None:
            return Form.of_choice(self.choice, name)
        return Form.of_schema({"type": "object"} if self.json_ is None else self.json_, name)


class Generation(NoOps, _Body):
    """What chat and plain completions share.

    Attributes:
        model: the base, an adapter or a fusion, by name.
        stream: send tokens as they come.
        stop: an answer ends before the first of these strings.
        n: how many answers.
        temperature: 0 is greedy.
        top_p: sample from the smallest set of tokens with this probability.
        response_format: the form of the answers.
        structured_outputs: the same, in vLLM's words.
        adapter_weights: fusion weights by adapter, for this request.
        fusion: another method on the model's adapters, for this request.
        auto: what may be picked for this request, where the model is `auto`.
        return_fusion_weights: send each token's weights with it: the mean over the layers (true), or of all of them.
        cache_salt: vLLM's: only requests with the same one share what is in the cache.
    """

    model: Annotated[str, Field(max_length=1000)]
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[str, Field(max_length=1000)] | Stop | None = None
    seed: Annotated[int, Strict(), Field(ge=-(2**63), lt=2**63), Whole] | None = None
    n: Annotated[int, Strict(), Field(ge=1, le=16), Whole] = 1
    temperature: Annotated[float, Strict(), Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Strict(), Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    adapter_weights: dict[str, Finite] | None = None
    fusion: FusionChoice | None = None
    auto: AutoChoice | None = None
    return_fusion_weights: StrictBool | Literal["all"] = False
    cache_salt: Annotated[str, Field(min_length=1, max_length=1000)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        # JSON may have half of a surrogate pair in it, which neither tokenizers nor answers take.
        rest = value
        try:
            if isinstance(value, dict):
                # Long texts, which are cheaper as they are.
                texts = [name for name, one in value.items() if isinstance(one, str)]
                "".join(value[name] for name in texts).encode()
                rest = {name: "" if name in texts else one for name, one in value.items()}
            json.dumps(rest, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            character = error.object[error.start]
            raise ValueError(f"{character!a} is half of a surrogate pair, and no text. Leave it out.") from error
        except RecursionError as error:
            raise ValueError("it is nested too deeply to be read. Nest it less.") from error
        return value

    @model_validator(mode="after")
    def _options_of_streams(self) -> Self:
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise ValueError("`stream_options` needs `stream`. Set it to true, or leave them out.")
        return self

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None and "" in ([value] if isinstance(value, str) else value):
            raise ValueError("a stop string is empty. Leave it out.")
        if isinstance(value, list) and sum(map(len, value)) > _STOP_CHARACTERS:
            count = sum(map(len, value))
            raise ValueError(
                f"the stop strings have {count} characters, and may have at most {_STOP_CHARACTERS} together. Send "
                "less."
            )
        return value

    def form(self) -> Form | None:
        """The form that the answers are to have.

        Raises:
            LoraflowError: if there are two, or it is too long.
        """
        asked = None if self.response_format is None else self.response_format.form()
        if self.structured_outputs is None:
            return asked
        if asked is not None:
            raise LoraflowError("`response_format` and `structured_outputs` exclude each other. Give one of them.")
        return self.structured_outputs.form()

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class TextPart(_Body):
    """A part of a message."""

    type: Annotated[Any, Only("text", vllm=True)]
    text: str


def _parts(value: Any) -> Any:
    # One kind of content, so that what is wrong with a part is told as that and not as a text that it is none of.
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ChatMessage(MessageNoOps, _Body):
    """One message of a conversation.

    Attributes:
        name: taken, and not used.
    """

    role: Annotated[Any, Only("system", "developer", "user", "assistant", vllm=True)]
    content: Annotated[list[TextPart], BeforeValidator(_parts, json_schema_input_type=str | list[TextPart])]
    name: str | None = None

    @property
    def turn(self) -> str:
        """Whose turn it is, in the words of templates: to them, what developers say is the system's."""
        return "system" if self.role == "developer" else str(self.role)

    @property
    def text(self) -> str:
        """The whole content."""
        return "".join(part.text for part in self.content)


class ChatRequest(ChatNoOps, Generation):
    """A request for `/v1/chat/completions`.

    Attributes:
        messages: the conversation, which ends with the user's turn.
        max_tokens: the longest answer; by default what the server allows.
        max_completion_tokens: the same, by its newer name.
        logprobs: send the log-probability of each token.
        top_logprobs: and those of so many of the likeliest.
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: StrictBool = False
    top_logprobs: Annotated[int, Strict(), Field(ge=0, le=20), Whole] | None = None


class CompletionRequest(CompletionNoOps, Generation):
    """A request for `/v1/completions`.

    Attributes:
        prompt: text or token ids, or several of either.
        max_tokens: the longest answer; 0 only tells the prompt.
        echo: begin each answer with its prompt, whose tokens come with log-probabilities where these are asked for.
        logprobs: send the log-probabilities of each token and of so many of the likeliest.
        best_of: only `n`.
    """

    # Of many that are wrong the first one is told.
    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True)]
        | Annotated[list[StrictInt], Field(fail_fast=True)]
        | Annotated[list[Annotated[list[StrictInt], Field(fail_fast=True)]], Field(fail_fast=True)]
    )
    max_tokens: Annotated[int, Strict(), Field(ge=0), Whole] | None = 16
    echo: StrictBool = False
    logprobs: Annotated[int, Strict(), Field(ge=0, le=5), Whole] | None = None
    best_of: Count | None = None

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("`max_tokens` (=0) asks for nothing without `echo`. Set that to true, or ask for more.")
        return self


class LoadRequest(_Body):
    """A request for `/v1/load_lora_adapter`, with vLLM's names for its fields.

    Attributes:
        lora_name: what requests will call it.
        lora_path: directory of an adapter, or of a saved fusion.
    """

    lora_name: Annotated[str, Field(min_length=1)]
    lora_path: Annotated[str, Field(min_length=1)]


class UnloadRequest(_Body):
    """A request for `/v1/unload_lora_adapter`."""

    lora_name: str


@dataclass(eq=False)
class ApiError(Exception):
    """An answer of OpenAI's error form.

    Attributes:
        status: the HTTP status.
        message: the fact, the value and the remedy.
        kind: OpenAI's `type`.
        param: the field that is wrong.
        code: OpenAI's `code`.
        headers: further headers of the answer.
    """

    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

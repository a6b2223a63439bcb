"""Fields of OpenAI's and vLLM's APIs that are taken where they change nothing.

Clients send many fields with the value that holds anyway. Here each such field has the values that change nothing of an
answer; any other is refused by name, and where vLLM has the field, `--engine vllm` is the way to it.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler, StrictBool
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


def _whole(value: Any) -> Any:
    # JSON has one kind of number, and some clients write 16.0 for 16.
    return int(value) if isinstance(value, float) and value.is_integer() else value


# The last of an integer's annotations, so that its bounds hold for what becomes of it.
Whole = BeforeValidator(_whole)


class Only:
    """The values that a field may have.

    Args:
        values: those that change nothing; null, which is as if left out, is always one.
        vllm: whether vLLM's server has the field.
    """

    def __init__(self, *values: Any, vllm: bool = False) -> None:
        self._values = values
        allowed = " or ".join(map(json.dumps, values)) or "null"
        remedy = "Leave it out, or start the server with --engine vllm" if vllm else "Leave it out"
        self._refusal = f"is not supported, only {allowed} is. {remedy}"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self._values)} if self._values else {"type": "null"}

    def _check(self, value: Any) -> Any:
        if not any(_same(value, one) for one in self._values):
            raise PydanticCustomError("not_supported", "{refusal}", {"refusal": self._refusal})
        return value


def _same(value: Any, other: Any) -> bool:
    # To Python, true is 1.
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


# What only says who asks, or what for, and a flag of something that there is none of.
Label: TypeAlias = str | None
Flag: TypeAlias = StrictBool | None
Nothing: TypeAlias = Annotated[Any, Only(vllm=True)]
Off: TypeAlias = Annotated[Any, Only(False, vllm=True)]
On: TypeAlias = Annotated[Any, Only(True, vllm=True)]
Zero: TypeAlias = Annotated[Any, Only(0, vllm=True)]
One: TypeAlias = Annotated[Any, Only(1, vllm=True)]
EmptyList: TypeAlias = Annotated[Any, Only([], vllm=True)]
EmptyMap: TypeAlias = Annotated[Any, Only({}, vllm=True)]


class StreamNoOps(BaseModel):
    """Those of `stream_options`."""

    include_obfuscation: Annotated[Any, Only(False)] = None
    continuous_usage_stats: Off = None


class MessageNoOps(BaseModel):
    """Those of a message: answers come back with them in the next turn."""

    refusal: Annotated[Any, Only()] = None
    annotations: Annotated[Any, Only([])] = None
    audio: Annotated[Any, Only()] = None
    function_call: Nothing = None
    tool_calls: EmptyList = None


class NoOps(BaseModel):
    """Those of chat and plain completions."""

    user: Label = None
    metadata: dict[str, Any] | None = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None
    store: Annotated[Any, Only(False)] = None
    service_tier: Annotated[Any, Only("auto", "default")] = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    repetition_penalty: One = None
    length_penalty: One = None
    logit_bias: dict[str, Zero] | None = None
    top_k: Annotated[Any, Only(-1, 0, vllm=True)] = None
    min_p: Zero = None
    min_tokens: Zero = None
    ignore_eos: Off = None
    stop_token_ids: EmptyList = None
    bad_words: EmptyList = None
    allowed_token_ids: Nothing = None
    include_stop_str_in_output: Off = None
    skip_special_tokens: On = None
    spaces_between_special_tokens: On = None
    use_beam_search: Off = None
    early_stopping: Off = None
    watermarking: Off = None
    prompt_logprobs: Nothing = None
    logprob_token_ids: Nothing = None
    truncate_prompt_tokens: Nothing = None
    truncation_side: Nothing = None
    thinking_token_budget: Nothing = None
    repetition_detection: Nothing = None
    logits_processors: EmptyList = None
    priority: Zero = None
    stream_interval: One = None
    return_tokens_as_token_ids: Off = None
    return_token_ids: Off = None
    return_token_offsets: Off = None
    request_id: Nothing = None
    session_id: Nothing = None
    kv_transfer_params: Nothing = None
    ec_transfer_params: Nothing = None
    vllm_xargs: EmptyMap = None


class ChatNoOps(NoOps):
    """Those of conversations alone."""

    tools: EmptyList = None
    tool_choice: Annotated[Any, Only("none", "auto", vllm=True)] = None
    functions: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    parallel_tool_calls: Flag = None
    reasoning_effort: Annotated[Any, Only("none", vllm=True)] = None
    include_reasoning: Flag = None
    verbosity: Annotated[Any, Only("medium")] = None
    modalities: Annotated[Any, Only(["text"])] = None
    audio: Annotated[Any, Only()] = None
    prediction: Annotated[Any, Only()] = None
    moderation: Annotated[Any, Only()] = None
    web_search_options: Annotated[Any, Only()] = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: Label = None
    echo: Off = None
    add_generation_prompt: On = None
    continue_final_message: Off = None
    add_special_tokens: Off = None
    documents: EmptyList = None
    chat_template: Nothing = None
    chat_template_kwargs: EmptyMap = None
    media_io_kwargs: EmptyMap = None
    mm_processor_kwargs: EmptyMap = None
    return_prompt_text: Off = None


class CompletionNoOps(NoOps):
    """Those of plain completions alone."""

    suffix: Annotated[Any, Only("")] = None
    add_special_tokens: On = None
    prompt_embeds: Nothing = None

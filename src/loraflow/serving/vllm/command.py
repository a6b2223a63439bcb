"""The command that serves a saved fusion with vLLM's own server. vLLM need not be installed to make it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraflow.errors import LoraflowError
from loraflow.prompts import PromptFormat
from loraflow.saved.fusion import SavedFusion
from loraflow.serving.vllm import LOAD_FORMAT
from loraflow.serving.vllm.request_weights import SCHEDULER, processor_name

_OURS = ("--load-format", "--model-loader-extra-config", "--logits-processors")


def vllm_command(
    fusion: str | Path,
    extra_args: Sequence[str] = (),
    *,
    base: str | None = None,
    adapters: Mapping[str, str] | None = None,
    request_weights: bool = False,
    unverified: bool = False,
) -> list[str]:
    """Compose the command.

    Args:
        fusion: directory or Hub id of the saved fusion.
        extra_args: further options of `vllm serve`, which take the place of those composed here.
        base: another place of the base.
        adapters: other places of the adapters, by name.
        request_weights: whether requests may bring weights of their own; where the method weighs whole prompts, they
            must, and it is so anyway.
        unverified: whether a base that has not been compared with transformers is served too.

    Raises:
        LoraflowError: if `extra_args` has an option that is composed here, or lacks a tokenizer that is needed.
    """
    saved = SavedFusion.open(fusion)
    directory = saved.directory.resolve()
    given = {argument.partition("=")[0] for argument in extra_args if argument.startswith("--")}
    for option in _OURS:
        if option in given:
            raise LoraflowError(f"`{option}` is composed from the fusion. Leave it out.")
    if saved.config.added_tokens and "--tokenizer" not in given:
        raise LoraflowError(
            f"The fusion {saved.name!r} was made with tokens that the base's tokenizer lacks "
            f"({', '.join(map(repr, saved.config.added_tokens))}), and vLLM reads with the base's. Name a directory "
            "with a tokenizer that has them: `--tokenizer DIRECTORY` among vLLM's options."
        )
    base = base or saved.base
    if saved.method.level == "query":
        request_weights = True
    loader: dict[str, Any] = {"fusion": str(directory), "digest": saved.digest}
    loader |= {"adapters": dict(adapters)} if adapters else {}
    loader |= {"unverified": True} if unverified else {}
    command = [_program(), "serve", base, "--load-format", LOAD_FORMAT]
    command += ["--model-loader-extra-config", json.dumps(loader)]
    if request_weights:
        command += ["--logits-processors", processor_name(str(directory))]
    # Among what the caller gives there may be others: vLLM takes this option several times.
    command += ["--middleware", f"loraflow.serving.vllm.fields.{'Request' if request_weights else 'Refused'}Fields"]
    for option, value in _defaults(saved, base, request_weights).items():
        if option not in given and value is not None:
            command += [option, value] if value else [option]
    return [*command, *extra_args]


def _program() -> str:
    # That of the running interpreter: another environment's vLLM would not know the load format.
    beside = Path(sys.executable).with_name("vllm")
    return str(beside) if beside.exists() else "vllm"


def _defaults(saved: SavedFusion, base: str, request_weights: bool) -> dict[str, str | None]:
    """Options that the caller may set otherwise; an empty value is a flag."""
    options = saved.base_options(base)
    return {
        "--revision": options.revision,
        # vLLM's own choice is half precision for a float32 base.
        "--dtype": str(options.dtype),
        "--served-model-name": saved.directory.resolve().name,
        "--chat-template": chat_template(saved.config.prompt),
        "--scheduler-cls": SCHEDULER if request_weights else None,
    }


def chat_template(prompt: PromptFormat) -> str | None:
    """The fusion's prompt format as a chat template for vLLM; None where the tokenizer's own is to be taken.

    A plain format has none, since vLLM would leave out the special tokens that it starts with: conversations are then
    refused with the reason, and completions are the way.
    """
    if prompt.template is not None:
        return (
            '{{ raise_exception("This fusion was made with plain prompts, not conversations. Use /v1/completions, with '
            f'prompts of the form {json.dumps(prompt.template, ensure_ascii=False)[1:-1]}") }}}}'
        )
    if prompt.chat_template is None or prompt.system_prompt is None:
        return prompt.chat_template
    system = json.dumps(prompt.system_prompt, ensure_ascii=False)
    return (
        '{%- if messages[0]["role"] != "system" -%}'
        f'{{%- set messages = [{{"role": "system", "content": {system}}}] + messages -%}}'
        "{%- endif -%}" + prompt.chat_template
    )

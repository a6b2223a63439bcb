"""`loraflow trace`: which adapter speaks at each token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loraflow.cli import options as o


def trace(
    fusion: o.Fusion = None,
    *,
    prompt: Annotated[str, typer.Option("--prompt", help="The question.")],
    answer: Annotated[
        str | None, typer.Option("--answer", help="Trace this answer.  [default: the one that the fusion generates]")
    ] = None,
    numbers: Annotated[bool, typer.Option("--numbers", help="Print every token's weights too.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write tokens and all weights (seq, layers, adapters) there.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest generated answer, in tokens.")] = 256,
    method: o.Method = None,
    method_option: o.MethodOptions = [],  # noqa: B006 (typer reads the default)
    base: o.Base = None,
    lora_modules: o.LoraModules = [],  # noqa: B006
    revision: o.Revision = None,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    quantization: o.Quantization = None,
) -> None:
    """Colour each token by the adapter that dominates it.

    A generated token has the colour of the weights that produced it, those of the position before it (the paper's
    figure 5). Example: `loraflow trace zh-math --prompt "..." --numbers`
    """
    placement = o.Placement(revision, dtype, device, quantization)
    model = o.open_model(fusion, base, lora_modules, method, method_option, placement)

    from rich.console import Console

    from loraflow.visual.terminal import render_trace

    traced = trace_answer(model, prompt, answer, max_new_tokens)
    Console().print(render_trace(traced, numbers=numbers))
    if json_file is not None:
        _write_json(traced, json_file)


def trace_answer(model: Any, prompt: str, answer: str | None, max_new_tokens: int) -> Any:
    """The trace of a prompt and its answer, generated greedily where none is given."""
    import torch

    from loraflow.answers import padding_id, require_tokenizer

    tokenizer = require_tokenizer(model.tokenizer)
    messages = [{"role": "user", "content": prompt}]
    ids = model.prompt.prompt_ids(tokenizer, messages)
    inputs = torch.tensor([ids], device=model.device)
    if answer is None:
        whole = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=padding_id(tokenizer),
        )
    else:
        answered = ids + model.prompt.completion_ids(tokenizer, messages, answer)
        whole = torch.tensor([answered], device=model.device)
    return model.trace(whole, prompt_length=len(ids))


def _write_json(traced: Any, path: Path) -> None:
    import json

    from loraflow.storage import write_atomically

    content = {
        "adapters": traced.adapters,
        "tokens": traced.tokens[0],
        "prompt_length": traced.prompt_length,
        "axes": ["seq", "layers", "adapters"],
        "weights": traced.weights[0].tolist(),
        "module_weights": {name: weights[0].tolist() for name, weights in traced.module_weights.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, ensure_ascii=False).encode())

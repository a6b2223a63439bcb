"""`loraflow trace`: which adapter speaks at each token."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraflow.cli.groups import with_groups
from loraflow.cli.sources import FusionSource
from loraflow.cli.texts import Stop, stop_strings
from loraflow.errors import LoraflowError

if TYPE_CHECKING:
    from torch import Tensor

    from loraflow.methods import Method as FusionMethod
    from loraflow.model import FusedModel

    _Other = tuple[FusionMethod, Mapping[str, Tensor]]


@with_groups
def trace(
    *,
    prompt: Annotated[str, typer.Option("--prompt", help="The question.")],
    answer: Annotated[
        str | None, typer.Option("--answer", help="Trace this answer.  [default: the one that the fusion generates]")
    ] = None,
    compare: Annotated[
        list[str],
        typer.Option(
            "--compare",
            metavar="METHOD",
            help="Trace the same text by these methods too, several after one flag: average, qa-flora, arrow, an "
            "adapter's name (that one alone), ..., or the directory of another saved fusion of the same adapters.",
            show_default=False,
        ),
    ] = [],  # noqa: B006 (typer reads the default)
    html_file: Annotated[
        Path | None,
        typer.Option("--html", help="Write a page there that shows every token, layer and method in a browser."),
    ] = None,
    numbers: Annotated[bool, typer.Option("--numbers", help="Print every token's weights too.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write tokens and all weights (seq, layers, adapters) there.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest generated answer, in tokens.")] = 256,
    stop: Stop = [],  # noqa: B006 (typer reads the default)
    source: FusionSource,
) -> None:
    """Colour each token by the adapter that dominates it.

    A generated token has the colour of the weights that produced it, those of the position before it (the paper's
    figure 5). Example: `loraflow trace zh-math --prompt "..." --compare average qa-flora --html trace.html`
    """  # noqa: DOC501 (it is the --help text)
    for flag, path in {"--html": html_file, "--json": json_file}.items():
        if path is not None:
            _check_file(flag, path)
    if answer is not None and stop:
        raise LoraflowError("`--stop` ends a generated answer, and `--answer` gives one. Leave one of them out.")
    model = source.open(stop_strings(stop))
    own = source.choice.method or model.method.name
    others = _compared(model, own, compare)

    from rich.console import Console
    from rich.rule import Rule
    from rich.text import Text

    from loraflow.visual.terminal import render_trace

    traces = _trace_all(model, own, others, trace_answer(model, prompt, answer, max_new_tokens))
    console = Console()
    for name, traced in traces.items():
        if others:
            console.print(Rule(Text(name), align="left"))
        console.print(render_trace(traced, numbers=numbers))
    if json_file is not None:
        _write_json(traces, json_file)
        print(f"Wrote {json_file}.")
    if html_file is not None:
        from loraflow.visual.explorer import save_explorer

        save_explorer(
            traces,
            html_file,
            title=f"Fusion weights: {Path(source.fusion).name}" if source.fusion else "Fusion weights",
        )
        print(f"Wrote {html_file}; open it in a browser.")


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


def _compared(model: FusedModel, own: str, names: Sequence[str]) -> dict[str, _Other]:
    """The other methods by name, each with what it learned.

    Raises:
        LoraflowError: if one has no weights, is named twice, or would have to be fitted.
    """
    from loraflow.methods import get_method
    from loraflow.saved.records import CONFIG_FILE

    found: dict[str, _Other] = {}
    for name in names:
        directory = Path(name).expanduser()
        if (directory / CONFIG_FILE).is_file():
            if directory.name in (own, *found):
                raise LoraflowError(f"`--compare`: another one is called {directory.name!r} already. Rename {name!r}.")
            found[directory.name] = _saved(model, directory)
            continue
        if name == "base":
            raise LoraflowError("`--compare` names 'base', which has no fusion weights. Leave it out.")
        if name == own or name in found:
            which = "the method that is traced anyway" if name == own else "a method twice"
            raise LoraflowError(f"`--compare` names {name!r}, {which}. Leave it out.")
        method = get_method(name, model.adapter_names)
        if method.learns:
            raise LoraflowError(
                f"`--compare` names {name!r}, which must be fitted first, and what is opened here is {own!r}. Compare "
                "with methods that learn nothing, or name the directory of a fusion that was fitted by it."
            )
        found[name] = (method, {})
    return found


def _saved(model: FusedModel, directory: Path) -> _Other:
    """The method of another saved fusion of the same adapters, and what it learned.

    Raises:
        LoraflowError: if its adapters are others.
    """
    from loraflow.bases import check_base
    from loraflow.saved.fusion import SavedFusion

    saved = SavedFusion.open(directory)
    check_base(saved.config.base, model.base_record)
    if [record.digest for record in saved.config.adapters] != [adapter.digest for adapter in model.adapters]:
        raise LoraflowError(
            f"The fusion {directory} has the adapters {saved.adapter_names}, and those that are traced are "
            f"{model.adapter_names}, or the same in another order. Compare fusions of the same ones."
        )
    return saved.method, saved.tensors


def _trace_all(model: FusedModel, own: str, others: Mapping[str, _Other], traced: Any) -> dict[str, Any]:
    """The text of a trace by all methods."""
    from loraflow.core.lanes import load_gates

    traces = {own: traced}
    for name, (method, learned) in others.items():
        with model.using(method):
            if learned:
                load_gates(model.gates, learned, f"the fusion {name!r}")
            ids, mask = (tensor.to(model.device) for tensor in (traced.input_ids, traced.attention_mask))
            traces[name] = model.trace(ids, mask, prompt_length=traced.prompt_length)
    return traces


def _check_file(flag: str, path: Path) -> None:
    """Check, before any work, that a file can be written.

    Raises:
        LoraflowError: if there is a directory of that name, or its folder is none or is not writable.
    """
    if path.is_dir():
        raise LoraflowError(f"`{flag}` (={str(path)!r}) is a directory. Give a file.")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise LoraflowError(f"`{flag}` (={str(path)!r}) cannot be written: {folder} is a file. Give another place.")
    if not os.access(folder, os.W_OK):
        raise LoraflowError(f"`{flag}` (={str(path)!r}) cannot be written: {folder} is read-only. Give another place.")


def _write_json(traces: Mapping[str, Any], path: Path) -> None:
    import json

    from loraflow.files import write_atomically

    first, *others = traces
    content = {
        "method": first,
        "adapters": traces[first].adapters,
        "tokens": traces[first].tokens[0],
        "prompt_length": traces[first].prompt_length,
        "axes": ["seq", "layers", "adapters"],
        **_weights(traces[first]),
        "compared": {name: _weights(traces[name]) for name in others},
    }
    write_atomically(path, json.dumps(content, ensure_ascii=False).encode())


def _weights(traced: Any) -> dict[str, Any]:
    return {
        "weights": traced.weights[0].tolist(),
        "module_weights": {name: weights[0].tolist() for name, weights in traced.module_weights.items()},
        "readings": {name: sizes.tolist() for name, sizes in traced.readings.items()},
    }

"""`loraflow generate`: answers from a fusion."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraflow.cli.groups import with_groups
from loraflow.cli.sources import FusionSource
from loraflow.cli.texts import Stop, manner_line, named_fields, stop_strings

if TYPE_CHECKING:
    from torch import Tensor

    from loraflow.examples import Example
    from loraflow.serving.text import TextStream


@with_groups
def generate(
    *,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="The question. Without it and --data, standard input is read.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Answer every prompt (`prompt`, or --prompt-field) of rows, given as for `fit`."),
    ] = None,
    prompt_field: Annotated[
        str, typer.Option("--prompt-field", help="Field of --data that is the prompt, or text with fields in it.")
    ] = "prompt",
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Where --data's answers go, one JSON object a line.  [default: standard output]"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above, answers are sampled.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set of tokens with this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts of --data answered together.")] = 16,
    stop: Stop = [],  # noqa: B006 (typer reads the default)
    source: FusionSource,
) -> None:
    """Answer prompts with a fusion; one answer is streamed as it comes.

    Examples: `loraflow generate zh-math --prompt "..."`; with another method: `--method average`, `--method math`,
    `--method base`; without a fusion: `--base B --lora-modules zh=path math=path --method average`.
    """
    examples = _read_prompts(data, prompt_field) if data is not None else []
    model = source.open(stop_strings(stop))
    print(manner_line(model.prompt_origin, model.endings, model.tokenizer), file=sys.stderr)
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}

    from transformers import set_seed

    set_seed(seed)
    if data is not None:
        _answer_all(model, examples, output, max_new_tokens, batch_size, options)
    else:
        _stream(model, prompt if prompt is not None else sys.stdin.read(), max_new_tokens, options)


def _read_prompts(source: str, field: str) -> list[Example]:
    from loraflow.examples import read_examples

    return read_examples(source, named_fields(field, field))


def _stream(model: Any, prompt: str, max_new_tokens: int, options: dict[str, Any]) -> None:
    import torch

    from loraflow.answers import padding_id, require_tokenizer
    from loraflow.serving.text import TextStream

    tokenizer = require_tokenizer(model.tokenizer)
    ids = torch.tensor([model.prompt.prompt_ids(tokenizer, [{"role": "user", "content": prompt}])], device=model.device)
    stream = TextStream(tokenizer, model.endings.texts)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=_Printer(stream, model.endings.token_ids),
        pad_token_id=padding_id(tokenizer),
        **{"do_sample": False, **options},
    )


class _Printer:
    """Prints an answer as it comes, for transformers' `generate`; its end is no part of it."""

    def __init__(self, stream: TextStream, ends: Collection[int]) -> None:
        self._stream, self._ends, self._begun = stream, ends, False

    def put(self, tokens: Tensor) -> None:
        """Take the prompt, and then each new token."""
        new = tokens.flatten().tolist() if self._begun else []
        self._begun = True
        for token in new:
            if token not in self._ends:
                print(self._stream.push(token), end="", flush=True)

    def end(self) -> None:
        """Print what was held back."""
        print(self._stream.finish(), flush=True)


def _answer_all(
    model: Any,
    examples: list[Example],
    output: Path | None,
    max_new_tokens: int,
    batch_size: int,
    options: dict[str, Any],
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from loraflow.answers import generate_answers, require_tokenizer
    from loraflow.files import write_atomically

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("answering", total=len(examples))
        answers = generate_answers(
            model,
            [example.messages for example in examples],
            tokenizer=require_tokenizer(model.tokenizer),
            prompt=model.prompt,
            max_new_tokens=max_new_tokens,
            endings=model.endings,
            batch_size=batch_size,
            on_batch=lambda count: progress.advance(task, count),
            **options,
        )
    lines = "".join(
        # Tables have dates and the like, which JSON has not.
        json.dumps({**example.record, "answer_text": answer.text}, ensure_ascii=False, default=str) + "\n"
        for example, answer in zip(examples, answers, strict=True)
    )
    if output is None:
        sys.stdout.write(lines)
    else:
        write_atomically(output, lines.encode())

"""`loraflow serve`: one endpoint for a base, its adapters and fusions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loraflow.cli import options as o
from loraflow.errors import LoraflowError

_NETWORK = "Network"
_LIMITS = "Limits"


def serve(
    fusions: Annotated[
        list[str] | None,
        typer.Argument(
            help="Saved fusions to offer: directories or Hub ids, or `name=path`.",
            show_default=False,
            metavar="[FUSION]...",
        ),
    ] = None,
    base: o.Base = None,
    lora_modules: o.LoraModules = [],  # noqa: B006 (typer reads the default)
    served_model_name: Annotated[
        str | None, typer.Option("--served-model-name", help="What requests call the base.  [default: its name]")
    ] = None,
    revision: o.Revision = None,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    quantization: o.Quantization = None,
    host: Annotated[str, typer.Option("--host", rich_help_panel=_NETWORK)] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", rich_help_panel=_NETWORK)] = 8000,
    api_key: Annotated[
        list[str],
        typer.Option(
            "--api-key",
            help="Requests must bring one of these; better in LORAFLOW_API_KEY, where no process list shows them.",
            envvar="LORAFLOW_API_KEY",
            rich_help_panel=_NETWORK,
            show_default=False,
        ),
    ] = [],  # noqa: B006 (typer reads the default)
    max_requests: Annotated[
        int, typer.Option(help="Answers in a batch at the same time.", rich_help_panel=_LIMITS)
    ] = 32,
    max_waiting: Annotated[
        int,
        typer.Option(
            help="Answers at the same time, those that wait included; more get a 429.", rich_help_panel=_LIMITS
        ),
    ] = 256,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", rich_help_panel=_LIMITS)] = 1024,
    cache_tokens: Annotated[
        int, typer.Option(help="Tokens in the cache, of all answers together.", rich_help_panel=_LIMITS)
    ] = 16384,
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens in one step; longer prompts are read in several.", rich_help_panel=_LIMITS)
    ] = 512,
    timeout_s: Annotated[
        float, typer.Option("--timeout", help="Longest time of a request, in seconds.", rich_help_panel=_LIMITS)
    ] = 600.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log too.")] = False,
) -> None:
    """Serve fusions over one base, as OpenAI's API does; requests of all of them run in the same batch.

    Every adapter and every fusion is a `model`; a request may also bring weights of its own
    (`"adapter_weights": {"zh": 0.3, "math": 0.7}`) or another method (`"fusion": {"method": "qa-flora"}`).

    Examples: `loraflow serve zh-math`; `loraflow serve zh-math es-code --port 9000`;
    `loraflow serve --base B --lora-modules zh=path math=path`
    """  # noqa: DOC501 (it is the --help text)
    try:
        import uvicorn

        from loraflow.serving.app import make_app
    except ImportError as error:
        raise LoraflowError(f"Serving needs some packages ({error}): pip install 'loraflow[serve]'") from error

    import logging
    import signal

    from loraflow.serving.catalog import Catalog
    from loraflow.serving.engine import Limits
    from loraflow.serving.service import ServerConfig, Service

    named = _named(fusions or [])
    placement = o.Placement(revision, dtype, device, quantization)
    config = ServerConfig(
        limits=Limits(requests=max_requests, batch_tokens=batch_tokens, cache_tokens=cache_tokens),
        api_keys=tuple(api_key),
        max_waiting=max_waiting,
        max_new_tokens=max_new_tokens,
        timeout_s=timeout_s,
        log_prompts=log_prompts,
    )
    catalog = Catalog.open(
        base, o.parse_adapters(lora_modules), named, base_id=served_model_name, options=placement.options()
    )
    logging.basicConfig(format="%(message)s")
    logging.getLogger("loraflow.serving").setLevel(logging.INFO)
    for served in catalog.served.values():
        typer.echo(f"{served.kind:8} {served.id}  ({served.method.name} on {', '.join(served.adapters) or 'nothing'})")
    # uvicorn raises the signal that ended it once more when all is done; an end that was asked for is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.run(
        make_app(Service(catalog, config)),
        host=host,
        port=port,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=int(config.drain_s),
    )


def _named(fusions: list[str]) -> dict[str, str]:
    """Fusions by name: `name=path`, or a path whose last part is the name."""
    named: dict[str, str] = {}
    for fusion in fusions:
        name, separator, path = fusion.partition("=")
        if not separator:
            name, path = Path(fusion).name, fusion
        if name in named:
            raise LoraflowError(f"Two fusions are called {name!r}. Name them as name=path.")
        named[name] = path
    return named

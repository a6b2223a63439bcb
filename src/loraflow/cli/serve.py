"""`loraflow serve`: one endpoint for a base, its adapters and fusions."""

from __future__ import annotations

import enum
import os
import shlex
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from loraflow.cli import options as o
from loraflow.errors import LoraflowError

_NETWORK = "Network"
_LIMITS = "Limits"
_LOADING = "Loading while it runs"
_VLLM = "vLLM (--engine vllm)"


class Engine(enum.StrEnum):
    """What answers."""

    LORAFLOW = "loraflow"
    VLLM = "vllm"


def serve(
    context: typer.Context,
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
    port: Annotated[int, typer.Option("--port", min=0, max=65535, rich_help_panel=_NETWORK)] = 8000,
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
    admin_key: Annotated[
        list[str],
        typer.Option(
            "--admin-key",
            help="Allows /v1/load_lora_adapter and /v1/unload_lora_adapter; better in LORAFLOW_ADMIN_KEY.",
            envvar="LORAFLOW_ADMIN_KEY",
            rich_help_panel=_LOADING,
            show_default=False,
        ),
    ] = [],  # noqa: B006
    load_from: Annotated[
        list[Path],
        typer.Option(
            "--load-from",
            help="A folder whose adapters and fusions may be loaded; give it again for more.",
            rich_help_panel=_LOADING,
            exists=True,
            file_okay=False,
            show_default=False,
        ),
    ] = [],  # noqa: B006
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log too.")] = False,
    engine: Annotated[
        Engine, typer.Option("--engine", help="Answer here, or start vLLM's own server on one fusion.")
    ] = Engine.LORAFLOW,
    vllm_args: Annotated[
        str,
        typer.Option(
            help="Further options of `vllm serve`, in one word.", rich_help_panel=_VLLM, metavar="'--OPTION ...'"
        ),
    ] = "",
    request_weights: Annotated[
        bool,
        typer.Option(
            "--request-weights", help="Let requests bring weights of their own (vllm_xargs).", rich_help_panel=_VLLM
        ),
    ] = False,
    unverified: Annotated[
        bool,
        typer.Option(
            "--unverified", help="Serve what has not been compared with transformers too.", rich_help_panel=_VLLM
        ),
    ] = False,
    print_command: Annotated[
        bool, typer.Option("--print-command", help="Print vLLM's command instead of running it.", rich_help_panel=_VLLM)
    ] = False,
) -> None:
    """Serve fusions over one base, as OpenAI's API does; requests of all of them run in the same batch.

    Every adapter and every fusion is a `model`; a request may also bring weights of its own
    (`"adapter_weights": {"zh": 0.3, "math": 0.7}`) or another method (`"fusion": {"method": "qa-flora"}`).

    Examples: `loraflow serve zh-math`; `loraflow serve zh-math es-code --port 9000`;
    `loraflow serve --base B --lora-modules zh=path math=path`; `loraflow serve zh-math --engine vllm`
    """  # noqa: DOC501 (it is the --help text)
    named = _named(fusions or [])
    given = _given(context)
    _check_engine(engine, given)
    if engine is Engine.VLLM:
        _become_vllm(
            _vllm_command(
                named,
                base,
                o.parse_adapters(lora_modules),
                {
                    "--host": host,
                    "--port": str(port),
                    "--revision": revision,
                    "--dtype": None if dtype == "auto" else dtype,
                },
                shlex.split(vllm_args),
                request_weights=request_weights,
                unverified=unverified,
            ),
            api_key,
            only_print=print_command,
        )
        return
    try:
        import uvicorn

        from loraflow.serving.app import make_app
    except ImportError as error:
        raise LoraflowError(f"Serving needs some packages ({error}): pip install 'loraflow[serve]'") from error

    import logging
    import signal

    from loraflow.serving.catalog import Catalog
    from loraflow.serving.config import EngineLimits, ServerConfig
    from loraflow.serving.service import Service

    placement = o.Placement(revision, dtype, device, quantization)
    config = ServerConfig(
        limits=EngineLimits(requests=max_requests, batch_tokens=batch_tokens, cache_tokens=cache_tokens),
        api_keys=tuple(api_key),
        max_waiting=max_waiting,
        max_new_tokens=max_new_tokens,
        timeout_s=timeout_s,
        log_prompts=log_prompts,
        admin_keys=tuple(admin_key),
        load_from=tuple(load_from),
    )
    listener = _listen(host, port)
    catalog = Catalog.open(
        base, o.parse_adapters(lora_modules), named, base_id=served_model_name, options=placement.options()
    )
    logging.basicConfig(format="%(message)s")
    logging.getLogger("loraflow.serving").setLevel(logging.INFO)
    for served in catalog.served.values():
        what = f"  ({served.method.name} on {', '.join(served.adapters)})" if served.kind == "fusion" else ""
        typer.echo(f"{served.kind:8} {served.id}{what}")
    # uvicorn raises the signal that ended it once more when all is done; an end that was asked for is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            address, number, *_ = listener.getsockname()
            shown = f"[{address}]" if ":" in address else address
            typer.echo(f"ready at http://{shown}:{number}: OpenAI's API under /v1, a page to chat on at /")

    Server(
        uvicorn.Config(
            make_app(Service(catalog, config)),
            access_log=False,
            log_level="warning",
            timeout_graceful_shutdown=int(config.drain_s),
        )
    ).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """Take the address, before anything is loaded.

    Raises:
        LoraflowError: if it cannot be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise LoraflowError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}). Give another --host or --port."
        ) from error
    return listener


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


_BOTH = {"fusions", "base", "lora_modules", "revision", "dtype", "host", "port", "api_key", "engine"}
_ONLY_VLLM = {"vllm_args", "request_weights", "unverified", "print_command"}


def _given(context: typer.Context) -> set[str]:
    """The parameters that are on the command line, rather than at their defaults or from the environment."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _check_engine(engine: Engine, given: set[str]) -> None:
    """Refuse options that the engine would not heed.

    Raises:
        LoraflowError: if there are.
    """
    other = given & _ONLY_VLLM if engine is Engine.LORAFLOW else given - _BOTH - _ONLY_VLLM
    for name in sorted(other):
        flag = "--" + {"timeout_s": "timeout"}.get(name, name).replace("_", "-")
        if engine is Engine.LORAFLOW:
            raise LoraflowError(f"`{flag}` is for vLLM. Say --engine vllm too, or leave it out.")
        raise LoraflowError(f"`{flag}` is for loraflow's own engine. Leave it out; vLLM's options go into --vllm-args.")


def _vllm_command(
    fusions: Mapping[str, str],
    base: str | None,
    adapters: Mapping[str, str],
    options: Mapping[str, str | None],
    extra_args: list[str],
    *,
    request_weights: bool,
    unverified: bool,
) -> list[str]:
    from loraflow.serving.vllm.command import vllm_command

    if len(fusions) != 1:
        raise LoraflowError(f"vLLM serves one fusion at a time; {len(fusions)} were given. Give one.")
    ((name, path),) = fusions.items()
    given = {argument.partition("=")[0] for argument in extra_args}
    composed = {"--served-model-name": name, **options}
    for option, value in composed.items():
        if value is not None and option not in given:
            extra_args += [option, value]
    return vllm_command(
        path, extra_args, base=base, adapters=adapters, request_weights=request_weights, unverified=unverified
    )


def _become_vllm(command: list[str], api_keys: list[str], *, only_print: bool) -> None:
    """Put vLLM's server in the place of this process: signals and exit codes are its own."""
    import shutil

    if only_print:
        typer.echo(shlex.join(command))
        return
    program = shutil.which(command[0])
    if program is None:
        raise LoraflowError("vLLM is not installed in this environment: pip install 'loraflow[vllm]'")
    if len(api_keys) > 1:
        raise LoraflowError(f"vLLM's server takes one API key; {len(api_keys)} were given. Give one.")
    # Not as an option, which process lists show.
    environment = {**os.environ, **({"VLLM_API_KEY": api_keys[0]} if api_keys else {})}
    typer.echo(shlex.join(command), err=True)
    os.execve(program, command, environment)

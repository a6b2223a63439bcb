"""`loraflow serve`: one endpoint for a base, its adapters and fusions."""

from __future__ import annotations

import enum
import logging
import os
import shlex
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraflow.cli.auto import AutoOptions
from loraflow.cli.groups import Given, options_of, panel, with_groups
from loraflow.cli.keys import keys_of
from loraflow.cli.sources import Sources
from loraflow.cli.texts import PromptOptions, Stop, stop_strings
from loraflow.errors import LoraflowError
from loraflow.serving.config import EngineLimits, ServerConfig
from loraflow.serving.logs import LogFormat, set_up_logs
from loraflow.serving.starting import not_ready

if TYPE_CHECKING:
    from loraflow.serving.catalog import Catalog

log = logging.getLogger("loraflow.serving")

_network = panel("Network")
_limit = panel("Limits")
_loading = panel("Loading while it runs")
_observing = panel("Logs and traces")
_vllm = panel("vLLM (--engine vllm)")


class Engine(enum.StrEnum):
    """What answers."""

    LORAFLOW = "loraflow"
    VLLM = "vllm"


@dataclass(frozen=True)
class Network:
    """Where requests come in, and who may send them."""

    host: Annotated[str, _network("--host")] = "127.0.0.1"
    port: Annotated[int, _network("--port", min=0, max=65535)] = 8000
    api_key: Annotated[
        list[str],
        _network(
            "--api-key",
            help="Requests must bring one of these; better in LORAFLOW_API_KEY (one key), where no process list shows "
            "it.",
            show_default=False,
        ),
    ] = field(default_factory=list, repr=False)
    api_key_file: Annotated[
        Path | None, _network("--api-key-file", help="A file of such keys, one a line.", show_default=False)
    ] = None
    public_metrics: Annotated[
        bool, _network("--public-metrics", help="Answer /metrics without a key, where others need one.")
    ] = False
    allowed_host: Annotated[
        list[str],
        _network(
            "--allowed-host",
            help="A name under which the server is reached, beside loopback and its address (* for any); checked "
            "where no key is asked for.",
            show_default=False,
        ),
    ] = field(default_factory=list)
    drain_s: Annotated[float, _network("--grace", min=0, help="Seconds that running answers have on SIGTERM.")] = (
        ServerConfig.drain_s
    )

    def api_keys(self) -> tuple[str, ...]:
        """All of them, from wherever they are given."""
        return keys_of("api", self.api_key, self.api_key_file)

    def allowed_hosts(self, keys: Sequence[str]) -> tuple[str, ...]:
        """Further names of the server; the one that it was told to listen on is its own."""
        return (*self.allowed_host, self.host) if self.allowed_host or not keys else ()


@dataclass(frozen=True)
class Limits:
    """How much the server does at once, and what may be loaded into it."""

    max_requests: Annotated[int, _limit(help="Answers in a batch at the same time.")] = EngineLimits.requests
    max_waiting: Annotated[int, _limit(help="Answers at the same time, those that wait included; more get a 429.")] = (
        ServerConfig.max_waiting
    )
    max_new_tokens: Annotated[int, _limit(help="Longest answer.")] = ServerConfig.max_new_tokens
    cache_tokens: Annotated[int, _limit(help="Tokens in the cache, of all answers together.")] = (
        EngineLimits.cache_tokens
    )
    batch_tokens: Annotated[int, _limit(help="Tokens in one step; longer prompts are read in several.")] = (
        EngineLimits.batch_tokens
    )
    prefix_caching: Annotated[
        bool,
        _limit(
            "--prefix-caching/--no-prefix-caching",
            help="Share the cache among answers whose beginnings and weights are the same.",
        ),
    ] = EngineLimits.prefix_caching
    timeout_s: Annotated[float, _limit("--timeout", help="Longest time of an answer, in seconds.")] = (
        ServerConfig.timeout_s
    )
    receive_timeout_s: Annotated[
        float,
        _limit(
            "--receive-timeout",
            help="Seconds in which a request must have come in, and a client must take what is sent.",
        ),
    ] = ServerConfig.receive_timeout_s
    admin_key: Annotated[
        list[str],
        _loading(
            "--admin-key",
            help="Allows /v1/load_lora_adapter and /v1/unload_lora_adapter; better in LORAFLOW_ADMIN_KEY.",
            show_default=False,
        ),
    ] = field(default_factory=list, repr=False)
    admin_key_file: Annotated[
        Path | None, _loading("--admin-key-file", help="A file of such keys, one a line.", show_default=False)
    ] = None
    load_from: Annotated[
        list[Path],
        _loading(
            "--load-from",
            help="A folder whose adapters and fusions may be loaded; give it again for more.",
            exists=True,
            file_okay=False,
            show_default=False,
        ),
    ] = field(default_factory=list)


@dataclass(frozen=True)
class Observing:
    """What is told of requests, and where."""

    log_prompts: Annotated[bool, _observing("--log-prompts", help="Write prompts into the log too.")] = False
    log_format: Annotated[
        LogFormat, _observing("--log-format", help="Write the log as text, or as one object of JSON a line.")
    ] = ServerConfig.log_format
    otlp_traces_endpoint: Annotated[
        str | None,
        _observing(
            "--otlp-traces-endpoint",
            help="Send OpenTelemetry traces to this collector, such as http://localhost:4317.",
            show_default=False,
        ),
    ] = None


@dataclass(frozen=True)
class VllmOptions:
    """What is for vLLM alone."""

    vllm_args: Annotated[str, _vllm(help="Further options of `vllm serve`, in one word.", metavar="'--OPTION ...'")] = (
        ""
    )
    request_weights: Annotated[
        bool, _vllm("--request-weights", help="Let requests bring weights of their own (vllm_xargs).")
    ] = False
    unverified: Annotated[
        bool, _vllm("--unverified", help="Serve what has not been compared with transformers too.")
    ] = False
    print_command: Annotated[bool, _vllm("--print-command", help="Print vLLM's command instead of running it.")] = False

    def command(
        self, fusions: Mapping[str, str], sources: Sources, network: Network, observing: Observing
    ) -> list[str]:
        """The command that starts vLLM's server; options that `--vllm-args` names are its.

        Raises:
            LoraflowError: if there is not exactly one fusion, or a key among vLLM's options.
        """
        from loraflow.serving.vllm.command import vllm_command

        if len(fusions) != 1:
            raise LoraflowError(f"vLLM serves one fusion at a time; {len(fusions)} were given. Give one.")
        ((name, path),) = fusions.items()
        arguments = shlex.split(self.vllm_args)
        own = {argument.partition("=")[0] for argument in arguments}
        if any(_means_api_key(option) for option in own):
            raise LoraflowError(
                "The key for vLLM is among --vllm-args, which the process list and the printed command show. Give it "
                "in LORAFLOW_API_KEY or --api-key-file."
            )
        composed = {
            "--served-model-name": name,
            "--host": network.host,
            "--port": str(network.port),
            "--otlp-traces-endpoint": observing.otlp_traces_endpoint,
            "--revision": sources.placement.revision,
            "--dtype": None if sources.placement.dtype == "auto" else sources.placement.dtype,
        }
        for option, value in composed.items():
            if value is not None and option not in own:
                arguments += [option, value]
        return vllm_command(
            path,
            arguments,
            base=sources.base,
            adapters=sources.paths(),
            request_weights=self.request_weights,
            unverified=self.unverified,
        )


def _means_api_key(option: str) -> bool:
    """Whether vLLM's parser takes an option for its --api-key: dashes may be underscores, and the end may be cut."""
    return len(option) > len("--api-") and "--api-key".startswith(option.replace("_", "-"))


@with_groups
def serve(
    *,
    given: Given,
    fusions: Annotated[
        list[str] | None,
        typer.Argument(
            help="Saved fusions to offer: directories or Hub ids, or `name=path`.",
            show_default=False,
            metavar="[FUSION]...",
        ),
    ] = None,
    sources: Sources,
    auto: AutoOptions,
    served_model_name: Annotated[
        str | None, typer.Option("--served-model-name", help="What requests call the base.  [default: its name]")
    ] = None,
    network: Network,
    limits: Limits,
    prompt: PromptOptions,
    stop: Stop = [],  # noqa: B006 (typer reads the default)
    observing: Observing,
    engine: Annotated[
        Engine, typer.Option("--engine", help="Answer here, or start vLLM's own server on one fusion.")
    ] = Engine.LORAFLOW,
    vllm: VllmOptions,
) -> None:
    """Serve fusions over one base, as OpenAI's API does; requests of all of them run in the same batch.

    Every adapter and every fusion is a `model`; a request may also bring weights of its own
    (`"adapter_weights": {"zh": 0.3, "math": 0.7}`) or another method (`"fusion": {"method": "qa-flora"}`).

    Examples: `loraflow serve zh-math`; `loraflow serve zh-math es-code --port 9000`;
    `loraflow serve --base B --lora-modules zh=path math=path --auto logo`; `loraflow serve zh-math --engine vllm`
    """  # noqa: DOC501 (it is the --help text)
    named = _named(fusions or [])
    _check_engine(engine, given)
    if engine is Engine.VLLM:
        command = vllm.command(named, sources, network, observing)
        _become_vllm(command, network.api_keys(), only_print=vllm.print_command)
        return
    _check_temporary_folder()
    try:
        import uvicorn  # noqa: F401

        from loraflow.serving.app import make_app  # noqa: F401
    except ImportError as error:
        raise LoraflowError(f"Serving needs some packages ({error}): pip install 'loraflow[serve]'") from error
    from loraflow.serving.catalog import Catalog

    api_keys = network.api_keys()
    config = ServerConfig(
        limits=EngineLimits(
            requests=limits.max_requests,
            batch_tokens=limits.batch_tokens,
            cache_tokens=limits.cache_tokens,
            prefix_caching=limits.prefix_caching,
        ),
        api_keys=api_keys,
        max_waiting=limits.max_waiting,
        max_new_tokens=limits.max_new_tokens,
        timeout_s=limits.timeout_s,
        receive_timeout_s=limits.receive_timeout_s,
        log_prompts=observing.log_prompts,
        log_format=observing.log_format,
        otlp_traces_endpoint=observing.otlp_traces_endpoint,
        admin_keys=keys_of("admin", limits.admin_key, limits.admin_key_file),
        load_from=tuple(limits.load_from),
        public_metrics=network.public_metrics,
        allowed_hosts=network.allowed_hosts(api_keys),
        drain_s=network.drain_s,
    )
    picks = auto.settings()
    set_up_logs(config.log_format)
    listener = _listen(network.host, network.port)
    with not_ready(listener):
        catalog = Catalog.open(
            sources.base,
            sources.adapters(),
            named,
            base_id=served_model_name,
            prompt=prompt.format(),
            stop_strings=stop_strings(stop),
            options=sources.placement.options(),
            auto=picks,
        )
    _answer(catalog, config, listener)


def _answer(catalog: Catalog, config: ServerConfig, listener: socket.socket) -> None:
    """Answer requests until the process is told to end."""
    from loraflow.serving.server import Server
    from loraflow.serving.service import Service

    def say(line: str) -> None:
        if config.log_format == "json":
            log.info("%s", line)
        else:
            typer.echo(line)

    for line in offered(catalog):
        say(line)

    def ready() -> None:
        address, number, *_ = listener.getsockname()
        shown = f"[{address}]" if ":" in address else address
        say(f"ready at http://{shown}:{number}: OpenAI's API under /v1, a page to chat on at /")

    Server(Service(catalog, config), ready).run(sockets=[listener])


def _check_temporary_folder() -> None:
    """Check that there is one: PyTorch does not start without it, though nothing is written there.

    Raises:
        LoraflowError: if there is none, as on a full disk.
    """
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise LoraflowError(
            f"There is no temporary folder that can be written, which PyTorch needs ({error.strerror}). Make room on "
            "the disk, or name another folder in the variable TMPDIR."
        ) from error


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


def _check_engine(engine: Engine, given: Given) -> None:
    """Refuse options that the engine would not heed.

    Raises:
        LoraflowError: if there are.
    """
    of_vllm = options_of(VllmOptions)
    if engine is Engine.LORAFLOW:
        for flag in given.flags(of_vllm):
            raise LoraflowError(f"`{flag}` is for vLLM. Say --engine vllm too, or leave it out.")
        return
    both = {"fusions", "engine", "otlp_traces_endpoint", *options_of(Network), *options_of(Sources)}
    both -= {"device", "quantization", "allowed_host", "public_metrics", "drain_s"}
    for flag in given.flags(set(given.names) - both - set(of_vllm)):
        raise LoraflowError(f"`{flag}` is for loraflow's own engine. Leave it out; vLLM's options go into --vllm-args.")


def offered(catalog: Catalog) -> Iterator[str]:
    """What a server offers, a line each; where one is asked otherwise than the base, that is said."""
    base = catalog.served[catalog.base_id]
    for served in catalog.served.values():
        what = f"  ({served.method.name} on {', '.join(served.adapters)})" if served.kind == "fusion" else ""
        if served.kind == "auto":
            what = f"  ({served.method.name} picks from {len(catalog.adapters_of(served))} adapters)"
        asked = "" if served.prompt == base.prompt else "  asked in a prompt format of its own"
        yield f"{served.kind:8} {served.id}{what}{asked}"


def _become_vllm(command: list[str], api_keys: Sequence[str], *, only_print: bool) -> None:
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

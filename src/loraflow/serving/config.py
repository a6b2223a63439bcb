"""What a server allows and how large its engine may become; light, for the command line reads the defaults here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from loraflow.errors import LoraflowError
from loraflow.serving.credentials import check_keys
from loraflow.serving.hosts import check_hosts
from loraflow.serving.logs import LogFormat, check_log_format
from loraflow.serving.tracing import check_endpoint


@dataclass(frozen=True)
class EngineLimits:
    """How large the engine may become; nothing is inferred from the machine.

    Attributes:
        batch_tokens: tokens in one step; longer prompts are read in several.
        cache_tokens: tokens in the cache, of all running requests together.
        page_tokens: tokens in one page of it.
        prefix_caching: whether requests that begin alike, and are weighed alike, share pages; nothing is kept beside
            the cache. Bases with sliding windows never do.
    """

    requests: int = 32
    batch_tokens: int = 512
    cache_tokens: int = 16384
    page_tokens: int = 64
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name in ("requests", "batch_tokens", "cache_tokens", "page_tokens"):
            if getattr(self, name) < 1:
                raise LoraflowError(f"`{name}` (={getattr(self, name)}) must be at least 1.")
        if self.cache_tokens < self.page_tokens:
            raise LoraflowError(
                f"`cache_tokens` (={self.cache_tokens}) must be at least `page_tokens` (={self.page_tokens})."
            )


@dataclass(frozen=True)
class ServerConfig:
    """What a server allows.

    Attributes:
        api_keys: keys of which requests must bring one; anybody may ask where there is none.
        max_waiting: answers that may be in the engine at the same time, those that wait included.
        max_new_tokens: the longest answer, and its length where a request says nothing.
        timeout_s: the longest that an answer may take once the engine has its request; turns at being read, weighed or
            prepared may be waited for before that, for any time.
        receive_timeout_s: how long a request may take to come in, and how long an answer may lie that its client does
            not take; the connection is broken off then.
        drain_s: how long running requests may go on when the server stops.
        admin_keys: keys that allow adapters and fusions to be loaded and unloaded; nobody may where there is none.
        load_from: folders that they may be loaded from.
        public_metrics: whether the metrics are for everybody, where requests need a key.
        log_format: how the process that serves writes its log.
        otlp_traces_endpoint: where traces are sent, by OTLP; None for nowhere.
        allowed_hosts: names under which the server is reached, beside loopback and its address; `*` for any. They are
            checked where there are no `api_keys`, and where some are given.
    """

    limits: EngineLimits = field(default_factory=EngineLimits)
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_waiting: int = 256
    max_new_tokens: int = 1024
    max_body_bytes: int = 2 * 2**20
    timeout_s: float = 600.0
    receive_timeout_s: float = 30.0
    drain_s: float = 60.0
    log_prompts: bool = False
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    load_from: tuple[Path, ...] = ()
    public_metrics: bool = False
    allowed_hosts: tuple[str, ...] = ()
    log_format: LogFormat = "text"
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        check_keys("api_keys", self.api_keys)
        check_keys("admin_keys", self.admin_keys)
        if set(self.api_keys) & set(self.admin_keys):
            raise LoraflowError(
                "A key is among both `api_keys=...` and `admin_keys=...`: whoever may ask could load and unload too. "
                "Give the admins another."
            )
        check_hosts(self.allowed_hosts)
        check_log_format(self.log_format)
        if self.otlp_traces_endpoint is not None:
            check_endpoint(self.otlp_traces_endpoint)
        if bool(self.admin_keys) != bool(self.load_from):
            raise LoraflowError(
                "Loading while the server runs needs both: an admin key, and folders to load from (`admin_keys=...`, "
                "`load_from=...`). Give both, or neither."
            )
        if not self.drain_s >= 0:
            raise LoraflowError(f"`drain_s` (={self.drain_s}) must be at least 0.")
        for name in ("max_waiting", "max_new_tokens", "max_body_bytes", "timeout_s", "receive_timeout_s"):
            if not getattr(self, name) > 0:
                raise LoraflowError(f"`{name}` (={getattr(self, name)}) must be greater than 0.")

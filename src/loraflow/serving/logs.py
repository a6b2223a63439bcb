"""What a server writes as it runs: lines for people, or one object of JSON a line."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Mapping
from typing import Any, Literal, get_args

from loraflow.errors import LoraflowError
from loraflow.serving.record import CURRENT

LogFormat = Literal["text", "json"]


def check_log_format(name: str) -> None:
    """Check the name of a format.

    Raises:
        LoraflowError: if there is none of that name.
    """
    if name not in get_args(LogFormat):
        raise LoraflowError(f"`log_format` (={name!r}) must be one of {', '.join(map(repr, get_args(LogFormat)))}.")


def log_facts(log: logging.Logger, facts: Mapping[str, Any]) -> None:
    """Write facts, which are an object of JSON in every format."""
    log.info(json.dumps(facts, ensure_ascii=False), extra={"facts": facts})


class JsonFormatter(logging.Formatter):
    """One object a line: `time`, `level`, `logger`, then a `message` or the facts that stand for it.

    What is logged while a request is answered has its `request_id`.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, in ASCII, so that no character that a client sends can end it or be refused by a terminal."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        current = CURRENT.get()
        if current is not None:
            line["request_id"] = current.id
        line |= getattr(record, "facts", None) or {"message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up_logs(log_format: LogFormat) -> None:
    """Let this process write its log in a format; what its libraries say, warnings and uvicorn's lines included."""
    if log_format == "json":
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging as transformers_logging

        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter())
        logging.basicConfig(handlers=[handler], force=True)
        logging.captureWarnings(True)
        transformers_logging.disable_default_handler()
        transformers_logging.enable_propagation()
        transformers_logging.disable_progress_bar()
        disable_progress_bars()
    else:
        logging.basicConfig(format="%(message)s")
    logging.getLogger("loraflow.serving").setLevel(logging.INFO)

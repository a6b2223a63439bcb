"""`loraflow` with a server whose answers never end by themselves, each step taking so many seconds.

`python -m tests.serving.slow_server SECONDS [full] serve ...`; with `full`, no file can be written, as on a full disk.
"""

from __future__ import annotations

import resource
import sys
import time

from loraflow.cli import app
from loraflow.endings import Endings
from loraflow.serving.batching import Manager
from loraflow.serving.service import Service


def main() -> None:
    """Slow the steps down, and run the command line."""
    seconds, step = float(sys.argv.pop(1)), Manager._generation_step
    if sys.argv[1] == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        del sys.argv[1]

    def slow_step(manager: Manager) -> None:
        time.sleep(seconds)
        step(manager)

    Manager._generation_step = slow_step
    Service._endings = lambda *_: Endings()
    app()


if __name__ == "__main__":
    main()

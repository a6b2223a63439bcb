"""What answers while a model still loads: that no requests are taken yet."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

# For a client to send its request line and headers.
_PATIENCE_S = 5
_BODY = b'{"status":"loading"}'
_LOADING = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
)


@contextlib.contextmanager
def not_ready(listener: socket.socket) -> Iterator[None]:
    """Answer everything with 503 on a bound socket, inside the block.

    The socket listens from then on; who connects at the block's end waits for the server that takes it over.
    """
    listener.listen(128)
    loop = asyncio.new_event_loop()
    # The server closes what it was given; the connections that wait belong to both.
    server = loop.run_until_complete(asyncio.start_server(_answer, sock=listener.dup()))
    thread = threading.Thread(target=loop.run_forever, name="loraflow-starting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(_end(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        async with asyncio.timeout(_PATIENCE_S):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(_LOADING)
            await writer.drain()
    writer.close()


async def _end(server: asyncio.Server) -> None:
    server.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)

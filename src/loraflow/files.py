"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from loraflow.errors import StorageError

try:
    import fcntl
except ImportError:  # Windows: nothing can be held there, and so nothing is cleared.
    fcntl = None  # type: ignore[assignment]

_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-[0-9a-f]{8}\.tmp")
# Some file systems keep locks from other hosts; a file that grew within this time may have a writer there.
_LONGEST_WRITE_S = 3600.0


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step: a reader, or a crash, sees the old content or the new, never a part.

    Raises:
        StorageError: if it cannot be written; the old file is as it was.
    """
    with staged(path) as temporary:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        StorageError: if that cannot be.
    """
    with _reported(path):
        path.mkdir(parents=True, exist_ok=True)


def is_first_process() -> bool:
    """Whether this is the first of the processes that a launcher has started for one training, or the only one."""
    return int(os.environ.get("WORLD_SIZE") or "1") == 1 or os.environ.get("RANK", "0") in ("", "0")


@contextlib.contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder for the block; the hold ends with its process, however that ends.

    Processes that train together come as one: the first of them holds the folder for all.

    Raises:
        StorageError: if somebody else holds it; `what` is what they do there.
    """
    if not is_first_process():
        yield
        return
    was_there = folder.is_dir()
    make_folder(folder)
    lock = FileLock(folder / ".lock")
    with _reported(folder):
        held = _acquired(lock)
    if not held:
        raise StorageError(f"Another {what} is running in {folder}. Wait for it, or give another place.")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        if not was_there:
            with contextlib.suppress(OSError):
                # What came to nothing leaves nothing.
                folder.rmdir()


def _acquired(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


@contextlib.contextmanager
def staged(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """An empty file or folder beside a path, to be filled and moved there; what is not moved is removed at the end.

    It is locked for as long. What writers that were killed have left in the same folder is removed first: nobody holds
    a lock on it any more. Folders that are missing on the way are made.

    Yields:
        The temporary place.

    Raises:
        StorageError: if it cannot be made or filled.
    """
    with _reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            _clear(path.parent)
        temporary, lock = _make_temporary(path, folder)
        try:
            yield temporary
        finally:
            _remove(temporary)
            if lock is not None:
                os.close(lock)


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Errors of the system as one of the library.

    Raises:
        StorageError: for each of them.
    """
    try:
        yield
    except OSError as error:
        reason, remedy = error.strerror or str(error), "Give a place that can be written to."
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            reason = f"{next((p for p in (path, *path.parents) if os.path.isfile(p)), path)} is a file"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "Free some space, or give another place."
        raise StorageError(f"{path} cannot be written: {reason}. {remedy}") from error


def _make_temporary(path: Path, folder: bool) -> tuple[Path, int | None]:
    """A new file or folder, and the lock on it."""
    while True:
        temporary = path.with_name(f".{path.name}.{_HOST}-{secrets.token_hex(4)}.tmp")
        if folder:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
        # Between the two lines, somebody who clears the folder may have taken it for abandoned.
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            return temporary, _lock(temporary)


def _lock(path: Path) -> int | None:
    """Lock a file or folder until the descriptor is closed; None where the file system has no locks.

    Raises:
        BlockingIOError: if somebody else holds it.
        FileNotFoundError: if it is there no more.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Moved or removed meanwhile, it is another one, or none.
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise FileNotFoundError(path)
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _clear(folder: Path) -> None:
    """Remove temporary files and folders that nobody holds."""
    for place in [Path(entry) for entry in os.scandir(folder) if _is_abandoned(entry)]:
        # One that is held, or gone by now, is not ours to remove.
        with contextlib.suppress(OSError):
            lock = _lock(place)
            if lock is not None:
                _remove(place)
                os.close(lock)


def _is_abandoned(entry: os.DirEntry[str]) -> bool:
    """Whether it may be, if nobody holds it."""
    match = _TEMPORARY.fullmatch(entry.name)
    if match is None or entry.is_symlink():
        return False
    return match[1] == _HOST or time.time() - entry.stat().st_mtime > _LONGEST_WRITE_S


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)

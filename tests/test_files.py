"""Files are written whole or not at all; nothing of a killed writer stays, nothing of a live one is taken."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

from loraflow import files
from loraflow.errors import LoraflowError, StorageError
from loraflow.files import make_folder, staged, write_atomically

fork = multiprocessing.get_context("fork")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def hold(path: Path, ready, folder: bool = False) -> None:
    """Write a part of a file, and wait for the end."""
    with staged(path, folder=folder) as temporary:
        (temporary / "part" if folder else temporary).write_bytes(b"half")
        ready.set()
        threading.Event().wait()


def killed_while_writing(path: Path, folder: bool = False) -> None:
    ready = fork.Event()
    writer = fork.Process(target=hold, args=(path, ready, folder))
    writer.start()
    assert ready.wait(10)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()


def test_a_file_is_replaced_and_folders_are_made(tmp_path):
    path = tmp_path / "some" / "where" / "file"
    for content in (b"old", b"new"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("folder", [False, True])
def test_what_killed_writers_left_goes_at_the_next_save(tmp_path, folder):
    write_atomically(tmp_path / "file", b"old")
    for name in ("file", "file", "other"):
        killed_while_writing(tmp_path / name, folder)
    # Whether each of them cleared what the one before had left, or the last did.
    assert len(names(tmp_path)) == 2
    write_atomically(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file"]


def test_writers_that_write_are_left_alone(tmp_path):
    ready, begun, over = fork.Event(), threading.Event(), threading.Event()

    def write_in_a_thread() -> None:
        with staged(tmp_path / "file") as temporary:
            begun.set()
            over.wait(10)
            os.replace(temporary, tmp_path / "of the thread")

    writer = fork.Process(target=hold, args=(tmp_path / "file", ready), daemon=True)
    writer.start()
    assert ready.wait(10)
    thread = threading.Thread(target=write_in_a_thread, daemon=True)
    thread.start()
    assert begun.wait(10)
    before = names(tmp_path)
    assert len(before) == 2
    write_atomically(tmp_path / "file", b"new")
    assert names(tmp_path) == [*before, "file"]
    over.set()
    thread.join()
    assert (tmp_path / "of the thread").exists()
    writer.kill()
    writer.join()


def test_many_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    failures = []

    def write(number: int) -> None:
        try:
            for _ in range(50):
                write_atomically(tmp_path / "file", bytes([number]) * 100)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(set((tmp_path / "file").read_bytes())) == 1
    assert names(tmp_path) == ["file"]


def test_files_from_another_host_go_when_they_are_old(tmp_path):
    recent, old = tmp_path / ".file.0123abcd-00000000.tmp", tmp_path / ".file.0123abcd-00000001.tmp"
    for path in (recent, old):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    write_atomically(tmp_path / "file", b"new")
    assert names(tmp_path) == [recent.name, "file"]


@pytest.mark.parametrize("name", [".file.tmp", "file.tmp", ".vimrc.12345678.tmp", "notes"])
def test_files_of_others_stay(tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / name).read_bytes() == b"mine"


def test_without_locks_files_are_written_and_nothing_is_cleared(tmp_path, monkeypatch):
    killed_while_writing(tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr(files, "fcntl", None)
        write_atomically(tmp_path / "file", b"one")
    assert len(names(tmp_path)) == 2

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(files.fcntl, "flock", refuse)
        write_atomically(tmp_path / "file", b"two")
    assert len(names(tmp_path)) == 2
    assert (tmp_path / "file").read_bytes() == b"two"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"file cannot be written: No space left on device\. Free some space, or give another place\."),
        (errno.EACCES, r"file cannot be written: Permission denied\. Give a place that can be written to\."),
    ],
)
def test_what_the_system_refuses_is_said_and_the_old_file_stays(tmp_path, monkeypatch, number, message):
    write_atomically(tmp_path / "file", b"old")

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=message):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("make", [make_folder, lambda path: write_atomically(path, b"new")])
def test_a_place_below_a_file_is_refused(tmp_path, make):
    (tmp_path / "file").write_bytes(b"old")
    for place in ("below", "far/below"):
        with pytest.raises(LoraflowError, match=r"below cannot be written: .*/file is a file\. Give a place that can"):
            make(tmp_path / "file" / place)
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_place_that_cannot_be_made_is_refused():
    with pytest.raises(StorageError, match=r"/proc/nowhere cannot be written: No such file or directory\. Give a "):
        make_folder(Path("/proc/nowhere"))


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(StorageError, match=r"cannot be written: Is a directory\. Give a place"):
        write_atomically(tmp_path, b"new")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file is a file\. Give a place"):
        make_folder(tmp_path / "file")

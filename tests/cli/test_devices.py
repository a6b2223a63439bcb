"""Commands in several processes: what is refused before they start, and what is said of one that was killed."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
import typer
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from typer.testing import CliRunner

from loraflow import BaseOptions, FitConfig
from loraflow.cli import app
from loraflow.cli.devices import join, launch, own_device, placed, tells_errors
from loraflow.errors import LoraflowError
from loraflow.files import is_first_process

GIVEN = SimpleNamespace(arguments=["fit", "--devices", "2"])


@pytest.fixture
def launched(monkeypatch):
    """As `torchrun` starts the second of two processes."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def ending(monkeypatch):
    """Let processes that are started end so."""

    def end(error):
        def start(config, program):
            def run(*arguments):
                assert arguments == ("-m", "loraflow", *GIVEN.arguments)
                raise error

            return run

        monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", start)

    return end


def failed(tmp_path, exitcode):
    return ChildFailedError("loraflow", {1: ProcessFailure(1, 4711, exitcode, str(tmp_path / "none"))})


def test_one_that_was_killed_is_named(tmp_path, ending):
    ending(failed(tmp_path, -signal.SIGKILL))
    with pytest.raises(LoraflowError, match=r"Process 1 of 2 was killed \(SIGKILL; .*go on from there with --resume"):
        launch(GIVEN, 2, "cpu", FitConfig())


def test_one_that_has_said_why_is_not_told_again(tmp_path, ending):
    ending(failed(tmp_path, 1))
    with pytest.raises(typer.Exit) as found:
        launch(GIVEN, 2, "cpu", FitConfig())
    assert found.value.exit_code == 1


def test_the_user_stops_all(ending):
    ending(SignalException("stopped", signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        launch(GIVEN, 2, "cpu", FitConfig())


def test_nothing_is_started_for_one_or_within_one_of_several(launched):
    assert not launch(GIVEN, None, "cpu", FitConfig())
    assert not launch(GIVEN, 2, "cpu", FitConfig())


def test_what_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(LoraflowError, match=r"`--devices` \(=2\) is more than the GPUs of this machine \(=1\)"):
        launch(GIVEN, 2, None, FitConfig())
    with pytest.raises(LoraflowError, match=r"`batch_size` \(=4\) is that of all processes together"):
        launch(GIVEN, 3, "cpu", FitConfig())


def test_each_process_has_its_own_gpu(monkeypatch, launched):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert own_device(None) == own_device("cuda") == "cuda:1"
    assert own_device("cpu") == "cpu"
    assert not is_first_process()
    assert tells_errors()


def test_devices_that_cannot_be(monkeypatch, launched):
    for devices, device, message in [
        (0, None, r"`--devices` \(=0\) must be at least 1"),
        (2, "cuda:0", r"`--device` \(='cuda:0'\) is one place, and each of several processes has its own GPU"),
        (3, "cpu", r"`--devices` \(=3\) is not the number of processes that were launched here \(=2\)"),
    ]:
        with pytest.raises(LoraflowError, match=message):
            join(devices, device)


def test_a_part_of_a_base(monkeypatch, launched):
    found = placed(BaseOptions(device_map="cpu"), shard=True)
    assert found.device_map is None
    assert found.model_kwargs["distributed_config"].fsdp_size == 2
    with pytest.raises(LoraflowError, match=r"`--shard` divides no quantised base \(`--quantization` = 'bnb-4bit'\)"):
        placed(BaseOptions(quantization="bnb-4bit"), shard=True)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(LoraflowError, match="`--shard` divides the base among several devices, and there is one"):
        placed(BaseOptions(), shard=True)
    assert placed(found, shard=False) is found


@pytest.mark.parametrize("command", ["compare", "serve", "generate"])
def test_a_command_that_does_not_train_is_not_started_several_times(launched, command):
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
    result = CliRunner().invoke(app, [command])
    assert result.exit_code == 1
    message = f"`loraflow {command}` is one process, and WORLD_SIZE (=2) says that a launcher has started several."
    assert message in result.output.replace("\n", " ")
    assert CliRunner().invoke(app, ["fit", "--help"]).exit_code == 0

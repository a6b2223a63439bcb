"""Fitting in two processes: what one process gives with the same batches, said once, and kept where one is lost."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments
from transformers.distributed import DistributedConfig

from loraflow.bases import check_sharding
from loraflow.errors import ArchitectureError, LoraflowError
from loraflow.training.checkpoints import COMPLETE, complete_checkpoints
from loraflow.training.data import IGNORED, Shared, TokenExample
from loraflow.training.processes import ALONE, Processes, here
from loraflow.training.trainer import WholeCheckpointTrainer
from tests.tiny import number_tokenizer, save_adapter, tiny_model

HERE = Path(__file__).parents[2]
GANG = HERE / "tests" / "training" / "gang.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE / 'src'}{os.pathsep}{HERE}"}
LONGEST_S = 400
SHARDS = "fsdp_size" in inspect.signature(DistributedConfig).parameters
TUNED = ["tuned", *(["sharded_tuned"] if SHARDS else [])]
EQUAL = [
    "plain",
    "accumulated",
    "resumed",
    "scored",
    "grid",
    "experts",
    *(["without_gradients"] if find_spec("nevergrad") else []),
    *(["sharded"] if SHARDS else []),
    *(["four_bit"] if find_spec("bitsandbytes") else []),
]
REFUSED = {
    "split": "The base is split by `tp_size` (=2): each process computes a part of a linear's output",
    "uneven": "`batch_size` (=3) is that of all processes together and must be a multiple of their number (=2)",
    "other_data": "Process 1 has another run: recipe, data, base or adapters than process 0.",
    "foreign": "checkpoint-1 is no checkpoint of this library. Give another directory.",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base and two adapters on disk."""
    folder = tmp_path_factory.mktemp("gang")
    base = tiny_model(hidden_size=64, intermediate_size=128, head_dim=32)
    base.save_pretrained(folder / "base")
    number_tokenizer().save_pretrained(folder / "base")
    for seed, name in enumerate("ab"):
        save_adapter(base, folder / name, seed=seed + 1)
    save_adapter(base, folder / "dora", seed=3, use_dora=True)
    return folder


def run(command, *, check=True):
    """A command to its end, or for so long; nothing that it started outlives the test."""
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=LONGEST_S)
        finally:
            # A launcher's children are in its group.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert not check or process.returncode == 0, output
    return output, process.returncode


def launcher(count):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]


def play(count, root, folder, *cases, check=True):
    """Run cases of `gang.py`; gives what was printed."""
    start = launcher(count) if count > 1 else [sys.executable]
    return run([*start, *map(str, [GANG, root, folder, *cases])], check=check)[0]


def results(folder, case):
    """What each process found."""
    return [json.loads(file.read_text()) for file in sorted((folder / case).glob("result-*.json"))]


@pytest.fixture(scope="module")
def one(root, tmp_path_factory):
    """Where one process left what it found in every case."""
    folder = tmp_path_factory.mktemp("one")
    play(1, root, folder, *EQUAL, *TUNED)
    return folder


@pytest.fixture(scope="module")
def two(root, tmp_path_factory):
    """Where two processes did, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    return folder, play(2, root, folder, *EQUAL, *TUNED, *REFUSED)


def assert_same(found, expected):
    assert found["steps"] == expected["steps"]
    assert found["kept_step"] == expected["kept_step"]
    for name in ("train_loss", "dev_loss", "dev_score"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5)
    assert found["start_losses"] == pytest.approx(expected["start_losses"], abs=1e-5)
    assert [loss for _, loss in found["log"]] == pytest.approx([loss for _, loss in expected["log"]], abs=1e-5)
    assert found["learned"].keys() == expected["learned"].keys()
    for name, value in expected["learned"].items():
        torch.testing.assert_close(torch.tensor(found["learned"][name]), torch.tensor(value), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", EQUAL)
def test_two_processes_give_what_one_gives(one, two, case):
    (expected,), found = results(one, case), results(two[0], case)
    assert len(found) == 2
    for seen in found:
        assert_same(seen, expected)
    assert found[0]["learned"] == found[1]["learned"]
    for row, other in zip(found[0]["search"], expected["search"], strict=True):
        assert row["dev_loss"] == pytest.approx(other["dev_loss"], abs=1e-5)


def test_each_thing_is_printed_once(two):
    of_case = two[1].split("case plain")[-1].split("case accumulated")[0]
    assert [line for line in of_case.splitlines() if "epoch" in line] == [
        f"fitting: epoch {epoch}, step {epoch * 5}/10, loss {loss:.4f}"
        for epoch, loss in enumerate((dict(results(two[0], "plain")[0]["log"])[step] for step in (5, 10)), start=1)
    ]


@pytest.mark.parametrize("case", TUNED)
def test_an_adapter_is_trained_by_two(one, two, case):
    files = [folder / case / "run" / "adapter" / "adapter_model.safetensors" for folder in (one, two[0])]
    expected, found = map(load_file, files)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("case", "message"), REFUSED.items())
def test_all_stop_for_the_same_reason(two, case, message):
    errors = [file.read_text() for file in sorted((two[0] / case).glob("error-*.txt"))]
    assert len(errors) == 2
    assert all(message in error for error in errors)


@pytest.mark.parametrize("then", [1, 2])
def test_a_run_goes_on_in_another_number_of_processes(root, one, two, tmp_path, then):
    shutil.copytree((two[0] if then == 1 else one) / "resumed" / "run", tmp_path / "continued" / "run")
    (complete_checkpoints(tmp_path / "continued" / "run")[-1] / COMPLETE).unlink()
    play(then, root, tmp_path, "continued")
    for seen in results(tmp_path, "continued"):
        assert_same(seen, results(one, "plain")[0])


def test_nothing_is_lost_where_one_dies(root, one, tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    # Started by hand: a launcher would stop the other one before it has said anything.
    command = [sys.executable, *map(str, (GANG, root, tmp_path, "dying"))]
    started = [
        subprocess.Popen(command, env={**ENVIRONMENT, **together, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]
    try:
        codes = [process.wait(LONGEST_S) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0, 9]
    error = (tmp_path / "dying" / "error-0.txt").read_text()
    assert error.startswith("LoraflowError: Process 0 of 2 cannot go on: another one has ended (")
    assert f"The last whole checkpoint is kept in {tmp_path / 'dying' / 'run'};" in error
    assert complete_checkpoints(tmp_path / "dying" / "run")[-1].name == "checkpoint-4"
    (tmp_path / "dying").rename(tmp_path / "continued")
    play(2, root, tmp_path, "continued")
    for seen in results(tmp_path, "continued"):
        assert_same(seen, results(one, "plain")[0])


@pytest.fixture
def fit_command(root, tmp_path):
    from tests.training.test_fit import reversals

    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for example in reversals(7)))
    modules = [f"{name}={root / name}" for name in "ab"]

    def command(output, *more):
        options = ["--base", root / "base", "--lora-modules", *modules, "--data", data, "--output", output]
        return [
            "-m",
            "loraflow",
            "fit",
            *map(str, options),
            "--epochs",
            "1",
            "--device",
            "cpu",
            "--dtype",
            "float32",
            *more,
        ]

    return command


def test_the_command_runs_in_processes_and_says_things_once(fit_command, tmp_path):
    outputs = {
        "one": run([sys.executable, *fit_command(tmp_path / "one")])[0],
        "devices": run([sys.executable, *fit_command(tmp_path / "devices", "--devices", "2")])[0],
        "launch": run([*launcher(2), *fit_command(tmp_path / "launch", *(["--shard"] if SHARDS else []))])[0],
    }
    for name, output in outputs.items():
        assert output.count("values to learn in") == 1, output
        assert output.count(f"saved to {tmp_path / name}"[:60]) == 1, output
        assert not (tmp_path / name / "checkpoints").exists()
    expected = load_file(tmp_path / "one" / "fusion.safetensors")
    for name in ("devices", "launch"):
        found = load_file(tmp_path / name / "fusion.safetensors")
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)


def test_the_command_says_an_error_once(fit_command, tmp_path):
    for command in (
        [sys.executable, *fit_command(tmp_path / "a", "--devices", "3")],
        [*launcher(2), *fit_command(tmp_path / "b", "--batch-size", "3")],
    ):
        output, code = run(command, check=False)
        assert code != 0
        assert output.count("is that of all processes together") == 1, output
    output, code = run([*launcher(2), *fit_command(tmp_path / "c", "--devices", "3")], check=False)
    assert code != 0
    assert "`--devices` (=3) is not the number of processes that were launched here (=2)" in output
    for more, message in [
        (["--devices", "0"], "`--devices` (=0) must be at least 1."),
        (["--devices", "2", "--device", "auto"], "`--device` (='auto') is one place"),
        (["--shard"], "`--shard` divides the base among several devices, and there is one."),
    ]:
        output, code = run([sys.executable, *fit_command(tmp_path / "d", *more)], check=False)
        assert (code, output.count(message)) == (1, 1), output


def test_rows_are_shared_out_whole():
    batch = [TokenExample([n], [n]) for n in range(5)]
    shares = [Shared(list, Processes(rank, 2))(batch) for rank in range(2)]
    assert sorted(row.input_ids[0] for share in shares for row in share) == [0, 1, 2, 3, 4]
    assert Shared(list, Processes(1, 2))(batch[:1]) == [TokenExample([0], [IGNORED])]
    assert Shared(list, ALONE)(batch) == batch


@pytest.mark.parametrize(("name", "flag"), [("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"), ("FSDP", "ACCELERATE_USE_FSDP")])
def test_no_launcher_takes_the_gates_apart(monkeypatch, name, flag):
    monkeypatch.setenv(flag, "true")
    with pytest.raises(LoraflowError, match=rf"`accelerate launch` is set to use {name} \({flag}\), which would take"):
        here(tiny_model())


def test_a_quantised_base_is_not_divided():
    model = tiny_model()
    model.is_quantized = True
    model.config.distributed_config = DistributedConfig(fsdp_size=2)
    with pytest.raises(ArchitectureError, match=r"The base is quantised, and stored in parts \(`fsdp_size` = 2\)"):
        check_sharding(model)


def test_each_process_has_its_own_device(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    state = SimpleNamespace(num_processes=2, process_index=1, device=torch.device("cuda:1"))
    monkeypatch.setattr("loraflow.training.processes.PartialState", lambda **_: state)
    spread = SimpleNamespace(device=torch.device("cuda:0"), hf_device_map={"a": 0, "b": 1})
    with pytest.raises(LoraflowError, match=r"The base is spread over several devices .* and 2 processes fit it"):
        here(spread)
    with pytest.raises(LoraflowError, match="The model of process 1 is on cuda:0, and its device is cuda:1"):
        here(SimpleNamespace(device=torch.device("cuda:0")))


def test_a_group_that_the_environment_does_not_know_is_refused(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("loraflow.training.processes.PartialState", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(LoraflowError, match="The process group has 2 processes, and the environment says nothing of"):
        here(tiny_model())


def test_a_loss_of_each_ones_own_is_refused(tmp_path):
    class Plain(torch.nn.Linear):
        accepts_loss_kwargs = False

    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(LoraflowError, match="2 processes cannot fit this base: the loss that its forward gives is a"):
        WholeCheckpointTrainer(
            model=Plain(1, 1), args=arguments, guard=None, dev_collator=None, processes=Processes(0, 2)
        )


def test_a_folder_that_one_does_not_see_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(Processes, "gather", lambda self, value: [True, value])
    with pytest.raises(LoraflowError, match=r"Process 1 does not see .*run\.json, which process 0 has written"):
        Processes(0, 2).check_sees(tmp_path / "run.json")


def test_one_process_is_alone():
    assert here(tiny_model()) == ALONE
    with pytest.raises(LoraflowError, match=r"`batch_size` \(=4\) .* Give a multiple of 6, or fewer processes"):
        Processes(0, 3).check_batches(4, 2)

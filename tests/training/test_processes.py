"""Fitting in two processes: what one process gives with the same batches, said once, and kept where one is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraflow import FitConfig
from loraflow.errors import LoraflowError
from loraflow.training.checkpoints import COMPLETE, complete_checkpoints
from loraflow.training.data import IGNORED, TokenExample
from loraflow.training.processes import ALONE, Processes, here
from tests.tiny import number_tokenizer, save_adapter, tiny_model

HERE = Path(__file__).parents[2]
LONGEST_S = 240


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base and two adapters on disk."""
    folder = tmp_path_factory.mktemp("gang")
    base = tiny_model(hidden_size=64, intermediate_size=128, head_dim=32)
    base.save_pretrained(folder / "base")
    number_tokenizer().save_pretrained(folder / "base")
    for seed, name in enumerate("ab"):
        save_adapter(base, folder / name, seed=seed + 1)
    return folder


def run(command, *, check=True, **variables):
    """A command to its end, or for so long; nothing that it started outlives the test."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE / 'src'}{os.pathsep}{HERE}", **variables}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
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


def in_processes(count, case, root, folder, *, check=True):
    """Run a case of `gang.py`; gives what it printed, and what each process found."""
    folder.mkdir(exist_ok=True)
    arguments = [str(HERE / "tests" / "training" / "gang.py"), case, root, folder / "run", folder]
    start = launcher(count) if count > 1 else [sys.executable]
    output, _ = run([*start, *map(str, arguments)], check=check)
    return output, [json.loads(file.read_text()) for file in sorted(folder.glob("result-*.json"))]


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


@pytest.mark.parametrize("case", ["plain", "accumulated", "scored", "grid", "without_gradients", "experts", "four_bit"])
def test_two_processes_give_what_one_gives(root, tmp_path, case):
    if case == "four_bit":
        pytest.importorskip("bitsandbytes")
    if case == "without_gradients":
        pytest.importorskip("nevergrad")
    _, (expected,) = in_processes(1, case, root, tmp_path / "one")
    output, found = in_processes(2, case, root, tmp_path / "two")
    assert len(found) == 2
    for one in found:
        assert_same(one, expected)
    assert found[0]["learned"] == found[1]["learned"]
    if case == "grid":
        assert [row["dev_loss"] for row in found[0]["search"]] == pytest.approx(
            [row["dev_loss"] for row in expected["search"]], abs=1e-5
        )
    lines = [line for line in output.splitlines() if line.startswith("fitting gates: epoch 1,")]
    assert len(lines) == len(set(lines)), "each line is printed once"


def test_two_processes_resume_to_what_one_gives(root, tmp_path):
    _, (expected,) = in_processes(1, "plain", root, tmp_path / "one")
    in_processes(2, "plain", root, tmp_path / "two")
    newest = complete_checkpoints(tmp_path / "two" / "run")[-1]
    (newest / COMPLETE).unlink()
    _, found = in_processes(2, "resumed", root, tmp_path / "two")
    for one in found:
        assert_same(one, expected)
    # Their number is no part of a run: one process goes on with what two began.
    shutil.copytree(tmp_path / "two" / "run", tmp_path / "then-one" / "run")
    newest = complete_checkpoints(tmp_path / "then-one" / "run")[-1]
    (newest / COMPLETE).unlink()
    _, (alone,) = in_processes(1, "resumed", root, tmp_path / "then-one")
    assert_same(alone, expected)


def test_nothing_is_lost_where_one_dies(root, tmp_path):
    _, (expected,) = in_processes(1, "plain", root, tmp_path / "one")
    folder = tmp_path / "two"
    folder.mkdir()
    # Started by hand: a launcher would stop the other one before it has said anything.
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    script = [sys.executable, str(HERE / "tests" / "training" / "gang.py"), "dying", root, folder / "run", folder]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **together, "PYTHONPATH": f"{HERE / 'src'}{os.pathsep}{HERE}"}
    started = [
        subprocess.Popen(list(map(str, script)), env={**environment, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]
    try:
        codes = [process.wait(LONGEST_S) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [3, 9]
    error = (folder / "error-0.txt").read_text()
    assert error.startswith("LoraflowError: Process 0 of 2 cannot go on: another one has ended (")
    assert f"The last whole checkpoint is kept in {folder / 'run'};" in error
    assert [place.name for place in complete_checkpoints(folder / "run")][-1] == "checkpoint-4"
    _, resumed = in_processes(2, "resumed", root, folder)
    for one in resumed:
        assert_same(one, expected)


def test_an_adapter_is_trained_by_two(root, tmp_path):
    for count, name in ((1, "one"), (2, "two")):
        in_processes(count, "tuned", root, tmp_path / name)
    one, two = (load_file(tmp_path / name / "run" / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("uneven", "`batch_size` (=3) is that of all processes together and must be a multiple of their number (=2)"),
        ("other_data", "Process 1 has another run: recipe, data, base or adapters than process 0."),
        ("elsewhere", "Process 1 does not see "),
        ("foreign", "checkpoint-1 is no checkpoint of this library. Give another directory."),
    ],
)
def test_all_stop_for_the_same_reason(root, tmp_path, case, message):
    in_processes(2, case, root, tmp_path / case, check=False)
    errors = [file.read_text() for file in sorted((tmp_path / case).glob("error-*.txt"))]
    assert len(errors) == 2
    assert all(message in error for error in errors)


FIT = ["--prompt", "plain", "--epochs", "1", "--device", "cpu", "--dtype", "float32"]


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
        "launch": run([*launcher(2), *fit_command(tmp_path / "launch")])[0],
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
    ]:
        output, code = run([sys.executable, *fit_command(tmp_path / "d", *more)], check=False)
        assert (code, output.count(message)) == (1, 1), output


def test_rows_are_shared_out_whole():
    batch = [TokenExample([n], [n]) for n in range(5)]
    shares = [Processes(rank, 2).rows(batch) for rank in range(2)]
    assert sorted(row.input_ids[0] for share in shares for row in share) == [0, 1, 2, 3, 4]
    assert Processes(1, 2).rows(batch[:1]) == [TokenExample([0], [IGNORED])]
    assert ALONE.rows(batch) == batch


def test_one_process_is_alone():
    assert here(tiny_model()) == ALONE
    with pytest.raises(LoraflowError, match=r"`batch_size` \(=4\) .* Give a multiple of 6, or fewer processes"):
        Processes(0, 3).check_batches(FitConfig(gradient_accumulation=2))

"""The state of an optimizer, a schedule and random numbers as safetensors and JSON: files that cannot run code."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from loraflow.errors import LoraflowError

OPTIMIZER_FILE = "optimizer.safetensors"
SCHEDULER_FILE = "scheduler.json"


def save_optimizer(optimizer: Any, directory: Path) -> None:
    """Write an optimizer's tensors by parameter and name, and the settings of its groups beside them."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for number, of_one in state["state"].items():
        for name, value in of_one.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value.detach().cpu().contiguous()
            else:
                plain[f"{number}.{name}"] = value
    rest = {"param_groups": state["param_groups"], "plain": plain}
    save_file(tensors, directory / OPTIMIZER_FILE, metadata={"rest": json.dumps(rest, default=_as_number)})


def load_optimizer(optimizer: Any, directory: Path) -> None:
    """Give an optimizer the state that `save_optimizer` wrote."""
    tensors, metadata = _read(directory / OPTIMIZER_FILE)
    rest = json.loads(metadata["rest"])
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **rest["plain"]}.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})


def save_scheduler(scheduler: Any, directory: Path) -> None:
    """Write where a schedule of the learning rate stands."""
    (directory / SCHEDULER_FILE).write_text(json.dumps(scheduler.state_dict(), default=_as_number))


def load_scheduler(scheduler: Any, directory: Path) -> None:
    """Bring a schedule to where `save_scheduler` found it."""
    scheduler.load_state_dict(json.loads((directory / SCHEDULER_FILE).read_text()))


def save_random_state(path: Path, *, every_device: bool) -> None:
    """Write where the random numbers of Python, NumPy, the CPU and the accelerators stand."""
    tensors = {"cpu": torch.random.get_rng_state()}
    module = _accelerator()
    if module is not None:
        devices = range(module.device_count()) if every_device else [module.current_device()]
        tensors |= {f"device.{number}": module.get_rng_state(device) for number, device in enumerate(devices)}
    name, keys, *rest = np.random.get_state()
    plain = {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}
    save_file(tensors, path, metadata={"rest": json.dumps(plain)})


def load_random_state(path: Path, *, every_device: bool) -> None:
    """Bring random numbers to where `save_random_state` found them."""
    tensors, metadata = _read(path)
    rest = json.loads(metadata["rest"])
    version, keys, gauss = rest["python"]
    random.setstate((version, tuple(keys), gauss))
    name, state, *others = rest["numpy"]
    np.random.set_state((name, np.array(state, dtype=np.uint32), *others))
    torch.random.set_rng_state(tensors.pop("cpu"))
    module = _accelerator()
    if module is not None:
        devices = range(module.device_count()) if every_device else [module.current_device()]
        # On other devices than then, the numbers are others in any case.
        for device, state in zip(devices, tensors.values(), strict=False):
            module.set_rng_state(state, device)


def _accelerator() -> Any:
    """The module of torch that has the accelerators' random numbers; None where there are none to keep."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    module = torch.get_device_module(accelerator) if accelerator is not None else None
    return module if hasattr(module, "get_rng_state_all") else None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, in its order, and its metadata.

    Raises:
        LoraflowError: if it is not there.
    """
    if not path.is_file():
        raise LoraflowError(
            f"{path.parent} has no {path.name}: its checkpoint is of another version. Start over, with "
            "`overwrite=True`."
        )
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}, file.metadata() or {}


def _as_number(value: Any) -> Any:
    """A learning rate that is kept as a tensor, as a number."""
    return value.item() if isinstance(value, Tensor) else list(value)

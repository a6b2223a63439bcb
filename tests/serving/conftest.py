from __future__ import annotations

import pytest

from loraflow import FusedModel, LoraFlow
from loraflow.demo.world import adapter_paths, base_path
from loraflow.methods import Arrow, Static
from loraflow.serving.catalog import Catalog
from tests.tiny import set_random_gates

SMALL_WORLD = {
    "layers": (["zh-chat", "math"], LoraFlow("layer")),
    "linears": (["math", "es-chat"], LoraFlow("module")),
    "steps": (["code", "ru-chat", "math"], LoraFlow("step")),
    "mix": (["zh-chat", "math", "code"], Static({"zh-chat": 0.5, "math": 0.8})),
    "arrows": (["es-chat", "code"], Arrow(2)),
}


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """Five fusions over the small world, on disk: their directories by name."""
    root = tmp_path_factory.mktemp("fusions")
    for index, (name, (adapters, method)) in enumerate(SMALL_WORLD.items()):
        paths = adapter_paths()
        model = FusedModel.from_adapters(base_path(), {one: paths[one] for one in adapters}, method)
        set_random_gates(model, index)
        model.save_pretrained(root / name)
    return {name: root / name for name in SMALL_WORLD}


@pytest.fixture(scope="session")
def catalog(small_world):
    """All of them, and the five adapters."""
    adapters = {name: str(path) for name, path in adapter_paths().items()}
    return Catalog.open(None, adapters, {name: str(path) for name, path in small_world.items()}, base_id="small")

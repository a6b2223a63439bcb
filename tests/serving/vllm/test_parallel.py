"""Two ranks of tensor parallelism: packed projections split by heads and rows, inputs by columns."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from loraflow import FusedModel
from loraflow.methods import Arrow, LoraFlow
from tests.serving.vllm.world import answers_of, call, engine, prompts, run_engines, save_base, save_fusion

pytestmark = pytest.mark.vllm

# With one key-value head both ranks compute it; Arrow's gates read the inputs of which each rank has a part.
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "layer": ({"num_key_value_heads": 1}, LoraFlow()),
    "arrow": ({}, Arrow(top_k=2)),
}


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_generate(tmp_path, case):
    changes, method = CASES[case]
    base = save_base(tmp_path / "llama", **changes)
    fusion = save_fusion(tmp_path / "fusion", base, method)
    started = engine(fusion, base, tensor_parallel_size=2, distributed_executor_backend="mp")
    environment = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    jobs = [{"engine": started, "calls": [call(prompts()), call(prompts())]}]
    (found,) = run_engines(jobs, tmp_path / "run", timeout_s=1800, **environment)
    assert "error" not in found, found["error"]
    expected = answers_of(FusedModel.from_pretrained(fusion), prompts())
    assert [[answer["ids"] for answer in answers] for answers in found["answers"]] == [expected, expected]

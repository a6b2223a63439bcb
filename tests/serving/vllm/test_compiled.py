"""Compiled engines: the answers of eager ones, and never those of what was compiled before."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from loraflow import FusedModel
from loraflow.methods import LoraFlow
from loraflow.serving.vllm.request_weights import KEY, processor_name
from tests.serving.vllm.world import adapters_of, answers_of, call, engine, prompts, run_engines, save_base, save_fusion

pytestmark = pytest.mark.vllm

# The same graph with another number in it: only the fusion's digest tells them apart.
TEMPERATURES = {"one": 1.1, "other": 5.0}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The base, two fusions, the first again, and one whose requests bring weights, all with one compile cache."""
    directory = tmp_path_factory.mktemp("compiled")
    base = save_base(directory / "llama")
    model = FusedModel.from_adapters(base, adapters_of(base), "base")
    expected = {"base": answers_of(model, prompts())}
    jobs = {"base": {"engine": {"model": str(base)}, "calls": [call(prompts())]}}
    for name, temperature in TEMPERATURES.items():
        fusion = save_fusion(directory / name, base, LoraFlow(temperature=temperature))
        jobs[name] = {"engine": engine(fusion, base, enforce_eager=False), "calls": [call(prompts())]}
        expected[name] = answers_of(FusedModel.from_pretrained(fusion), prompts())
    jobs["again"], expected["again"] = jobs["one"], expected["one"]
    fusion = directory / "one"
    options = {"logits_processors": [processor_name(str(fusion))], "enable_prefix_caching": False}
    mixes = [None, {"zh": 1.0}, {"math": 1.0}, None, {"code": -0.5}]
    extra = [None if mix is None else {KEY: mix} for mix in mixes]
    jobs["requests"] = {
        "engine": engine(fusion, base, enforce_eager=False, **options),
        "calls": [call(prompts(), extra_args=extra)],
    }
    expected["requests"] = answers_of(FusedModel.from_pretrained(fusion), prompts(), methods=mixes)
    found = run_engines(list(jobs.values()), directory / "run", timeout_s=1800)
    return dict(zip(jobs, found, strict=True)), expected


@pytest.mark.parametrize("case", ["base", "one", "other", "again", "requests"])
def test_answers_are_those_of_generate(compiled, case):
    found, expected = compiled
    assert "error" not in found[case], found[case]["error"]
    assert [answer["ids"] for answer in found[case]["answers"][0]] == expected[case]


def test_cases_differ(compiled):
    _, expected = compiled
    assert expected["base"] != expected["one"] != expected["other"] != expected["base"]

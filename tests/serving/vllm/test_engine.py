"""Fusions in vLLM's engine, token for token against `FusedModel.generate`, in float32.

Prompts are longer than a step (chunked prefill), more than fit in a batch, and asked twice (cached prefixes).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm")

from peft import PeftModel
from transformers import AutoModelForCausalLM

from loraflow import FusedModel
from loraflow.export import export_peft
from loraflow.methods import Arrow, LearnedStatic, Logo, LoraFlow, LoraHub, Phatgoose, Static
from loraflow.serving.vllm.request_weights import KEY, SCHEDULER, processor_name
from tests.serving.vllm.families import FAMILIES, KINDS, family_base, family_fusion
from tests.serving.vllm.world import (
    adapters_of,
    answers_of,
    call,
    engine,
    generated,
    prompts,
    run_engines,
    save_base,
    save_fusion,
)
from tests.tiny import ALL_LLAMA, save_adapter

pytestmark = pytest.mark.vllm

BY_LAYER = [{"zh": 1.0}, {"math": 0.7, "code": -0.4}, {"zh": 0.2, "math": 0.2, "code": 0.2}]
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "layer": ("llama", {}, LoraFlow(temperature=1.1)),
    "step": ("llama", {}, LoraFlow(granularity="step")),
    "module": ("llama", {}, LoraFlow(granularity="module")),
    "low-rank": ("llama", {}, LoraFlow(granularity="step", scorer="low-rank", width=4, reads="normalized")),
    "two-layer": ("llama", {}, LoraFlow(scorer="two-layer", activation="sigmoid", top_k=2)),
    "attention": ("llama", {}, LoraFlow(scorer="attention")),
    "static": ("llama", {}, Static(BY_LAYER)),
    "learned-task": ("llama", {}, LearnedStatic()),
    "learned-module": ("llama", {}, LearnedStatic(granularity="module")),
    "lorahub": ("llama", {}, LoraHub(mixes="outputs")),
    "arrow": ("llama", {}, Arrow(top_k=2)),
    "phatgoose": ("llama", {}, Phatgoose()),
    "qwen3-module": ("qwen3", {}, LoraFlow(granularity="module")),
}


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """What every case's engine answered, and what `generate` does."""
    directory = tmp_path_factory.mktemp("engines")
    jobs, expected = [], []
    for seed, (name, (architecture, changes, method)) in enumerate(CASES.items()):
        base = save_base(directory / f"base-{architecture}", architecture, **changes)
        fusion = save_fusion(directory / name, base, method, seed)
        jobs.append({"engine": engine(fusion, base), "calls": [call(prompts()), call(prompts())]})
        expected.append(generated(fusion, prompts()))
    for name in FAMILIES:
        base = family_base(directory, name)
        # Gates of single modules where a module is what transformers calls so, and vLLM packs it otherwise.
        method = LoraFlow(granularity="module" if name == "Phi 3" else "layer")
        fusion = family_fusion(base, name, directory / name, list(KINDS), method)
        jobs.append({"engine": engine(fusion, base), "calls": [call(prompts()), call(prompts())]})
        expected.append(generated(fusion, prompts()))
    found = run_engines(jobs, directory / "run", timeout_s=1800)
    return dict(zip((*CASES, *FAMILIES), zip(found, expected, strict=True), strict=True))


@pytest.mark.parametrize("case", [*CASES, *FAMILIES])
def test_answers_are_those_of_generate(answered, case):
    found, expected = answered[case]
    assert "error" not in found, found["error"]
    first, second = found["answers"]
    assert [answer["ids"] for answer in first] == expected
    assert [answer["ids"] for answer in second] == expected


def test_prefixes_came_from_the_cache(answered):
    first, second = answered["layer"][0]["answers"]
    assert sum(answer["cached"] for answer in first) == 0
    assert [answer["cached"] for answer in second] == [0, 0, 0, 32, 64]


def test_cases_differ(answered):
    of_llama = [answered[name][1] for name, (architecture, _, _) in CASES.items() if architecture == "llama"]
    assert all(one != other for index, one in enumerate(of_llama) for other in of_llama[:index])


MIXES: list[Any] = [
    None,
    {"zh": 1.0},
    {"math": 0.8, "code": 0.3},
    BY_LAYER,
    '{"zh": 0.5, "math": 0.5}',
    {},
    None,
    [{"code": 1.5}, {}, {"zh": -0.5}],
    {"zh": 0.3, "math": 0.3, "code": 0.4},
]


def _row_method(mix: Any) -> Any:
    if mix is None:
        return None
    if mix == {}:
        return "base"
    if isinstance(mix, str):
        return {"zh": 0.5, "math": 0.5}
    return Static(mix) if isinstance(mix, list) else mix


def _asked() -> list[list[int]]:
    asked = prompts((5, 40, 1, 33, 17, 60, 40, 9, 40))
    # All prompts of one length begin alike: a cache of prefixes would be found out.
    asked[3] = asked[1][:33]
    asked[6] = asked[8] = asked[1]
    return asked


@pytest.fixture(scope="module")
def requested(tmp_path_factory):
    """Engines whose requests bring weights of their own."""
    directory = tmp_path_factory.mktemp("requests")
    base = save_base(directory / "llama")
    asked = _asked()
    extra = [None if mix is None else {KEY: mix} for mix in MIXES]
    jobs, expected = [], []
    for name, method in (("layer", LoraFlow()), ("step", LoraFlow(granularity="step")), ("arrow", Arrow())):
        fusion = save_fusion(directory / name, base, method)
        options = {"logits_processors": [processor_name(str(fusion))], "scheduler_cls": SCHEDULER}
        calls = [call(asked, extra_args=extra), call(asked[:1], extra_args=[{KEY: {"de": 1.0}}])]
        # Numbers that overflow stay in the cache's blocks, which the next requests are given.
        absurd = {KEY: {"zh": 1e30, "math": -1e38, "code": 1e38}}
        calls.append(call(asked, extra_args=[absurd] * len(asked)))
        jobs.append({"engine": engine(fusion, base, **options), "calls": [*calls, call(asked, extra_args=extra)]})
        model = FusedModel.from_pretrained(fusion)
        expected.append(answers_of(model, asked, methods=[_row_method(mix) for mix in MIXES]))
    logo = save_fusion(directory / "logo", base, Logo())
    model = FusedModel.from_pretrained(logo)
    weights = [_by_name(model, prompt) for prompt in asked]
    options = {"logits_processors": [processor_name(str(logo))], "enable_prefix_caching": False}
    calls = [call(asked, extra_args=[{KEY: weight} for weight in weights]), call(asked[:1])]
    jobs.append({"engine": engine(logo, base, **options), "calls": calls})
    expected.append(answers_of(model, asked))
    found = run_engines(jobs, directory / "run")
    return dict(zip(("layer", "step", "arrow", "logo"), zip(found, expected, strict=True), strict=True))


def _by_name(model: FusedModel, prompt: list[int]) -> list[dict[str, float]]:
    rows = model.weigh(torch.tensor([prompt]))[0].tolist()
    return [dict(zip(model.adapter_names, row, strict=True)) for row in rows]


@pytest.mark.parametrize("case", ["layer", "step", "arrow"])
def test_requests_bring_weights(requested, case):
    found, expected = requested[case]
    assert "error" not in found, found["error"]
    first, refused, _, again = found["answers"]
    assert [answer["ids"] for answer in first] == expected
    # Each finds its own prefix again, and nobody another's.
    assert [answer["cached"] for answer in again] == [32 * ((len(prompt) - 1) // 32) for prompt in _asked()]
    assert "names the unknown adapter 'de'" in refused[0]["refused"]
    assert [answer["ids"] for answer in again] == expected


def test_a_method_of_whole_prompts(requested):
    found, expected = requested["logo"]
    assert "error" not in found, found["error"]
    first, refused = found["answers"]
    assert [answer["ids"] for answer in first] == expected
    assert "brings no `adapter_weights`" in refused[0]["refused"]


def test_adapters_of_vllm_itself_go_on_top(tmp_path):
    base = save_base(tmp_path / "llama")
    own = save_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "native", ALL_LLAMA, seed=9, r=8)
    jobs, expected = [], []
    for name, method in (("layer", LoraFlow()), ("arrow", Arrow(top_k=2))):
        fusion = save_fusion(tmp_path / name, base, method)
        options = {"enable_lora": True, "max_lora_rank": 8}
        # The same prompts each time: a cache of prefixes must tell them apart.
        calls = [call(prompts()), call(prompts(), lora=own), call(prompts())]
        jobs.append({"engine": engine(fusion, base, **options), "calls": calls})
        plain = FusedModel.from_pretrained(fusion)
        merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), own).merge_and_unload()
        model = FusedModel.from_adapters(merged, adapters_of(base), method)
        model.load_state_dict(plain.state_dict())
        without, beside = answers_of(plain, prompts()), answers_of(model, prompts())
        assert without != beside
        expected.append([without, beside, without])
    for found, wanted in zip(run_engines(jobs, tmp_path / "run"), expected, strict=True):
        assert "error" not in found, found["error"]
        assert [[answer["ids"] for answer in answers] for answers in found["answers"]] == wanted


def test_exported_fusions_are_loaded_by_vllm_itself(tmp_path):
    base = save_base(tmp_path / "llama")
    calls, expected = [], []
    for name, method in (("static", Static(BY_LAYER)), ("hub", LoraHub())):
        # Of unequal ranks and targets; the second with LoRA-Hub's cross terms.
        model = FusedModel.from_pretrained(save_fusion(tmp_path / name, base, method))
        report = export_peft(model, tmp_path / f"{name}-export")
        assert "--max-lora-rank" in report.vllm
        calls.append(call(prompts(), lora=tmp_path / f"{name}-export"))
        expected.append(answers_of(model, prompts()))
    started = {"model": str(base), "enforce_eager": True, "enable_lora": True, "max_lora_rank": 16}
    (found,) = run_engines([{"engine": started, "calls": calls}], tmp_path / "run")
    assert "error" not in found, found["error"]
    assert [[answer["ids"] for answer in answers] for answers in found["answers"]] == expected


def save_gptq(base: Path, directory: Path, group: int = 32) -> Path:
    """The base with symmetric 4-bit weights, as GPTQ checkpoints have them."""
    directory.mkdir()
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        rows, columns = weight.shape
        groups = weight.view(rows, columns // group, group)
        scales = (groups.abs().amax(-1, keepdim=True) / 7).half().float()
        levels = ((groups / scales).round().clamp(-8, 7) + 8).view(rows, columns).t().long()
        packed = sum(levels[index::8] << 4 * index for index in range(8))
        part = name.removesuffix("weight")
        tensors[f"{part}qweight"] = ((packed + 2**31) % 2**32 - 2**31).int().contiguous()
        tensors[f"{part}scales"] = scales.squeeze(-1).t().contiguous().half()
        # Zero points are 8, of which GPTQ's files hold one less.
        tensors[f"{part}qzeros"] = torch.full((columns // group, rows // 8), 0x77777777, dtype=torch.int32)
        tensors[f"{part}g_idx"] = (torch.arange(columns) // group).int()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group,
        "desc_act": False,
        "sym": True,
    }
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return directory


def test_quantised_bases_are_fused_as_vllm_adds_adapters_to_them(tmp_path):
    base = save_base(tmp_path / "llama")
    gptq = save_gptq(base, tmp_path / "gptq")
    asked = {**call(prompts()), "logprobs": 20}
    own = {name: Path(path) for name, path in adapters_of(base).items() if name != "code"}
    lora = {"model": str(gptq), "enforce_eager": True, "enable_lora": True, "max_lora_rank": 8}
    jobs = [{"engine": lora, "calls": [asked, *({**asked, "lora": str(path)} for path in own.values())]}]
    for weights in ({"zh": 0.0}, *({name: 1.0} for name in own)):
        fusion = save_fusion(tmp_path / f"{weights}", base, Static(weights))
        jobs.append({"engine": engine(fusion, gptq), "calls": [asked]})
    jobs = [{**job, "engine": {**job["engine"], "dtype": "bfloat16"}} for job in jobs]
    native, *fused = run_engines(jobs, tmp_path / "run")
    assert not [found["error"] for found in (native, *fused) if "error" in found]
    without, *beside = native["answers"]
    nothing, *single = (found["answers"][0] for found in fused)
    assert [answer["ids"] for answer in nothing] == [answer["ids"] for answer in without]
    for found, expected in zip(single, beside, strict=True):
        assert distance(found, expected) < 0.1 < distance(found, without) / 3


def distance(one: list[dict], other: list[dict]) -> float:
    """The largest difference between log-probabilities of the likeliest tokens after the prompts."""
    both = [(a["first"], b["first"]) for a, b in zip(one, other, strict=True)]
    return max(abs(a[token] - b[token]) for a, b in both for token in a.keys() & b.keys())


REFUSED = {
    "no-fusion": ({"model_loader_extra_config": {}}, "needs a fusion"),
    "changed": ({"digest": "sha256:00"}, "it was changed on disk since the command was made"),
    "key": ({"additional_config": {"loraflow": {"digest": "old"}}}, "--additional-config says {'digest': 'old'}"),
    "whole-prompts": ({"method": "logo"}, "'logo' weighs whole prompts"),
    "parameters": ({"method": "lorahub"}, "'lorahub' mixes parameters"),
    "prefixes": ({"requests": True}, "Add --scheduler-cls loraflow"),
    "no-loader": (
        {"requests": True, "load_format": "auto", "model_loader_extra_config": {}},
        "loaded without a fusion",
    ),
    "shared-experts": ({"architecture": "qwen2_moe"}, "beside the layer's experts"),
    "other-base": ({"architecture": "olmo2"}, "vLLM's Olmo2ForCausalLM has not been compared"),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """What kept each engine from starting."""
    directory = tmp_path_factory.mktemp("refused")
    jobs = []
    for name, (changes, _) in REFUSED.items():
        changes = dict(changes)
        base = save_base(directory / "llama")
        fusion = save_fusion(directory / name, base, changes.pop("method", "average"))
        options: dict[str, Any] = {}
        if changes.pop("requests", False):
            options["logits_processors"] = [processor_name(str(fusion))]
        architecture = changes.pop("architecture", None)
        if architecture is not None:
            base = save_base(directory / architecture, architecture, num_attention_heads=2, num_key_value_heads=2)
            fusion = directory / f"{architecture}-fusion"
            adapter = save_adapter(AutoModelForCausalLM.from_pretrained(base), directory / f"{architecture}-adapter")
            FusedModel.from_adapters(base, {"one": adapter}, "average").save_pretrained(fusion)
        loader = {key: changes.pop(key) for key in ("digest", "unverified") if key in changes}
        jobs.append({"engine": {**engine(fusion, base, loader, **options), **changes}, "calls": []})
    found = run_engines(jobs, directory / "run")
    return dict(zip(REFUSED, found, strict=True))


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_at_the_start(refused, case):
    assert REFUSED[case][1] in refused[case].get("error", "it was served")

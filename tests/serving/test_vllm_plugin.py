"""The parts of the vLLM plug-in that need no vLLM."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import logging
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jinja2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import loraflow.serving.vllm as vllm_package
from loraflow import FusedModel
from loraflow.bases import BaseOptions, TokenRecord, base_record, files_digest, load_base, load_empty_base
from loraflow.core.reference import reference_linear
from loraflow.core.stack import stack_adapters
from loraflow.errors import AdapterError, ArchitectureError, FusionError, LoraflowError, MethodError
from loraflow.methods import (
    AdapterCore,
    Arrow,
    Average,
    Base,
    Lag,
    LearnedStatic,
    Logo,
    LoraFlow,
    LoraHub,
    Method,
    NormMax,
    Phatgoose,
    Ramole,
    SpectR,
    Static,
)
from loraflow.methods.static import ConstantGate
from loraflow.prompts import PromptFormat
from loraflow.saved.fusion import SavedFusion
from loraflow.serving.vllm.checks import ARCHITECTURES, check_engine, check_plan
from loraflow.serving.vllm.command import chat_template, vllm_command
from loraflow.serving.vllm.delta import ForwardWeights, FusedDelta, GivenWeights, LayerWeights
from loraflow.serving.vllm.options import FusionOptions
from loraflow.serving.vllm.plan import FusionPlan, check_digest, read_plan
from loraflow.serving.vllm.request_table import RequestTable
from loraflow.serving.vllm.request_weights import (
    KEY,
    SCHEDULER,
    check_request,
    fusion_of,
    parse_weights,
    processor_name,
)
from loraflow.serving.vllm.settings import EngineSettings
from loraflow.serving.vllm.shards import Heads, Part, Rank, attention_parts, cut, even_parts, join
from tests.tiny import ALL_LLAMA, edit_config, random_adapter, save_adapter, set_random_gates, tiny_model

HIDDEN = 16
ADAPTERS = ("zh", "math", "code")


def random_updates(in_features: int, out_features: int, ranks: tuple[int | None, ...], seed: int = 0) -> list[Any]:
    """Updates of one linear, of these ranks; None where an adapter has none."""
    base = nn.ModuleDict({"0": nn.ModuleDict({"linear": nn.Linear(in_features, out_features)})})
    holder = nn.ModuleDict({"layers": base})
    return [
        None
        if rank is None
        else random_adapter(holder, str(index), ["linear"], r=rank, seed=seed + index).modules["layers.0.linear"]
        for index, rank in enumerate(ranks)
    ]


class TestShards:
    @pytest.mark.parametrize("ranks", [1, 2, 4])
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    def test_packed_attention_on_all_ranks_gives_the_full_product(self, ranks, kv_heads):
        heads = Heads(query=4, key_value=kv_heads, size=6, value_size=5)
        widths = (4 * 6, kv_heads * 6, kv_heads * 5)
        weights = [torch.randn(width, HIDDEN) for width in widths]
        modules = [random_updates(HIDDEN, w, r, i) for i, (w, r) in enumerate(zip(widths, _RANKS, strict=True))]
        x, fusion_weights = torch.randn(7, HIDDEN), torch.rand(7, 3)
        expected = [reference_linear(x, w, None, m, fusion_weights) for w, m in zip(weights, modules, strict=True)]
        for index in range(ranks):
            parts = attention_parts(heads, Rank(index, ranks))
            base_output = torch.cat([x @ w[p.rows].T for w, p in zip(weights, parts, strict=True)], dim=-1)
            found = _delta(modules, parts, fusion_weights)(x, base_output)
            wanted = torch.cat([y[:, p.rows] for y, p in zip(expected, parts, strict=True)], dim=-1)
            assert torch.allclose(found, wanted, atol=1e-5)
        if kv_heads % ranks == 0:
            covered = [attention_parts(heads, Rank(index, ranks))[1].rows for index in range(ranks)]
            assert [row for rows in covered for row in range(rows.start, rows.stop)] == list(range(widths[1]))

    def test_ranks_share_key_value_heads_where_there_are_fewer(self):
        heads = Heads(query=4, key_value=2, size=8, value_size=8)
        assert [attention_parts(heads, Rank(i, 4))[1].rows for i in range(4)] == [
            slice(0, 8),
            slice(0, 8),
            slice(8, 16),
            slice(8, 16),
        ]

    @pytest.mark.parametrize("ranks", [1, 2, 4])
    def test_packed_columns_on_all_ranks_give_the_full_product(self, ranks):
        weights = [torch.randn(24, HIDDEN), torch.randn(24, HIDDEN)]
        modules = [random_updates(HIDDEN, 24, (2, None, 4)), random_updates(HIDDEN, 24, (3, 1, 4), seed=9)]
        x, fusion_weights = torch.randn(5, HIDDEN), torch.rand(5, 3)
        whole = [reference_linear(x, w, None, m, fusion_weights) for w, m in zip(weights, modules, strict=True)]
        for index in range(ranks):
            parts = even_parts([24, 24], Rank(index, ranks))
            base_output = torch.cat([x @ w[p.rows].T for w, p in zip(weights, parts, strict=True)], dim=-1)
            found = _delta(modules, parts, fusion_weights)(x, base_output)
            wanted = torch.cat([y[:, p.rows] for y, p in zip(whole, parts, strict=True)], dim=-1)
            assert torch.allclose(found, wanted, atol=1e-5)

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_linears_that_the_checkpoint_fuses_on_all_ranks_give_the_full_product(self, ranks):
        heads = Heads(query=4, key_value=2, size=6, value_size=6)
        weight, modules = torch.randn(48, HIDDEN), random_updates(HIDDEN, 48, (2, None, 4))
        x, fusion_weights = torch.randn(5, HIDDEN), torch.rand(5, 3)
        whole = reference_linear(x, weight, None, modules, fusion_weights)
        for index in range(ranks):
            part = join(attention_parts(heads, Rank(index, ranks)))
            assert part.out_features == 48
            found = _delta([modules], [part], fusion_weights)(x, x @ weight[part.rows].T)
            assert torch.allclose(found, whole[:, part.rows], atol=1e-5)

    @pytest.mark.parametrize("ranks", [1, 2, 4])
    def test_sums_of_rows_over_all_ranks_are_the_full_product(self, ranks):
        weight, modules = torch.randn(12, HIDDEN), random_updates(HIDDEN, 12, (4, 2, None))
        x, fusion_weights = torch.randn(5, HIDDEN), torch.rand(5, 3)
        total = torch.zeros(5, 12)
        for index in range(ranks):
            columns = Rank(index, ranks).share(HIDDEN)
            delta = _delta([modules], even_parts([12], Rank()), fusion_weights, columns)
            total += delta(x[:, columns], x[:, columns] @ weight[:, columns].T)
        assert torch.allclose(total, reference_linear(x, weight, None, modules, fusion_weights), atol=1e-5)

    @settings(deadline=None, max_examples=30)
    @given(
        ranks=st.lists(st.one_of(st.none(), st.integers(1, 5)), min_size=1, max_size=4).filter(any),
        tokens=st.integers(1, 6),
        constant=st.booleans(),
    )
    def test_any_ranks(self, ranks, tokens, constant):
        modules = random_updates(HIDDEN, 10, tuple(ranks))
        weight, x = torch.randn(10, HIDDEN), torch.randn(tokens, HIDDEN)
        fusion_weights = torch.randn(len(ranks)) if constant else torch.randn(tokens, len(ranks))
        found = _delta([modules], even_parts([10], Rank()), fusion_weights)(x, x @ weight.T)
        expected = reference_linear(x, weight, None, modules, fusion_weights.expand(tokens, -1))
        assert torch.allclose(found, expected, atol=1e-4)

    @pytest.mark.parametrize("rank", [4, 70])
    def test_few_slots_are_multiplied_together_and_many_apart(self, rank):
        modules = [random_updates(HIDDEN, width, (rank, 3), seed=width) for width in (8, 6)]
        delta = _delta(modules, even_parts([8, 6], Rank()), torch.tensor([0.5, 2.0]))
        assert hasattr(delta, "lora_B1") is (rank == 70)
        x, weights = torch.randn(4, HIDDEN), [torch.randn(8, HIDDEN), torch.randn(6, HIDDEN)]
        found = delta(x, torch.cat([x @ w.T for w in weights], dim=-1))
        expected = [
            reference_linear(x, w, None, m, torch.tensor([[0.5, 2.0]]).expand(4, -1))
            for w, m in zip(weights, modules, strict=True)
        ]
        assert torch.allclose(found, torch.cat(expected, dim=-1), atol=1e-4)
        apart = _delta(modules, [Part(8, slice(0, 8), 0), Part(6, slice(0, 6), 9)], torch.tensor([0.5, 2.0]))
        assert hasattr(apart, "lora_B1")

    def test_only_the_middle_of_packed_linears_is_updated(self):
        modules, parts = random_updates(HIDDEN, 8, (2, 2)), even_parts([4, 8, 4], Rank())
        x, base_output, fusion_weights = torch.randn(3, HIDDEN), torch.randn(3, 16), torch.rand(3, 2)
        found = _delta([modules], parts[1:2], fusion_weights)(x, base_output)
        assert torch.equal(found[:, :4], base_output[:, :4])
        assert torch.equal(found[:, 12:], base_output[:, 12:])
        update = reference_linear(x, torch.zeros(8, HIDDEN), None, modules, fusion_weights)
        assert torch.allclose(found[:, 4:12] - base_output[:, 4:12], update, atol=1e-5)


def test_only_the_seam_imports_vllm():
    package = Path(vllm_package.__file__).parent
    assert "from vllm" in (package / "seam.py").read_text(encoding="utf-8")
    for file in package.parents[1].rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        modules += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
        if file != package / "seam.py":
            assert "vllm" not in {module.partition(".")[0] for module in modules}, file


_RANKS: tuple[tuple[int | None, ...], ...] = ((4, 2, None), (1, None, 3), (2, 2, 2))


def _delta(modules: list[Any], parts: list[Part], weights: torch.Tensor, columns: slice | None = None) -> FusedDelta:
    shared = ForwardWeights()
    shared.weights = weights
    columns = columns or slice(0, HIDDEN)
    stacks = [
        cut(stack_adapters(m, nn.Identity(), torch.float32), part.rows, columns)
        for m, part in zip(modules, parts, strict=True)
    ]
    return FusedDelta(shared, 0, stacks, parts)


class TestDelta:
    def test_packed_linears_with_gates_of_their_own(self):
        modules = [random_updates(HIDDEN, 8, (2, 3)), random_updates(HIDDEN, 6, (1, 2), seed=5)]
        delta = _delta(modules, even_parts([8, 6], Rank()), torch.zeros(2))
        delta.add_gates([ConstantGate([0.5, -1.0]), ConstantGate([2.0, 0.25])], gather=None)
        x, weights = torch.randn(4, HIDDEN), [torch.randn(8, HIDDEN), torch.randn(6, HIDDEN)]
        found = delta(x, torch.cat([x @ w.T for w in weights], dim=-1))
        expected = [
            reference_linear(x, w, None, m, torch.tensor(gate).expand(4, -1))
            for w, m, gate in zip(weights, modules, ([0.5, -1.0], [2.0, 0.25]), strict=True)
        ]
        assert torch.allclose(found, torch.cat(expected, dim=-1), atol=1e-5)

    def test_gates_read_the_whole_input_of_a_split_linear(self):
        seen = []

        class Gate(nn.Module):
            def forward(self, x):
                seen.append(x)
                return torch.zeros(x.shape[0], 1)

        x = torch.randn(3, HIDDEN)
        delta = _delta([random_updates(HIDDEN, 4, (2,))], even_parts([4], Rank()), torch.zeros(1), slice(0, 8))
        delta.add_gates([Gate()], gather=lambda part: x)
        delta(x[:, :8], torch.zeros(3, 4))
        assert seen[0] is x

    def test_a_gate_of_the_model_is_asked_once(self):
        shared, asked = ForwardWeights(), []

        class Gate(nn.Module):
            def forward(self, x):
                asked.append(x)
                return x[:, :2]

        layers = [LayerWeights(shared, 0, Gate(), keeps=True), LayerWeights(shared, 1, None, keeps=False)]
        first, second = torch.randn(3, HIDDEN), torch.randn(3, HIDDEN)
        layers[0].open(first, None)
        layers[0].close()
        layers[1].open(second, second)
        assert torch.equal(shared.weights, first[:, :2])
        layers[1].close()
        assert len(asked) == 1
        assert shared.weights is None
        assert shared.given is None

    def test_a_layer_reads_the_sum_of_the_stream(self):
        shared = ForwardWeights()
        layer = LayerWeights(shared, 0, nn.Identity(), keeps=False)
        layer.open(torch.ones(2, 3), torch.ones(2, 3))
        assert torch.equal(shared.weights, 2 * torch.ones(2, 3))

    def test_a_linear_that_is_gone_past_is_noticed(self):
        layer = LayerWeights(ForwardWeights(), 4, GivenWeights(2), keeps=False)
        layer.linears = 3
        layer.open(torch.zeros(1, 8), None)
        with pytest.raises(ArchitectureError, match=r"Decoder layer 4 called 0 of its 3 fused linears"):
            layer.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """A base and three adapters on disk."""
    directory = tmp_path_factory.mktemp("vllm")
    base = tiny_model("llama")
    base.save_pretrained(directory / "base")
    adapters = {
        "zh": save_adapter(base, directory / "zh", ALL_LLAMA, seed=1),
        "math": save_adapter(base, directory / "math", ["q_proj", "v_proj"], seed=2, r=8, use_rslora=True),
        "code": save_adapter(base, directory / "code", ["down_proj", "q_proj"], seed=3, r=2),
    }
    return SimpleNamespace(directory=directory, base=str(directory / "base"), adapters=adapters)


def save(world: SimpleNamespace, directory: Path, method: Method | str, **adapters: str) -> Path:
    model = FusedModel.from_adapters(world.base, adapters or world.adapters, method)
    if model.method.learns:
        set_random_gates(model)
    model.save_pretrained(directory)
    return directory


class TestPlan:
    @pytest.mark.parametrize(
        "method",
        [
            LoraFlow(),
            LoraFlow(granularity="step"),
            LoraFlow(granularity="module", scorer="two-layer"),
            LoraFlow(scorer="attention", reads="normalized", activation="sigmoid", top_k=2),
            Arrow(),
            SpectR(2),
            NormMax(),
            Lag(1),
            Phatgoose(),
            Static({"zh": 0.5, "code": -1.0}),
            LearnedStatic(granularity="module"),
            LoraHub(mixes="outputs"),
        ],
        ids=lambda method: f"{method.name}-{getattr(method, 'granularity', '')}",
    )
    def test_gates_are_those_of_the_model(self, world, tmp_path, method):
        model = FusedModel.from_pretrained(save(world, tmp_path, method))
        plan = read_plan(tmp_path, world.base)
        assert plan.adapters == ADAPTERS
        assert plan.gates.keys() == model.gates.keys()
        for name, gate in plan.gates.items():
            features = 48 if name.endswith("down_proj") else 32
            x = torch.randn(5, features)
            assert torch.equal(gate(x), model.gates[name](x))

    def test_updates_are_those_of_the_adapters(self, world, tmp_path):
        plan = read_plan(save(world, tmp_path, "average"), world.base)
        assert len(plan.layers) == 3
        assert [update is not None for update in plan.layers[1]["self_attn.k_proj"]] == [True, False, False]
        assert plan.layers[2]["self_attn.q_proj"][1].scaling == 8 / 8**0.5

    def test_a_core_is_one_adapter_of_all_ranks_together(self, world, tmp_path):
        model = FusedModel.from_pretrained(save(world, tmp_path, AdapterCore("zh")))
        plan = read_plan(tmp_path, world.base)
        assert plan.adapters == ("zh+math+code",)
        assert plan.gates.keys() == model.gates.keys()
        for name, site in model.attachment.sites["module"].items():
            (update,) = plan.layers[site.layer][site.module]
            ranks = sum(one.rank for one in site.updates[site.module] if one is not None)
            assert update.rank <= min(ranks, *update.lora_A.shape[1:], len(update.lora_B))
            x = torch.randn(3, site.features)
            linear = model.base_model.get_submodule(f"model.{name}")
            expected = reference_linear(x, linear.weight, None, [update], plan.gates[name](x).expand(3, 1))
            with model.using("base"):
                base_output = linear(x)
            gate = model.gates[name]
            own = x @ gate.down.T @ gate.core.T @ gate.up.T
            weighted = reference_linear(
                x, linear.weight, None, list(site.updates[site.module]), gate.start.expand(3, 3)
            )
            assert torch.allclose(weighted + own, expected, atol=1e-4)
            assert not torch.allclose(base_output, expected, atol=1e-2)
        check_plan(plan, requests=False)
        with pytest.raises(MethodError, match=r"'adapter-core' adds updates of its own.*requests cannot bring weights"):
            check_plan(plan, requests=True)

    @pytest.mark.parametrize("method", [LoraFlow(), AdapterCore()], ids=lambda method: method.name)
    def test_a_dora_is_refused_by_name(self, world, tmp_path, method):
        dora = save_adapter(tiny_model("llama"), tmp_path / "dora", ["q_proj"], use_dora=True)
        save(world, tmp_path / "fusion", method, zh=world.adapters["zh"], dora=dora)
        with pytest.raises(AdapterError, match="'dora' is a DoRA, which is not computed in vLLM"):
            read_plan(tmp_path / "fusion", world.base)

    def test_whole_prompts_have_no_gates(self, world, tmp_path):
        plan = read_plan(save(world, tmp_path, Logo()), world.base)
        assert plan.gates == {}

    def test_another_base_is_refused(self, world, tmp_path):
        save(world, tmp_path / "fusion", "average")
        tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "base")
        with pytest.raises(FusionError, match=r"num_hidden_layers=3"):
            read_plan(tmp_path / "fusion", str(tmp_path / "base"))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
    def test_files_have_the_digest_of_the_model(self, tmp_path, dtype, shard_size):
        tiny_model("qwen3", tie_word_embeddings=True).save_pretrained(tmp_path, max_shard_size=shard_size)
        loaded = load_base(str(tmp_path), BaseOptions(dtype=dtype))
        empty = load_empty_base(str(tmp_path), BaseOptions())
        assert files_digest(tmp_path, empty, dtype) == base_record(loaded).digest

    def test_a_base_of_other_weights_is_refused(self, world, tmp_path):
        save(world, tmp_path / "fusion", "average")
        tiny_model("llama", seed=7).save_pretrained(tmp_path / "base")
        with pytest.raises(FusionError, match=r"has the shape of .*, but other weights"):
            read_plan(tmp_path / "fusion", str(tmp_path / "base"))

    def test_files_of_other_names_are_not_compared(self, tmp_path):
        model = tiny_model("llama")
        assert files_digest(tmp_path, model, torch.float32) is None
        save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
        assert files_digest(tmp_path, model, torch.float32) is None

    def test_a_changed_adapter_is_refused(self, world, tmp_path):
        base = tiny_model("llama")
        adapter = save_adapter(base, tmp_path / "zh", ["q_proj"])
        save(world, tmp_path / "fusion", "average", zh=adapter)
        edit_config(adapter, lora_alpha=1)
        with pytest.raises(FusionError, match=r"not the one that the fusion '.*' was made with"):
            read_plan(tmp_path / "fusion", world.base)

    def test_the_digest_follows_what_was_learned_and_what_was_fused(self, world, tmp_path):
        digests = {
            SavedFusion.open(save(world, tmp_path / name, method, **adapters)).digest
            for name, method, adapters in (
                ("one", LoraFlow(), {}),
                ("two", LoraFlow(temperature=2.0), {}),
                ("three", Average(), {}),
                ("four", Average(), {"math": world.adapters["math"], "zh": world.adapters["zh"]}),
                ("five", Average(), {"zh": world.adapters["zh"], "math": world.adapters["math"]}),
            )
        }
        assert len(digests) == 5

    def test_a_pinned_digest_is_kept(self, world, tmp_path):
        plan = read_plan(save(world, tmp_path, "average"), world.base)
        check_digest(plan, plan.digest)
        check_digest(plan, None)
        with pytest.raises(FusionError, match=r"was changed on disk since the command was made"):
            check_digest(plan, "sha256:0000")


class TestChecks:
    def plan(self, method: Method, **changes: Any) -> FusionPlan:
        update = random_updates(HIDDEN, 8, (2,))[0]
        layers = ({"linear": (dataclasses.replace(update, **changes),)},)
        gates = {} if method.level == "query" or method.name == "base" else {"model": ConstantGate([1.0])}
        return FusionPlan(config=None, method=method, adapters=("zh",), layers=layers, gates=gates, digest="")

    @pytest.mark.parametrize("method", [LoraFlow(), Arrow(), Average(), Static({"zh": 1.0}), LearnedStatic()])
    def test_served(self, method):
        check_plan(self.plan(method), requests=False)
        check_plan(self.plan(method), requests=True)

    def test_whole_prompts_need_weights_of_requests(self):
        with pytest.raises(MethodError, match=r"'logo' weighs whole prompts.*Let each request bring its weights"):
            check_plan(self.plan(Logo()), requests=False)
        check_plan(self.plan(Logo()), requests=True)

    @pytest.mark.parametrize("requests", [False, True])
    def test_tokens_are_not_weighed_by_what_their_prompt_says(self, requests):
        with pytest.raises(MethodError, match=r"'ramole' weighs tokens by what the whole prompt says, which vLLM does"):
            check_plan(self.plan(Ramole(retrieve=1)), requests=requests)
        check_plan(self.plan(Ramole()), requests=requests)

    def test_the_base_alone_needs_no_fusion(self):
        with pytest.raises(MethodError, match=r"'base' is the base alone"):
            check_plan(self.plan(Base()), requests=False)
        check_plan(self.plan(Base()), requests=True)

    def test_mixed_parameters(self):
        with pytest.raises(MethodError, match=r"'lorahub' mixes parameters"):
            check_plan(self.plan(LoraHub()), requests=False)
        check_plan(self.plan(LoraHub(mixes="outputs")), requests=False)

    @pytest.mark.parametrize(("part", "what"), [("magnitude", "a DoRA"), ("bias", "trained with `lora_bias`")])
    def test_more_than_a_and_b(self, part, what):
        with pytest.raises(AdapterError, match=rf"Adapter 'zh' is {what}"):
            check_plan(self.plan(Average(), **{part: torch.ones(8)}), requests=False)

    def test_gates_of_other_packages(self):
        @dataclasses.dataclass(frozen=True)
        class Mine(Arrow):
            name = "mine"

        with pytest.raises(MethodError, match=r"'mine' is another package's"):
            check_plan(self.plan(Mine()), requests=False)
        check_plan(self.plan(Mine()), requests=False, unverified=True)

    def engine(self, **changes: Any) -> EngineSettings:
        return EngineSettings(**{"architecture": ARCHITECTURES[0], **changes})

    def test_a_plain_engine(self):
        check_engine(self.engine(), requests=False)
        check_engine(self.engine(prefix_caching=False), requests=True)
        check_engine(self.engine(salted=True), requests=True)

    @pytest.mark.parametrize(
        ("setting", "value", "message"),
        [
            ("runner", "pooling", "--runner pooling: only text generation"),
            ("latent_attention", True, "multi-head latent attention"),
            ("sleep_mode", True, "--enable-sleep-mode"),
            ("pipeline_parallel", 2, "--pipeline-parallel-size"),
            ("data_parallel", 2, "--data-parallel-size"),
            ("context_parallel", 2, "context parallelism"),
            ("expert_parallel", True, "--enable-expert-parallel"),
            ("micro_batches", True, "--enable-dbo"),
            ("speculative", True, "--speculative-config"),
            ("kv_transfer", True, "--kv-transfer-config"),
            ("cache_dir", True, "a compilation `cache_dir`"),
        ],
    )
    def test_settings_that_are_refused(self, setting, value, message):
        with pytest.raises(LoraflowError, match=f"A fusion cannot be served with {message}"):
            check_engine(self.engine(**{setting: value}), requests=False, unverified=True)

    def test_weights_of_requests_and_caches_of_prefixes(self):
        with pytest.raises(LoraflowError, match=r"Add --scheduler-cls .*SaltedScheduler.* or --no-enable-prefix-cach"):
            check_engine(self.engine(), requests=True)

    def test_weights_of_requests_and_the_other_runner(self):
        engine = self.engine(prefix_caching=False, v2_runner=True)
        with pytest.raises(LoraflowError, match=r"Set VLLM_USE_V2_MODEL_RUNNER=0"):
            check_engine(engine, requests=True)
        check_engine(engine, requests=True, unverified=True)
        check_engine(engine, requests=False)

    def test_other_bases(self):
        engine = self.engine(architecture="CohereForCausalLM")
        with pytest.raises(ArchitectureError, match=r"vLLM's CohereForCausalLM has not been compared"):
            check_engine(engine, requests=False)
        check_engine(engine, requests=False, unverified=True)


class TestGiven:
    def test_weights_for_all_layers(self):
        assert parse_weights({"code": 2, "zh": 0.5}, ADAPTERS, 2) == [[0.5, 0.0, 2.0]] * 2

    def test_weights_for_each_layer(self):
        assert parse_weights([{"zh": 1.0}, {}], ADAPTERS, 2) == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]

    def test_the_same_for_all(self):
        assert parse_weights("average", ADAPTERS, 2) == [[1 / 3] * 3] * 2

    def test_text(self):
        assert parse_weights('{"zh": 0.5}', ADAPTERS, 1) == [[0.5, 0.0, 0.0]]

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("{zh", r"is not valid JSON"),
            ([{"zh": 1.0}], r"`adapter_weights` is for 1 layers, but the base has 2"),
            ({"de": 1.0}, r"names the unknown adapter 'de'. Known: 'code', 'math', 'zh'"),
            ({"zh": float("nan")}, r"must be a finite number"),
            (0.5, r"must give weights by adapter name"),
            ([0.5, 0.5], r"must give weights by adapter name"),
        ],
    )
    def test_what_is_refused(self, value, message):
        with pytest.raises(MethodError, match=message):
            parse_weights(value, ADAPTERS, 2)

    def test_required(self):
        check_request(None, ADAPTERS, 2, required=False)
        check_request({KEY: {"zh": 1.0}}, ADAPTERS, 2, required=True)
        with pytest.raises(MethodError, match=r"brings no `adapter_weights`"):
            check_request({"other": 1}, ADAPTERS, 2, required=True)
        with pytest.raises(MethodError, match=r"unknown adapter"):
            check_request({KEY: {"de": 1.0}}, ADAPTERS, 2, required=False)

    @given(st.text(min_size=1))
    def test_names_carry_the_fusion(self, fusion):
        name = processor_name(fusion)
        assert fusion_of(name) == fusion
        assert name.count(":") == 1
        assert "." not in name.partition(":")[2]

    def test_other_names(self):
        assert fusion_of("package.module:Class") is None
        assert fusion_of("loraflow.serving.vllm.requests:RequestWeights") is None


class TestOptions:
    def test_the_rest_is_for_the_bases_own_loader(self):
        options, rest = FusionOptions.parse({"fusion": "f", "unverified": True, "num_threads": 4})
        assert options == FusionOptions("f", unverified=True)
        assert rest == {"num_threads": 4}

    @pytest.mark.parametrize("extra", [None, {}, {"fusion": 3}, "text"])
    def test_a_fusion_is_needed(self, extra):
        with pytest.raises(LoraflowError, match=r"needs a fusion"):
            FusionOptions.parse(extra)

    @pytest.mark.parametrize("extra", [{"digest": 1}, {"adapters": []}, {"load_format": None}, {"unverified": "yes"}])
    def test_wrong_kinds(self, extra):
        with pytest.raises(LoraflowError, match=r"in --model-loader-extra-config is of the wrong kind"):
            FusionOptions.parse({"fusion": "f", **extra})


class TestCommand:
    def test_it_serves_the_recorded_base(self, world, tmp_path):
        fusion = save(world, tmp_path / "my-fusion", LoraFlow())
        command = vllm_command(fusion, ["--port", "8001"])
        assert Path(command[0]).name == "vllm"
        assert command[1:5] == ["serve", world.base, "--load-format", "loraflow"]
        loader = json.loads(command[command.index("--model-loader-extra-config") + 1])
        assert loader == {"fusion": str(fusion.resolve()), "digest": SavedFusion.open(fusion).digest}
        assert command[command.index("--dtype") + 1] == "float32"
        assert command[command.index("--served-model-name") + 1] == "my-fusion"
        assert command[-2:] == ["--port", "8001"]
        assert "--logits-processors" not in command
        assert command[command.index("--middleware") + 1] == "loraflow.serving.vllm.fields.RefusedFields"
        assert "--scheduler-cls" not in command

    def test_the_callers_options_go_first(self, world, tmp_path):
        command = vllm_command(save(world, tmp_path, "average"), ["--dtype=bfloat16"])
        assert "--dtype" not in command
        assert command[-1] == "--dtype=bfloat16"

    @pytest.mark.parametrize(("method", "asked"), [(Logo(), False), (Average(), True)])
    def test_weights_of_requests_and_caches_that_know_them(self, world, tmp_path, method, asked):
        command = vllm_command(save(world, tmp_path, method), request_weights=asked)
        assert fusion_of(command[command.index("--logits-processors") + 1]) == str(tmp_path.resolve())
        assert command[command.index("--scheduler-cls") + 1] == SCHEDULER
        assert command[command.index("--middleware") + 1] == "loraflow.serving.vllm.fields.RequestFields"

    def test_other_places(self, world, tmp_path):
        command = vllm_command(
            save(world, tmp_path, "average"), base="/elsewhere", adapters={"zh": "/there"}, unverified=True
        )
        assert command[2] == "/elsewhere"
        loader = json.loads(command[command.index("--model-loader-extra-config") + 1])
        assert loader["adapters"] == {"zh": "/there"}
        assert loader["unverified"] is True

    @pytest.mark.parametrize("option", ["--load-format", "--model-loader-extra-config={}", "--logits-processors"])
    def test_what_is_composed_is_not_given(self, world, tmp_path, option):
        save(world, tmp_path, "average")
        with pytest.raises(LoraflowError, match=r"is composed from the fusion"):
            vllm_command(tmp_path, [option])

    def test_a_tokenizer_with_added_tokens_must_be_named(self, world, tmp_path):
        model = FusedModel.from_adapters(world.base, world.adapters, "average")
        model.added_tokens = {"<|im_end|>": TokenRecord(id=3)}
        model.save_pretrained(tmp_path)
        with pytest.raises(LoraflowError, match=r"lacks \('<\|im_end\|>'\), and vLLM .* `--tokenizer DIRECTORY`"):
            vllm_command(tmp_path)
        assert "--tokenizer" in vllm_command(tmp_path, ["--tokenizer", "there"])

    def test_a_base_in_memory_must_be_named(self, world, tmp_path):
        model = FusedModel.from_adapters(tiny_model("llama"), world.adapters, "average")
        model.save_pretrained(tmp_path)
        with pytest.raises(FusionError, match=r"does not know where its base model is"):
            vllm_command(tmp_path)


class TestChatTemplate:
    def render(self, prompt: PromptFormat, *messages: dict[str, str]) -> str:
        def refuse(message: str) -> None:
            raise ValueError(message)

        template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(chat_template(prompt))
        return template.render(messages=list(messages), raise_exception=refuse)

    CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"

    def test_the_tokenizers_own(self):
        assert chat_template(PromptFormat()) is None

    def test_a_system_prompt_is_put_first(self):
        prompt = PromptFormat(chat_template=self.CHAT, system_prompt='Say "да" 😀\n{{ x }}')
        user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "Else"}
        assert self.render(prompt, user) == '<system>Say "да" 😀\n{{ x }}<user>hi'
        assert self.render(prompt, system, user) == "<system>Else<user>hi"

    def test_plain_prompts_refuse_conversations(self):
        with pytest.raises(ValueError, match=r"Use /v1/completions, with prompts of the form Q: \{prompt\}\nA:"):
            self.render(PromptFormat(template="Q: {prompt}\nA:"), {"role": "user", "content": "hi"})


@pytest.fixture
def stub(monkeypatch):
    """Stands for vLLM, as far as what it finds by name imports it."""
    formats: dict[str, type] = {}
    seam = ModuleType("loraflow.serving.vllm.seam")
    names = ("LinearBase", "LoadConfig", "ModelConfig", "VllmConfig", "BatchUpdate", "BaseModelLoader", "Request")
    classes = (*names, "LogitsProcessor", "LogitsProcessorV2", "Scheduler", "AsyncScheduler")
    vars(seam).update({name: type(name, (), {}) for name in classes})
    seam.MoveDirectionality = SimpleNamespace(SWAP="swap")
    seam.init_logger = logging.getLogger
    seam.register_model_loader = lambda name: lambda loader: formats.setdefault(name, loader)
    seam.engine_settings = seam.get_model_loader = seam.request_starts = None
    ours = [f"loraflow.serving.vllm.{name}" for name in ("requests", "loader", "scheduler")]
    for name in ours:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, seam.__name__, seam)
    yield formats
    for name in ours:
        sys.modules.pop(name, None)


class TestNamesThatVllmIsGiven:
    def test_the_entry_point_registers_the_load_format(self, stub):
        (found,) = [one for one in entry_points(group="vllm.general_plugins") if one.name == "loraflow"]
        assert found.value == "loraflow.serving.vllm:register"
        found.load()()
        assert {name: (one.__module__, one.__name__) for name, one in stub.items()} == {
            "loraflow": ("loraflow.serving.vllm.loader", "FusionLoader")
        }

    @pytest.mark.parametrize(("method", "required"), [(Average(), False), (Logo(), True)], ids=["average", "logo"])
    def test_a_processors_name_is_a_class_that_knows_its_fusion(self, stub, world, tmp_path, method, required):
        name = processor_name(str(save(world, tmp_path, method)))
        module, _, attribute = name.partition(":")
        assert module == "loraflow.serving.vllm.requests"
        assert attribute == f"For_{str(tmp_path).encode().hex()}"
        processor = getattr(importlib.import_module(module), attribute)
        assert (processor.__module__, processor.__name__) == (module, attribute)
        assert processor.fusion == str(tmp_path)
        assert (processor.adapters, processor.layers, processor.required) == (ADAPTERS, 3, required)
        with pytest.raises(AttributeError, match="has no attribute 'Other'"):
            _ = importlib.import_module(module).Other

    def test_requests_are_followed_as_they_come_and_go(self, stub, world, tmp_path):
        name = processor_name(str(save(world, tmp_path, Average())))
        requests = importlib.import_module(name.partition(":")[0])
        table, model = RequestTable(requests=3, tokens=8, layers=2, adapters=ADAPTERS), nn.Module()
        config = SimpleNamespace(use_v2_model_runner=False, load_config=SimpleNamespace(load_format="loraflow"))
        requests.install_table(model, table, config)
        processor = getattr(requests, name.partition(":")[2])(config)
        extra = [None, {KEY: {"zh": 0.5}}, {KEY: {"zh": 2.0}}]
        added = [(place, SimpleNamespace(extra_args=one), None, None) for place, one in enumerate(extra)]
        processor.update_state(SimpleNamespace(removed=[], added=added, moved=[(0, 1, "swap")]))
        table.locate(torch.tensor([0, 2, 3, 4]), 5)
        given = torch.full((5, 3), 9.0)
        assert table.settle(given, 0, 5)[:, 0].tolist() == [0.5, 0.5, 9.0, 2.0, 9.0]
        processor.update_state(SimpleNamespace(removed=[0], added=[], moved=[(2, 0, "one way")]))
        table.locate(torch.tensor([0, 1, 2]), 2)
        assert table.settle(given[:2], 1, 2)[:, 0].tolist() == [2.0, 9.0]

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_prefixes_are_hashed_with_the_weights(self, stub, monkeypatch, asynchronous):
        module, _, attribute = SCHEDULER.rpartition(".")
        seam, waiting = sys.modules["loraflow.serving.vllm.seam"], []
        for kind in (seam.Scheduler, seam.AsyncScheduler):
            kind.__init__ = lambda self, vllm_config, block_size: None
            kind.add_request = lambda self, request: waiting.append((type(self), request))
        config = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=asynchronous))
        scheduler = getattr(importlib.import_module(module), attribute)(vllm_config=config, block_size=1)
        assert isinstance(scheduler, seam.AsyncScheduler if asynchronous else seam.Scheduler)

        class Asked:
            def __init__(self, weights, salt=None):
                self.sampling_params = SimpleNamespace(extra_args={KEY: weights} if weights is not None else None)
                self.cache_salt, self.block_hashes = salt, []
                self.update_block_hashes()

            def update_block_hashes(self):
                self.block_hashes.append(f"prompt under {self.cache_salt}")

        def hashed(*args):
            request = Asked(*args)
            scheduler.add_request(request)
            assert waiting.pop()[1] is request
            return request.block_hashes

        assert hashed(None) == ["prompt under None"]
        assert hashed(None, "own") == hashed(None, "own") != hashed(None, "other")
        # A salt that is written as that of weights is.
        (of_weights,) = hashed({"zh": 1.0})
        assert hashed(None, of_weights.removeprefix("prompt under ")) != [of_weights]
        mixes = [hashed(m) for m in ({}, {"zh": 1.0}, {"zh": 0.5}, [{"zh": 1.0}], '{"zh": 1.0}')]
        mixes += [hashed({"zh": 1.0}, "own"), hashed(None)]
        assert len({text for (text,) in mixes}) == len(mixes)
        assert hashed({"zh": 1.0, "math": 2}) == hashed({"math": 2, "zh": 1.0})


def test_the_rest_of_loraflow_imports_neither_vllm_nor_the_plug_in():
    code = (
        "import sys, loraflow, loraflow.cli, loraflow.model, loraflow.serving, loraflow.training;"
        "print([m for m in sys.modules if m.split('.')[0] == 'vllm' or m.startswith('loraflow.serving.vllm')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

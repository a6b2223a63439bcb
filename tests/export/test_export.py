"""A fusion as one PEFT adapter: PEFT gives the fusion's logits with it, or the export says what it costs or why not."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

from loraflow import AdapterCore, Arrow, Average, FusedModel, LearnedStatic, LoraFlow, LoraHub, QaFlora, Static
from loraflow.adapters import load_adapter
from loraflow.core.reference import merged_weight
from loraflow.core.stack import dense_weight
from loraflow.errors import LoraflowError, MethodError, StorageError
from loraflow.examples import parse_examples
from loraflow.export import Compression, ExportReport, constant_weights, export_peft
from loraflow.export.files import rank_pattern, target_modules
from loraflow.training import mean_loss
from loraflow.training.data import tokenize
from tests.tiny import (
    byte_tokenizer,
    edit_tensors,
    peft_model,
    random_ids,
    relative_error,
    save_adapter,
    set_random_gates,
    tiny_model,
)

DOUBLE = torch.float64
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
KINDS = {"plain": {}, "rslora": {"use_rslora": True}, "bias": {"lora_bias": True}, "dora": {"use_dora": True}}


def double(architecture="llama", **changes):
    return tiny_model(architecture, DOUBLE, **changes)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Three plain adapters of different ranks and targets, and a DoRA and one with biases."""
    root, base = tmp_path_factory.mktemp("adapters"), tiny_model()
    save_adapter(base, root / "zh", ["q_proj", "up_proj"], seed=1)
    save_adapter(base, root / "math", ["q_proj", "v_proj"], r=2, use_rslora=True, seed=2)
    save_adapter(base, root / "code", ["down_proj", "o_proj"], r=3, seed=3, layers_to_transform=[0, 2])
    save_adapter(base, root / "dora", ["q_proj", "o_proj"], r=3, use_dora=True, seed=4)
    save_adapter(base, root / "bias", ["q_proj", "up_proj"], r=2, lora_bias=True, seed=5)
    return root


def fuse(adapters, names=("zh", "math", "code"), method="average", base=None) -> FusedModel:
    return FusedModel.from_adapters(base or double(), {name: adapters / name for name in names}, method)


@torch.no_grad()
def check_export(model: FusedModel, base, directory: Path, tolerance=1e-9, dtype=DOUBLE, **options) -> ExportReport:
    """Export, load with PEFT on a fresh base, and compare logits."""
    ids = random_ids()
    expected = model(ids).logits
    report = export_peft(model, directory, dtype=dtype, **options)
    assert relative_error(expected, base(ids).logits) > 1e-3, "the adapters do nothing"
    assert relative_error(peft_model(base, str(directory))(ids).logits, expected) < tolerance
    assert torch.equal(model(ids).logits, expected)
    return report


def config_of(directory) -> dict:
    return json.loads((directory / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("zh", ["zh"]),
        ("average", ["zh", "math", "code"]),
        (Static({"zh": 0.4, "code": -1.5}), ["zh", "code"]),
        (Static([{"zh": 1.0}, {"math": 0.5, "zh": 0.2}, {"code": 2.0}]), ["zh", "math", "code"]),
        (LearnedStatic("task"), ["zh", "math", "code"]),
        (LearnedStatic("layer"), ["zh", "math", "code"]),
        (LearnedStatic("module"), ["zh", "math", "code"]),
        (LoraHub(), ["zh", "math", "code"]),
        (LoraHub("outputs"), ["zh", "math", "code"]),
        (AdapterCore("zh"), ["zh", "math", "code"]),
    ],
    ids=str,
)
def test_constant_fusions_are_one_adapter(adapters, tmp_path, method, expected):
    model = fuse(adapters, method=method)
    if model.method.learns:
        set_random_gates(model)
    report = check_export(model, double(), tmp_path / "out")
    assert set(report.adapters) == set(expected)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md")
    }
    config = config_of(tmp_path / "out")
    assert config["lora_alpha"] == config["r"] == report.rank
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["inference_mode"]
    assert report.vllm.startswith("vLLM can load it: --enable-lora --max-lora-rank 8 ")


def test_float32_and_half_precisions(adapters, tmp_path):
    check_export(fuse(adapters, base=tiny_model()), tiny_model(), tmp_path / "out", 1e-5, torch.float32)
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {torch.float32}
    check_export(fuse(adapters, base=tiny_model()), tiny_model(), tmp_path / "half", 0.02, torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "half" / "adapter_model.safetensors").values()} == {torch.bfloat16}


@st.composite
def adapter_settings(draw):
    return {
        "targets": draw(st.lists(st.sampled_from(TARGETS), min_size=1, max_size=3, unique=True)),
        "r": draw(st.integers(1, 5)),
        "lora_alpha": draw(st.integers(1, 9)),
        **KINDS[draw(st.sampled_from(sorted(KINDS)))],
    }


@settings(max_examples=15, deadline=None)
@given(
    chosen=st.lists(adapter_settings(), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([-0.7, 0.0, 0.3, 1.0]), min_size=3, max_size=3),
)
def test_any_ranks_targets_kinds_and_weights(tmp_path_factory, chosen, weights):
    root, base = tmp_path_factory.mktemp("any"), tiny_model(num_hidden_layers=2)
    sources = {f"a{i}": save_adapter(base, root / f"a{i}", seed=i, **kind) for i, kind in enumerate(chosen)}
    given_weights = dict(zip(sources, weights, strict=False))
    model = FusedModel.from_adapters(double(num_hidden_layers=2), sources, Static(given_weights))
    if not any(given_weights.values()):
        with pytest.raises(MethodError, match="Every fusion weight is 0"):
            export_peft(model, root / "out")
        return
    used = [kind for kind, weight in zip(chosen, given_weights.values(), strict=True) if weight]
    uses_dora, lora_bias = (any(key in kind for kind in used) for key in ("use_dora", "lora_bias"))
    if uses_dora and lora_bias:
        with pytest.raises(LoraflowError, match="PEFT knows no adapter with both"):
            export_peft(model, root / "out")
        return
    report = check_export(model, double(num_hidden_layers=2), root / "out")
    assert (report.uses_dora, report.lora_bias) == (uses_dora, lora_bias)
    assert report.modules == 2 * len({target for kind in used for target in kind["targets"]})


@pytest.mark.parametrize("kind", KINDS)
def test_conv1d(tmp_path, kind):
    base = tiny_model("gpt2")
    sources = {
        "attention": save_adapter(base, tmp_path / "a", ["attn.c_proj", "c_fc"], seed=1, **KINDS[kind]),
        "all": save_adapter(base, tmp_path / "b", ["c_attn", "attn.c_proj"], r=2, seed=2),
    }
    model = FusedModel.from_adapters(double("gpt2"), sources, {"attention": 0.7, "all": -0.4})
    check_export(model, double("gpt2"), tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["fan_in_fan_out"]
    # c_proj alone would hit the MLP's too.
    assert "transformer.h.0.attn.c_proj" in config["target_modules"]


@pytest.mark.parametrize("architecture", ["opt", "gpt_neox", "phi3"])
def test_other_architectures(tmp_path, architecture):
    base = tiny_model(architecture)
    sources = {"a": save_adapter(base, tmp_path / "a", seed=1), "b": save_adapter(base, tmp_path / "b", seed=2, r=2)}
    check_export(
        FusedModel.from_adapters(double(architecture), sources, "average"), double(architecture), tmp_path / "o"
    )


@pytest.mark.parametrize("weights", [{"dora": 1.0}, {"dora": -0.8, "zh": 0.5}, {"dora": 0.5, "zh": 0.5, "math": 2.0}])
def test_dora_is_one_dora(adapters, tmp_path, weights):
    model = fuse(adapters, ("dora", "math", "zh"), weights)
    report = check_export(model, double(), tmp_path / "out")
    assert report.uses_dora
    assert report.vllm == "vLLM cannot load it: it does not support DoRA. PEFT can."


def test_dora_in_float32(adapters, tmp_path):
    model = fuse(adapters, ("dora", "zh"), base=tiny_model())
    check_export(model, tiny_model(), tmp_path / "out", 1e-5, torch.float32)


def test_peft_knows_no_dora_with_biases(adapters, tmp_path):
    with pytest.raises(LoraflowError, match="PEFT knows no adapter with both"):
        export_peft(fuse(adapters, ("dora", "bias")), tmp_path / "out")


def test_dora_of_weight_zero_leaves_a_plain_adapter(adapters, tmp_path):
    report = check_export(fuse(adapters, ("dora", "zh"), "zh"), double(), tmp_path / "out")
    assert not report.uses_dora
    assert config_of(tmp_path / "out")["target_modules"] == ["q_proj", "up_proj"]


def test_biases_are_added_up(adapters, tmp_path):
    report = check_export(fuse(adapters, ("bias", "math"), {"bias": 0.5, "math": 2.0}), double(), tmp_path / "out")
    assert report.vllm == "vLLM cannot load it: it does not support adapters with biases (`lora_bias`). PEFT can."
    biases = [k for k in load_file(tmp_path / "out" / "adapter_model.safetensors") if k.endswith("lora_B.bias")]
    assert len(biases) == report.modules == 9


def test_biases_are_weighted_once_where_parameters_are_mixed(adapters, tmp_path):
    model = fuse(adapters, ("bias", "math"), LoraHub())
    set_random_gates(model)
    report = check_export(model, double(), tmp_path / "out")
    # Sums of matrices, not concatenations.
    assert report.rank == 2


def test_weight_zero_takes_no_room(adapters, tmp_path):
    report = check_export(
        fuse(adapters, method=Static([{"zh": 1}, {"zh": 1, "math": 1}, {}])), double(), tmp_path / "o"
    )
    config = config_of(tmp_path / "o")
    assert report.modules == 5
    assert report.rank == 6
    assert config["rank_pattern"] == {"model.layers.0.self_attn.q_proj": 4, "v_proj": 2, "up_proj": 4}
    assert config["target_modules"] == [
        *("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"),
        *("model.layers.1.self_attn.v_proj", "model.layers.1.mlp.up_proj"),
    ]
    assert not any("layers.2" in key for key in load_file(tmp_path / "o" / "adapter_model.safetensors"))


def test_the_export_can_be_fused_again(adapters, tmp_path):
    model = fuse(adapters)
    export_peft(model, tmp_path / "out", dtype=DOUBLE)
    again = FusedModel.from_adapters(double(), {"one": tmp_path / "out"}, "one")
    assert relative_error(again(random_ids()).logits, model(random_ids()).logits) < 1e-9
    assert load_adapter("one", tmp_path / "out").config.base_model_name_or_path == (model.base_record.path or None)


@pytest.mark.parametrize("names", [("zh", "math", "code"), ("dora", "math", "zh")])
def test_rank_and_its_error(adapters, tmp_path, names):
    model, base = fuse(adapters, names), double()
    full = export_peft(model, tmp_path / "full", dtype=DOUBLE)
    same = check_export(model, double(), tmp_path / "same", rank=full.rank)
    assert same.compression is not None
    assert same.compression == Compression(0.0, same.compression.worst_module, 0.0, full.rank)

    report = export_peft(model, tmp_path / "small", rank=2, dtype=DOUBLE)
    assert report.rank == 2
    exact, small = (load_adapter("x", tmp_path / name).modules for name in ("full", "small"))
    cut, norm, each = 0.0, 0.0, {}
    for name, module in exact.items():
        weight = dense_weight(base.get_submodule(name)).double()
        scale = torch.ones(len(weight)).double()
        if module.magnitude is not None:
            scale = module.magnitude / (weight + module.lora_B @ module.lora_A).norm(dim=1)
        update, kept = ((scale[:, None] * (m.lora_B @ m.lora_A)) for m in (module, small[name]))
        each[name] = ((update - kept).norm() / update.norm()).item()
        # No update of that rank is nearer.
        assert each[name] == pytest.approx((torch.linalg.svdvals(update)[2:].norm() / update.norm()).item(), abs=1e-9)
        cut, norm = cut + (update - kept).square().sum().item(), norm + update.square().sum().item()
        # What DoRA does to the base's own output is not compressed.
        changed = merged_weight(weight, [small[name]], [1.0])
        assert torch.allclose(changed, scale[:, None] * weight + kept, atol=1e-9)
    assert report.compression is not None
    assert report.compression.error == pytest.approx((cut / norm) ** 0.5)
    assert report.compression.worst_error == pytest.approx(max(each.values()))
    assert report.compression.worst_module == max(each, key=each.__getitem__)
    assert "compressed to rank 2" in (tmp_path / "small" / "README.md").read_text()


def test_rank_is_exact_where_the_update_has_no_more(adapters, tmp_path):
    shutil.copytree(adapters / "zh", tmp_path / "again")
    model = FusedModel.from_adapters(double(), {"zh": adapters / "zh", "again": tmp_path / "again"}, "average")
    report = check_export(model, double(), tmp_path / "out", rank=4)
    assert report.rank == 4
    assert report.compression is not None
    assert report.compression.error < 1e-7


@pytest.fixture
def trained(adapters):
    """A dynamic fusion with random gates, and a tokenizer; `make(method)`."""

    def make(method, names=("zh", "math", "code")):
        base = double(vocab_size=259)
        sources = {name: adapters / name for name in names}
        model = FusedModel.from_adapters(base, sources, method, tokenizer=byte_tokenizer())
        set_random_gates(model)
        return model

    return make


EXAMPLES = [
    {"prompt": "1 2", "completion": " 3 4"},
    {"prompt": "5 6 7 8", "completion": "9"},
    {"prompt": "x", "completion": "yz"},
]


def quiet() -> Console:
    return Console(file=io.StringIO())


def token_rows(model):
    return tokenize(parse_examples(EXAMPLES), model.tokenizer, model.prompt, 128)


@pytest.mark.parametrize(
    "method", [LoraFlow("step"), LoraFlow("layer"), LoraFlow("module"), Arrow(), QaFlora()], ids=str
)
def test_mean_weights(trained, tmp_path, method):
    model = trained(method)
    rows = token_rows(model)
    weights = mean_by_hand(model, rows)
    dynamic = mean_loss(model, rows, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"mean_weights_on": EXAMPLES, "dtype": DOUBLE, "console": quiet()}
    report = export_peft(model, tmp_path / "out", batch_size=2, **options)
    assert model.method is method
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    base, ids = double(vocab_size=259), random_ids()
    peft = peft_model(base, str(tmp_path / "out"))
    found = peft(ids).logits
    with model.using(LearnedStatic("module")):
        for name, gate in model.gates.items():
            gate.weights.data = weights[name]
        # Gates give their weights in float32 while a trace is taken.
        assert relative_error(found, model(ids).logits) < 1e-6
        constant = mean_loss(model, rows, 1)
    assert report.cost is not None
    assert report.cost.examples == 3
    assert report.cost.truncated == []
    assert report.cost.dynamic_loss == pytest.approx(dynamic, rel=1e-5)
    assert report.cost.exported_loss == pytest.approx(constant, rel=1e-5)
    assert abs(report.cost.exported_loss - report.cost.dynamic_loss) > 1e-6
    assert f"{dynamic:.4f} with the fusion" in (tmp_path / "out" / "README.md").read_text()


def mean_by_hand(model, rows):
    """One example at a time, without padding."""
    sums, count = {}, 0
    for row in rows.rows:
        ids = torch.tensor([row.input_ids])
        prompt = row.labels.count(-100)
        if model.method.level == "query":
            per_layer = model.weigh(ids[:, :prompt]).double()[:, None]
            modules = {}
        else:
            traced = model.trace(ids)
            per_layer, modules = traced.weights.double(), traced.module_weights
        for name in model.attachment.sites["module"]:
            weights = modules.get(name, per_layer[:, :, int(name.split(".")[1])])[0].double()
            sums[name] = sums.get(name, 0) + weights.sum(dim=0)
        count += len(weights)
    return {name: total / count for name, total in sums.items()}


@pytest.mark.parametrize("names", [("dora", "math", "zh"), ("bias", "zh")])
def test_the_cost_is_that_of_what_is_saved(trained, tmp_path, names):
    model = trained(LoraFlow(), names)
    options = {"mean_weights_on": EXAMPLES, "dtype": torch.bfloat16, "console": quiet()}
    report = export_peft(model, tmp_path / "out", rank=1, **options)
    rows = token_rows(model)
    saved = FusedModel.from_adapters(double(vocab_size=259), {"x": tmp_path / "out"}, "x")
    assert report.cost is not None
    assert report.cost.exported_loss == pytest.approx(mean_loss(saved, rows, 2), rel=1e-6)


def test_dynamic_fusions_are_refused(adapters, tmp_path, trained):
    model = fuse(adapters, method=LoraFlow())
    with pytest.raises(MethodError, match=r"'lora-flow' weighs every token anew.*`mean_weights_on=examples`"):
        export_peft(model, tmp_path / "out")
    with pytest.raises(MethodError, match="'qa-flora' weighs every prompt anew"):
        constant_weights(fuse(adapters, method=QaFlora()))
    with pytest.raises(MethodError, match=r"'average' are constant as they are\. Leave `mean_weights_on` out"):
        export_peft(trained(Average()), tmp_path / "out", mean_weights_on=EXAMPLES)
    with pytest.raises(LoraflowError, match="Text needs a tokenizer"):
        export_peft(model, tmp_path / "out", mean_weights_on=EXAMPLES)
    assert not (tmp_path / "out").exists()


def test_nothing_to_export(adapters, tmp_path):
    with pytest.raises(MethodError, match="The method in use is 'base', which has no fusion weights"):
        export_peft(fuse(adapters, method="base"), tmp_path / "out")
    with pytest.raises(MethodError, match=r"Every fusion weight is 0: the fusion is its base alone"):
        export_peft(fuse(adapters, method=LoraHub()), tmp_path / "out")
    with pytest.raises(LoraflowError, match=r"`rank` \(=0\) must be at least 1"):
        export_peft(fuse(adapters), tmp_path / "out", rank=0)
    model = fuse(adapters)
    model.unload()
    with pytest.raises(LoraflowError, match="were taken out"):
        export_peft(model, tmp_path / "out")


def test_a_dora_that_takes_the_base_away_is_refused(adapters, tmp_path):
    base = double()
    save_adapter(tiny_model(), tmp_path / "dora", ["q_proj"], use_dora=True)
    update = load_adapter("dora", tmp_path / "dora").modules["model.layers.1.self_attn.q_proj"]
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector"
    delta = update.scaling * update.lora_B.double() @ update.lora_A.double()
    norm = (base.model.layers[1].self_attn.q_proj.weight + delta).norm(dim=1)[3]
    # c = 0.5 at one output: twice that adapter makes 1 + 2 (c - 1) = 0 there.
    edit_tensors(tmp_path / "dora", lambda tensors: tensors[key].__setitem__(3, 0.5 * norm.item()))
    model = FusedModel.from_adapters(base, {"dora": tmp_path / "dora"}, {"dora": 2.0})
    with pytest.raises(
        LoraflowError, match=r"layers\.1\.self_attn\.q_proj' cannot be written as one DoRA .*output 3 a"
    ):
        export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_outside_the_precision_are_refused(adapters, tmp_path):
    model = fuse(adapters, method={"zh": 1e9})
    with pytest.raises(LoraflowError, match="has values that float16 cannot represent"):
        export_peft(model, tmp_path / "out", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept(adapters, tmp_path):
    model, out = fuse(adapters), tmp_path / "out"
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoraflowError, match="file is a file"):
        export_peft(model, tmp_path / "file")
    out.mkdir()
    (out / "notes.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(LoraflowError, match=r"holds 'notes.txt' and no adapter"):
            export_peft(model, out, overwrite=overwrite)
    (out / "notes.txt").unlink()
    export_peft(model, out)
    with pytest.raises(LoraflowError, match=r"holds an adapter already.*`overwrite=True`"):
        export_peft(fuse(adapters, method="zh"), out)
    (out / "notes.txt").write_text("x")
    check_export(fuse(adapters, method="zh"), double(), out, overwrite=True)
    assert (out / "notes.txt").read_text() == "x"
    with pytest.raises(LoraflowError, match="is the adapter 'zh' of this fusion"):
        export_peft(model, adapters / "zh", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "out"}


def test_a_crash_leaves_no_half_adapter(adapters, tmp_path, monkeypatch):
    model, out = fuse(adapters), tmp_path / "out"
    export_peft(model, out)
    replace = os.replace

    def crash(source, target):
        if Path(target) == out / "README.md":
            raise OSError("crash")
        replace(source, target)

    monkeypatch.setattr("loraflow.export.files.os.replace", crash)
    with pytest.raises(StorageError, match="crash"):
        export_peft(fuse(adapters, method="zh"), out, overwrite=True)
    assert not (out / "adapter_config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    check_export(fuse(adapters, method="zh"), double(), out, overwrite=True)


def test_target_modules_hit_no_other():
    known = ["x.0.attn.c_proj", "x.0.mlp.c_proj", "x.0.mlp.fc", "x.1.attn.c_proj", "x.1.mlp.fc", "tower.x.0.mlp.c_proj"]
    assert target_modules(["x.0.mlp.fc", "x.1.mlp.fc"], known) == ["fc"]
    assert target_modules(["x.0.attn.c_proj"], known) == ["x.0.attn.c_proj"]
    assert target_modules(["x.0.mlp.c_proj", "x.0.mlp.fc"], known) == r"x\.0\.mlp\.c_proj|x\.0\.mlp\.fc"


def test_rank_patterns_are_short_where_they_can_be():
    assert rank_pattern({"x.0.q": 4, "x.1.q": 4}) == {}
    assert rank_pattern({"x.0.q": 4, "x.1.q": 4, "x.0.v": 2, "x.1.v": 2}) == {"v": 2}
    assert rank_pattern({"x.0.q": 4, "x.1.q": 3}) == {"x.1.q": 3}


def test_what_vllm_can_load():
    def report(rank, **options):
        return ExportReport(Path("out"), ("a",), 1, rank, **{"uses_dora": False, "lora_bias": False, **options})

    assert report(9).vllm == "vLLM can load it: --enable-lora --max-lora-rank 16 --lora-modules name=out"
    assert "--max-lora-rank 512 " in report(512).vllm
    assert report(513).vllm == "vLLM cannot load it: its rank is 513, the limit 512. Export a lower rank."


def test_base_is_named_as_the_fusion_knows_it(adapters, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = FusedModel.from_adapters(tmp_path / "base", {"zh": adapters / "zh"}, "zh")
    export_peft(model, tmp_path / "out")
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == str((tmp_path / "base").resolve())
    # A path of one machine is nothing for a card.
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()

"""A catalog: many models in one, each of which answers as it does alone."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
import torch

from loraflow import FusedModel, LoraFlow
from loraflow.errors import AdapterError, FusionError, LoraflowError, MethodError
from loraflow.methods import (
    AdapterCore,
    Arrow,
    LearnedStatic,
    LoraHub,
    LoraRetriever,
    QaFlora,
    Static,
    make_method,
)
from loraflow.saved.fusion import SavedFusion
from loraflow.serving.catalog import Catalog
from loraflow.serving.config import EngineLimits
from tests.serving.worlds import alone, job, running, send
from tests.tiny import byte_tokenizer, edit_tensors, random_ids, save_adapter, set_random_gates, tiny_model

LIMITS = EngineLimits(requests=8, batch_tokens=32, cache_tokens=1024, page_tokens=16)
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
# Subsets and orders of four adapters; "zh" is another one in the last of them.
FUSIONS = {
    "layers": (["zh", "math"], LoraFlow("layer")),
    "linears": (["math", "zh"], LoraFlow("module")),
    "steps": (["code", "zh", "math"], LoraFlow("step")),
    # Most linears of the model are none of this one's.
    "some-linears": (["math"], LearnedStatic("module")),
    "core": (["math", "code"], AdapterCore("math")),
    "searched": (["math", "code"], LoraHub()),
    "arrows": (["code", "zh"], Arrow(1)),
    "queries": (["math", "zh"], QaFlora()),
    "collision": (["zh"], LoraFlow("layer")),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base, adapters of unequal targets, and saved fusions of them."""
    root = tmp_path_factory.mktemp("catalog")
    base = tiny_model(vocab_size=259, max_position_embeddings=256)
    base.save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    save_adapter(base, root / "zh", seed=1)
    save_adapter(base, root / "math", ATTENTION, seed=2, r=2)
    save_adapter(base, root / "code", MLP, seed=3, r=3)
    save_adapter(base, root / "other" / "zh", ATTENTION, seed=4)
    for index, (name, (adapters, method)) in enumerate(FUSIONS.items()):
        place = root / "other" if name == "collision" else root
        model = FusedModel.from_adapters(root / "base", {one: place / one for one in adapters}, method)
        set_random_gates(model, index)
        model.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def catalog(root):
    return Catalog.open(None, None, {name: str(root / name) for name in FUSIONS})


def answers(catalog, cases):
    """What each served model answers, all in one batch."""
    with running(catalog.model, LIMITS) as engine:
        heard = [send(engine, job(prompt, catalog.weigher(served, prompt), 12)) for served, prompt in cases]
        return [listener.ids() for listener in heard]


def prompt(seed=0):
    return [3 + int(token) for token in random_ids(1, 37, seed=seed)[0]]


# ---- Answers -------------------------------------------------------------------------------------------------------


def test_each_fusion_answers_as_it_does_alone(root, catalog):
    cases = [(catalog.find(name), prompt(seed)) for seed in (0, 1) for name in FUSIONS]
    found = answers(catalog, cases)
    for (served, ids), answered in zip(cases, found, strict=True):
        model = FusedModel.from_pretrained(root / served.id)
        assert answered == alone(model, ids, new=12), served.id
        assert list(served.adapters) == [
            "collision.zh" if served.id == "collision" else one for one in model.adapter_names
        ]
    assert len({tuple(answered) for answered in found}) == len(cases)


def test_adapters_on_top_and_under_other_names_answer_as_alone(root, tmp_path):
    topped = make_method("lora-flow", {"granularity": "module", "on_top": ["math"]})
    for name, adapters, method in (
        ("topped", {"zh": "zh", "math": "math"}, topped),
        ("static", {"code": "zh", "zh": "math"}, Static({"code": 0.7, "zh": 1.0})),
    ):
        model = FusedModel.from_adapters(root / "base", {own: root / one for own, one in adapters.items()}, method)
        set_random_gates(model)
        model.save_pretrained(tmp_path / name)
    fusions = {"layers": root / "layers", "topped": tmp_path / "topped", "static": tmp_path / "static"}
    catalog = Catalog.open(None, None, {name: str(path) for name, path in fusions.items()})
    found = answers(catalog, [(catalog.find(name), prompt()) for name in fusions])
    assert catalog.find("static").adapters == catalog.find("topped").adapters == ("zh", "math")
    assert found == [alone(FusedModel.from_pretrained(path), prompt(), new=12) for path in fusions.values()]


def test_what_a_request_retrieves_is_fused_for_it_alone(root, tmp_path):
    adapters = {name: save_adapter(tiny_model(vocab_size=259), tmp_path / name, seed=i) for i, name in enumerate("abc")}
    for mode in ("fusion", "mixture"):
        model = FusedModel.from_adapters(root / "base", adapters, LoraRetriever(mode, 2, center=False))
        model.gates["model"].set_samples(torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(3)).unbind())
        model.save_pretrained(tmp_path / mode)
    catalog = Catalog.open(None, None, {mode: str(tmp_path / mode) for mode in ("fusion", "mixture")})
    cases = [(catalog.find(name), prompt(seed)) for seed in (0, 1) for name in ("fusion", "base", "mixture", "a")]
    for (served, ids), answered in zip(cases, answers(catalog, cases), strict=True):
        own = FusedModel.from_pretrained(tmp_path / served.id) if served.id in ("fusion", "mixture") else model
        method = None if own is not model else served.id
        assert answered == alone(own, ids, method, 12), served.id


def test_the_base_and_adapters_answer_as_they_do_alone(root, catalog):
    model = FusedModel.from_adapters(
        root / "base", {**{name: root / name for name in ("zh", "math", "code")}, "o": root / "other" / "zh"}, "base"
    )
    names = {"base": "base", "zh": "zh", "math": "math", "code": "code", "collision.zh": "o"}
    found = answers(catalog, [(catalog.find(name), prompt()) for name in names])
    assert found == [alone(model, prompt(), method, 12) for method in names.values()]
    assert next(iter(catalog.served)) == "base"
    assert {name: served.kind for name, served in catalog.served.items()} == {
        "base": "base",
        **dict.fromkeys(("zh", "math", "code", "collision.zh"), "adapter"),
        **dict.fromkeys(FUSIONS, "fusion"),
    }
    assert {served.parent for served in catalog.served.values()} == {None, "base"}


def test_requests_may_bring_weights_and_methods(root, catalog):
    layers, code = catalog.find("layers"), catalog.find("code")
    weights = {"math": 0.7, "zh": -0.4}
    wide = {"code": 1.5, "collision.zh": 0.25}
    cases = [
        catalog.with_weights(layers, weights),
        catalog.with_weights(catalog.find("base"), wide),
        catalog.with_weights(code, wide),
        catalog.with_method(layers, "qa-flora", {}),
        catalog.with_method(layers, "arrow", {"top_k": 1}),
        catalog.with_method(layers, "average", {}),
        catalog.with_method(layers, "zh", {}),
        catalog.with_method(layers, "base", {}),
    ]
    assert [served.adapters for served in cases[:3]] == [("zh", "math"), *[("zh", "math", "code", "collision.zh")] * 2]
    assert [served.id for served in cases] == ["layers", "base", "code", *["layers"] * 5]
    own = FusedModel.from_pretrained(root / "layers")
    everything = {"zh": root / "zh", "code": root / "code", "collision.zh": root / "other" / "zh"}
    union = FusedModel.from_adapters(root / "base", everything, "base")
    found = answers(catalog, [(served, prompt()) for served in cases])
    assert found == [
        alone(own, prompt(), weights, 12),
        *[alone(union, prompt(), wide, 12)] * 2,
        *(alone(own, prompt(), method, 12) for method in (QaFlora(), Arrow(1), "average", "zh", "base")),
    ]


def test_methods_of_requests_are_made_once_and_not_kept_forever(catalog):
    layers = catalog.find("layers")
    first = catalog.with_method(layers, "arrow", {"temperature": 1.5})
    assert catalog.with_method(layers, "arrow", {"temperature": 1.5}).gates is first.gates
    for index in range(20):
        catalog.with_method(layers, "arrow", {"temperature": 2.0 + index})
        catalog.with_weights(layers, {"zh": index / 10})
    assert len(catalog._made) <= 16


# ---- Digests -------------------------------------------------------------------------------------------------------


def test_digests_tell_all_that_answers_depend_on(root, catalog):
    layers = catalog.find("layers")
    variants = [
        *catalog.served.values(),
        catalog.with_weights(layers, {"zh": 0.5}),
        catalog.with_weights(layers, {"zh": 0.25}),
        catalog.with_weights(catalog.find("base"), {"zh": 0.5}),
        catalog.with_method(layers, "arrow", {}),
        catalog.with_method(layers, "arrow", {"top_k": 1}),
    ]
    digests = [served.digest for served in variants]
    assert len(set(digests)) == len(digests)
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", digest) for digest in digests)
    # Neither the place, the name, nor what else is served is in it.
    moved = root / "moved" / "layers"
    shutil.copytree(root / "layers", moved)
    shutil.copytree(root / "zh", root / "moved" / "zh")
    shutil.copytree(root / "math", root / "moved" / "math")
    again = Catalog.open(root / "base", {"zh": str(root / "zh")}, {"renamed": str(moved)}, base_id="llama")
    assert again.find("renamed").digest == layers.digest
    assert again.find("zh").digest == catalog.find("zh").digest
    assert again.find("llama").digest == catalog.find("base").digest


def test_other_gates_have_another_digest(root, tmp_path):
    model = FusedModel.from_pretrained(root / "layers")
    set_random_gates(model, seed=99)
    model.save_pretrained(tmp_path / "layers")
    both = Catalog.open(None, None, {"one": str(root / "layers"), "two": str(tmp_path / "layers")})
    assert both.find("one").digest != both.find("two").digest
    assert both.model.adapter_names == ["zh", "math"]


# ---- What cannot be ------------------------------------------------------------------------------------------------


def test_unknown_names_are_told(catalog):
    with pytest.raises(LoraflowError, match=r"no model 'layer'\. Known: 'arrows', 'base', .* Did you mean 'layers'\?"):
        catalog.find("layer")
    layers = catalog.find("layers")
    with pytest.raises(MethodError, match="names the unknown adapter 'code'"):
        catalog.with_weights(layers, {"code": 1.0})
    for weight in (float("nan"), float("inf")):
        with pytest.raises(MethodError, match="finite"):
            catalog.with_weights(layers, {"zh": weight})
    with pytest.raises(MethodError, match=r"Unknown method 'arow'\. .*Did you mean 'arrow'"):
        catalog.with_method(layers, "arow", {})
    with pytest.raises(MethodError, match=r"has no parameter 'topk'\. .*Did you mean 'top_k'"):
        catalog.with_method(layers, "arrow", {"topk": 1})
    hint = "Ask for one of the models 'layers', 'linears', 'steps', 'collision'."
    with pytest.raises(
        MethodError, match=r"'lora-flow' learns, and a request cannot wait for that\. " + re.escape(hint)
    ):
        catalog.with_method(layers, "lora-flow", {})
    with pytest.raises(
        MethodError,
        match=r"'phatgoose' learns, and a request cannot wait for that\. Methods that learn nothing: 'arrow'",
    ):
        catalog.with_method(layers, "phatgoose", {})


def test_what_cannot_be_served_is_told(root, tmp_path):
    layers = {"layers": str(root / "layers")}
    with pytest.raises(LoraflowError, match=r"There is nothing to serve\. Give a fusion, or a base and adapters\."):
        Catalog.open(None, {}, {})
    with pytest.raises(LoraflowError, match=r"There are no adapters to serve\. Give `adapters=\.\.\.`, or a fusion\."):
        Catalog.open(root / "base")
    with pytest.raises(LoraflowError, match=r"Two models are called 'zh'\. Give each a name of its own\."):
        Catalog.open(None, None, {"zh": str(root / "layers")})
    with pytest.raises(LoraflowError, match="Two models are called 'layers'"):
        Catalog.open(None, None, layers, base_id="layers")
    other = tiny_model(vocab_size=259, max_position_embeddings=256, seed=8)
    other.save_pretrained(tmp_path / "other-base")
    byte_tokenizer().save_pretrained(tmp_path / "other-base")
    with pytest.raises(FusionError, match="base"):
        Catalog.open(tmp_path / "other-base", None, layers)

    homeless = shutil.copytree(root / "layers", tmp_path / "homeless")
    config = json.loads((homeless / "fusion_config.json").read_text())
    config["base"]["path"] = ""
    (homeless / "fusion_config.json").write_text(json.dumps(config))
    with pytest.raises(
        FusionError,
        match=r"The fusion 'lost' does not know where its base model is\. Give it as `base`: `base=\.\.\.`\.",
    ):
        Catalog.open(None, None, {"lost": str(homeless)})
    assert Catalog.open(root / "base", {"zh": str(root / "zh"), "math": str(root / "math")}, {"found": str(homeless)})


def test_a_changed_adapter_is_told(root, tmp_path):
    world = shutil.copytree(root, tmp_path / "world")
    edit_tensors(world / "zh", lambda tensors: next(iter(tensors.values())).mul_(2))
    with pytest.raises(FusionError, match=r"Adapter 'zh' \(.*\) is not the one that the fusion 'layers' was made with"):
        Catalog.open(None, None, {"layers": str(world / "layers")})
    with pytest.raises(AdapterError):
        Catalog.open(world / "base", {"nowhere": str(world / "nowhere")})


def test_gates_that_do_not_fit_are_told(root, catalog):
    message = "do not match the method of the fusion 'new': 'layers.0.bias' is missing, unknown or of another shape"
    with pytest.raises(FusionError, match=re.escape(message)):
        catalog._make("new", "fusion", "", ("zh",), LoraFlow("layer"), catalog.model.prompt)
    good = {
        f"{site}.{key}": value
        for site, gate in catalog.find("layers").gates.items()
        for key, value in gate.state_dict().items()
    }
    tensors = {**good, "layers.9.weight": torch.ones(1)}
    saved = dataclasses.replace(SavedFusion.open(root / "layers"), tensors=tensors)
    with pytest.raises(FusionError, match=r"'layers\.9\.weight' is missing, unknown"):
        catalog._make("new", "fusion", "", ("zh", "math"), LoraFlow("layer"), catalog.model.prompt, saved)
    assert "new" not in catalog.served


# ---- Names of adapters ---------------------------------------------------------------------------------------------


def refit(root, folder, seed):
    """The fusion "collision", made with another adapter "zh"."""
    save_adapter(tiny_model(vocab_size=259, max_position_embeddings=256), folder / "zh", ATTENTION, seed=seed)
    model = FusedModel.from_adapters(root / "base", {"zh": folder / "zh"}, LoraFlow("layer"))
    set_random_gates(model, seed)
    model.save_pretrained(folder / "fusion")
    return str(folder / "fusion")


def test_a_fusion_that_was_fitted_anew_is_never_answered_by_its_old_adapter(root, tmp_path):
    catalog = Catalog.open(root / "base", {"zh": str(root / "zh")})
    assert catalog.load("f", str(root / "collision")).adapters == ("f.zh",)
    catalog.withdraw("f")
    catalog.free()
    path = refit(root, tmp_path, seed=7)
    offered = catalog.served
    message = (
        "The adapter 'zh' of the fusion 'f' would be called 'f.zh', and another adapter is called so already. Unload "
        "that first, or give the fusion another name."
    )
    with pytest.raises(FusionError, match=re.escape(message)):
        catalog.load("f", path)
    assert catalog.served == offered
    # Both ways out.
    catalog.load("g", path)
    catalog.withdraw("g")
    catalog.withdraw("g.zh")
    catalog.withdraw("f.zh")
    catalog.free()
    served = catalog.load("f", path)
    assert served.adapters == ("f.zh",)
    assert answers(catalog, [(served, prompt())]) == [alone(FusedModel.from_pretrained(path), prompt(), new=12)]


def test_an_adapter_that_was_given_is_never_replaced_by_a_fusions(root):
    adapters = {"zh": str(root / "zh"), "f.zh": str(root / "math")}
    with pytest.raises(FusionError, match=r"would be called 'f\.zh', and another adapter is called so already"):
        Catalog.open(root / "base", adapters, {"f": str(root / "collision")})


def test_a_fusion_whose_adapter_is_called_like_another_model_changes_nothing(root):
    catalog = Catalog.open(root / "base", {"code": str(root / "code")}, base_id="zh")
    offered, adapters = catalog.served, catalog.model.adapter_names
    message = (
        "The fusion 'layers' has an adapter 'zh', and there is another model of that name. Unload that first, or give "
        "the adapter another name."
    )
    with pytest.raises(LoraflowError, match=re.escape(message)):
        catalog.load("layers", str(root / "layers"))
    assert (catalog.served, catalog.model.adapter_names) == (offered, adapters)

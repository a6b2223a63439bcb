"""Adapters of a bank in a model: loaded as they are used, exact, bounded in bytes, each call with its own versions."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading

import pytest
import torch

from loraflow import AdapterBank, FusedModel
from loraflow.adapters import load_adapter
from loraflow.errors import AdapterError, LoraflowError, MethodError
from tests.tiny import edit_config, save_adapter, tiny_model

IDS = torch.tensor([[5, 9, 2, 33, 7]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Adapters of many kinds for the tiny Llama, in float64."""
    folder, base = tmp_path_factory.mktemp("saved"), tiny_model().double()
    kinds = {
        "plain": {},
        "few": {"targets": ["q_proj", "v_proj"], "r": 3},
        "dora": {"use_dora": True, "r": 2},
        "biased": {"lora_bias": True, "r": 1},
        "rs": {"use_rslora": True, "r": 8, "lora_alpha": 16},
        "ranks": {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"v_proj": 3}},
        "twin": {},
    }
    for seed, (name, settings) in enumerate(kinds.items()):
        save_adapter(base, folder / name, seed=seed, **settings)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapters")


def both(folder, method="base", **options):
    """The fusion of a bank, and that of the same adapters in memory."""
    bank = AdapterBank(folder, **options)
    base = tiny_model().double()
    known = {name: folder / name for name in bank}
    return (
        bank,
        FusedModel.from_adapters(copy.deepcopy(base), bank, method),
        FusedModel.from_adapters(base, known, method),
    )


def logits(model, **options):
    with torch.no_grad():
        return model(IDS.expand(options.pop("rows", 1), -1), **options).logits


def assert_same(one, other, **options):
    torch.testing.assert_close(logits(one, **options), logits(other, **options), rtol=1e-9, atol=1e-9)


SEVERAL = {"dora": 0.4, "biased": -0.3, "few": 1.2}


def test_adapters_are_loaded_as_they_are_used_and_give_what_they_give_in_memory(folder):
    bank, model, whole = both(folder)
    assert_same(model, whole)
    assert bank.held_bytes == model.attachment.stock.nbytes == 0
    for method in (*bank, SEVERAL, {"plain": 0.5, "twin": 0.5}, {"plain": 0.0, "twin": 2.0}, "average"):
        with model.using(method), whole.using(method):
            assert_same(model, whole)
    rows = ["few", SEVERAL, "base", "dora", {"rs": 0.5, "ranks": 0.5}]
    assert_same(model, whole, rows=5, methods=rows)
    assert [adapter.digest for adapter in model.adapters] == [adapter.digest for adapter in whole.adapters]
    assert [adapter.ranks for adapter in model.adapters] == [adapter.ranks for adapter in whole.adapters]


@pytest.mark.parametrize("method", ["lora-flow", "arrow", "adapter-core"])
def test_methods_that_weigh_all_adapters_have_all_of_them(folder, method):
    _, model, whole = both(folder, method)
    whole.load_state_dict(model.state_dict())
    assert_same(model, whole)
    torch.testing.assert_close(model.trace(IDS).weights, whole.trace(IDS).weights)


@pytest.mark.parametrize("limit", ["all", "few"])
def test_methods_that_read_prompts_read_each_adapter_alone(folder, limit):
    _, model, whole = both(folder)
    if limit == "few":
        stock = model.attachment.stock
        stock.limit_bytes = max(stock.size_bytes((position,)) for position in stock.everything)
    weights = whole.weigh(IDS, method="qa-flora")
    torch.testing.assert_close(model.weigh(IDS, method="qa-flora"), weights, rtol=1e-9, atol=1e-9)


def test_gradients_of_weights_are_those_of_adapters_in_memory(folder):
    _, model, whole = both(folder, "learned-static")
    found = []
    for fused in (model, whole):
        fused(IDS, labels=IDS).loss.backward()
        found.append([parameter.grad for gate in fused.gates.values() for parameter in gate.parameters()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_what_was_used_longest_ago_leaves(folder):
    _, model, _ = both(folder)
    stock = model.attachment.stock
    one = stock.size_bytes((model.adapter_names.index("plain"),))
    stock.limit_bytes = 2 * one
    for method in ("plain", "twin", "few"):
        with model.using(method):
            logits(model)
        assert stock.nbytes <= 2 * one
    names = [[model.adapter_names[position] for position in active] for active in stock._kept]
    assert names == [["twin"], ["few"]] or names == [["few"]]
    with model.using({"plain": 1.0, "twin": 1.0}):
        logits(model)
        assert stock.nbytes == 2 * one


def test_the_bytes_of_parts_are_those_that_were_told(folder):
    _, model, _ = both(folder)
    stock = model.attachment.stock
    for position, name in enumerate(model.adapter_names):
        before = stock.nbytes
        stock.bring((position,))
        told = stock.size_bytes((position,))
        assert stock.nbytes - before == told, name
    before = stock.nbytes
    stock.bring(None)
    # DoRA's scale of output features is zero for the others then.
    assert stock.nbytes - before >= stock.size_bytes(stock.everything)


def test_sets_that_are_larger_than_the_limit_are_refused(folder):
    bank, model, _ = both(folder, device_bytes=20_000)
    with model.using("few"):
        logits(model)
    with pytest.raises(MethodError, match=r"7 of the bank's 7 adapters would be used at once, whose matrices take"):
        model.set_method("lora-flow")
    assert model.method.name == "base"
    with pytest.raises(MethodError, match=r"`device_bytes` \(=20000\) is less"):
        logits(model, methods=["average"])
    with pytest.raises(MethodError, match="would be used at once"):
        FusedModel.from_adapters(tiny_model(), bank)
    with model.using("few"):
        logits(model)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "4G"])
def test_the_bytes_on_a_device_are_a_number(folder, value):
    with pytest.raises(AdapterError, match=r"`device_bytes` .* must be a whole number of bytes, at least 1."):
        AdapterBank(folder, device_bytes=value)


def test_an_adapter_that_does_not_fit_is_named_when_the_fusion_is_made(folder):
    other = tiny_model("gpt2")
    save_adapter(other, folder / "alien")
    with pytest.raises(AdapterError, match=r"Adapter 'alien' .* matches no linear module"):
        both(folder)


def test_copies_of_the_base_are_compared_when_the_fusion_is_made(folder):
    base = tiny_model().double()
    save_adapter(base, folder / "copied", modules_to_save=["lm_head"])
    _, model, whole = both(folder)
    with model.using("copied"), whole.using("copied"):
        assert_same(model, whole)
    with torch.no_grad():
        base.lm_head.weight[3] += 1
    with pytest.raises(AdapterError, match=r"'copied' .* replaces 'lm_head.weight' of the base: 1 of 64 rows"):
        FusedModel.from_adapters(base, AdapterBank(folder))


def test_a_saved_fusion_of_a_bank_is_that_of_its_adapters(folder, tmp_path):
    bank, model, whole = both(folder, SEVERAL)
    tiny_model().double().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "fusion", copy_adapters=True)
    for adapters in (None, bank):
        again = FusedModel.from_pretrained(tmp_path / "fusion", base=tiny_model().double(), adapters=adapters)
        assert_same(again, whole)
        assert (again.attachment.stock is not None) == (adapters is bank)


def test_copies_and_pickles_load_for_themselves(folder):
    _, model, whole = both(folder, SEVERAL)
    assert_same(model, whole)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(other, whole)
        with other.using("rs"), whole.using("rs"):
            assert_same(other, whole)
    torch.testing.assert_close(logits(model.to(torch.float32)), logits(whole.to(torch.float32)))


def test_unload_gives_the_base_back(folder):
    _, model, _ = both(folder, SEVERAL)
    expected = tiny_model().double()(IDS).logits
    assert torch.equal(model.unload()(IDS).logits, expected)


@pytest.mark.parametrize("kind", ["qwen2_moe", "gpt2", "deepseek_v3"])
def test_other_architectures(tmp_path, kind):
    base = tiny_model(kind).double()
    for seed in range(3):
        save_adapter(base, tmp_path / "bank" / f"a{seed}", seed=seed, r=3 + seed)
    _, _, _ = base, seed, kind
    bank = AdapterBank(tmp_path / "bank")
    whole = FusedModel.from_adapters(copy.deepcopy(base), {name: bank[name] for name in bank}, "base")
    model = FusedModel.from_adapters(base, bank, "base")
    for method in ("a1", {"a0": 0.5, "a2": -0.7}, "average"):
        with model.using(method), whole.using(method):
            assert_same(model, whole)
            one, other = (fused.generate(IDS, max_new_tokens=4, do_sample=False) for fused in (model, whole))
            assert torch.equal(one, other)


def test_parameters_are_mixed_across_adapters_of_several_ranks(folder):
    for name in ("dora", "rs"):
        shutil.rmtree(folder / name)
    _, model, whole = both(folder, "lorahub")
    for fused in (model, whole):
        for gate in fused.gates.values():
            gate.start_at([0.3, -0.5, 0.0, 0.7, 0.0])
    assert_same(model, whole)


def test_a_set_that_is_loaded_compiles_without_a_graph_break(folder, unchecked_shapes):
    shutil.rmtree(folder / "dora")
    _, model, whole = both(folder)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with model.using({"plain": 0.5, "rs": 0.5}), whole.using({"plain": 0.5, "rs": 0.5}), torch.no_grad():
        found = compiled(IDS, use_cache=False).logits
        torch.testing.assert_close(found, logits(whole), rtol=1e-9, atol=1e-9)


def test_a_graph_loads_nothing(folder, monkeypatch):
    _, model, _ = both(folder)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(MethodError, match="A graph is compiled that uses 2 adapters of a bank that are not loaded"):
        model.attachment.stock.bring((0, 1))


# ---- Versions ------------------------------------------------------------------------------------------------------


def test_calls_use_what_the_bank_has_when_they_begin(folder, tmp_path):
    bank, model, _ = both(folder, {"plain": 0.5, "few": 0.5})
    reference = {name: logits(model, methods=[name]) for name in ("plain", "twin")}
    bank.replace("plain", folder / "twin")
    torch.testing.assert_close(logits(model, methods=["plain"]), reference["twin"])
    with model.using("plain"):
        bank.add("old", folder / "plain")
        torch.testing.assert_close(logits(model), reference["twin"])
        torch.testing.assert_close(logits(model, methods=["old"]), reference["plain"])
    assert model.adapter_names[-1] == "old"
    bank.remove("twin")
    with pytest.raises(LoraflowError, match="twin"):
        model.set_method("twin")
    assert "twin" not in model.adapter_names
    bank.remove("few")
    with pytest.raises(MethodError, match="names the unknown adapter 'few'"):
        logits(model)


def test_adapters_that_are_exchanged_for_a_while_stay(folder):
    bank, model, _ = both(folder)
    with model.exchanged([load_adapter("alone", folder / "rs")]):
        bank.remove("twin")
        logits(model)
        assert model.adapter_names == ["alone"]
    logits(model)
    assert model.adapter_names == list(bank)


@pytest.mark.parametrize("limit", [1, 2])
def test_a_set_that_fails_to_come_leaves_nothing_half(folder, monkeypatch, limit):
    _, model, whole = both(folder)
    stock, pair = model.attachment.stock, {"plain": 0.5, "twin": 0.5}
    positions = tuple(map(model.adapter_names.index, pair))
    stock.limit_bytes = limit * stock.size_bytes(positions)
    filler = stock._fillers[3]
    with monkeypatch.context() as patch:
        patch.setattr(filler, "join", lambda parts: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model, methods=[pair])
    assert_same(model, whole, methods=[pair])
    assert_same(model, whole, methods=["plain"])


def test_what_has_learned_keeps_its_adapters(folder):
    bank, model, _ = both(folder, "learned-static")
    names = model.adapter_names
    bank.remove("twin")
    logits(model)
    assert model.adapter_names == names


def test_a_running_call_keeps_its_version(folder):
    bank, model, _ = both(folder)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with model.using("plain"):
        expected = model.generate(IDS, **options)
    with model.using("twin"):
        after = model.generate(IDS, **options)
    begun, changed, found = threading.Event(), threading.Event(), []

    def wait(input_ids, scores):
        begun.set()
        assert changed.wait(60)
        return scores

    def run():
        with model.using("plain"):
            found.append(model.generate(IDS, **options, logits_processor=[wait]))
            found.append(model.generate(IDS, **options))

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(60)
    shutil.rmtree(folder / "plain")
    bank.replace("plain", folder / "twin")
    bank.remove("few")
    changed.set()
    thread.join(60)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], after)
    assert "few" not in model.adapter_names


def test_files_that_changed_under_a_bank_are_refused_when_they_are_used(folder):
    _, model, whole = both(folder, "few")
    edit_config(folder / "rs", lora_alpha=3)
    with pytest.raises(AdapterError, match=r"'rs': the files in .* have changed"), model.using("rs"):
        pass
    # What failed is not what answers next.
    assert_same(model, whole)
    model.training_record = {"steps": 1}
    with pytest.raises(AdapterError, match=r"'rs': the files in .* have changed"):
        model.set_method("rs")
    assert model.method.parameters() == whole.method.parameters()
    assert model.training_record == {"steps": 1}
    assert_same(model, whole)


def test_a_method_that_the_banks_adapters_do_not_let_go_on_comes_back_with_them(folder):
    bank = AdapterBank({name: folder / name for name in ("plain", "few")})
    model = FusedModel.from_adapters(tiny_model().double(), bank, "arrow")
    before = logits(model)
    bank.device_bytes = model.attachment.stock.size_bytes((0, 1))
    bank.add("rs", folder / "rs")
    for _ in range(2):
        with pytest.raises(MethodError, match=r"of the bank's 3 adapters"):
            logits(model)
    bank.remove("rs")
    torch.testing.assert_close(logits(model), before)
    assert model.method.name == "arrow"


def test_a_method_may_be_replaced_whose_adapter_has_left_or_that_has_learned(folder):
    bank = AdapterBank({name: folder / name for name in ("plain", "few")})
    model = FusedModel.from_adapters(tiny_model().double(), bank, "plain")
    bank.remove("plain")
    with pytest.raises(MethodError, match=r"names the unknown adapter 'plain'"):
        logits(model)
    model.set_method("few")
    logits(model)
    model.set_method("lora-flow")
    bank.add("rs", folder / "rs")
    model.set_method("rs")
    assert model.adapter_names == ["few", "rs"]
    assert_same(model, FusedModel.from_adapters(tiny_model().double(), {"rs": folder / "rs"}, "rs"))


def test_blocks_around_the_one_that_finds_the_banks_change_go_on(folder):
    bank = AdapterBank({name: folder / name for name in ("plain", "few")})
    model = FusedModel.from_adapters(tiny_model().double(), bank, "base")
    with model.using("plain"):
        expected = logits(model)
        with model.using("few"):
            bank.add("rs", folder / "rs")
            logits(model)
        torch.testing.assert_close(logits(model), expected)


def test_a_banks_adapter_may_be_called_otherwise(folder):
    stored = {one.name: one for one in AdapterBank(folder).stored()}
    model = FusedModel.from_adapters(tiny_model().double(), {"zh": stored["plain"].called("zh")}, "zh")
    assert model.adapter_names == ["zh"]
    assert_same(model, FusedModel.from_adapters(tiny_model().double(), {"plain": folder / "plain"}, "plain"))


def test_an_exchange_that_fails_leaves_the_bank(folder, tmp_path):
    bank, model, _ = both(folder)
    wide = load_adapter("wide", save_adapter(tiny_model(hidden_size=64).double(), tmp_path / "wide"))
    with pytest.raises(AdapterError):
        model.exchange_adapters([wide])
    assert model.bank is bank

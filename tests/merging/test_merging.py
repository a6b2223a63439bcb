"""Merges: each against a dense float64 computation of its formula, on any kinds of adapters that can be merged."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from loraflow import FusedModel
from loraflow.adapters import LoraModule, load_adapter, match_adapter
from loraflow.errors import AdapterError, MethodError
from loraflow.merging import MERGES, Lego, knots, make_merge, merge_adapters
from loraflow.merging.lego import k_means
from tests.tiny import random_adapter, random_ids, relative_error, save_adapter, tiny_model

DOUBLE = torch.float64
NAMES = ("zh", "math", "code")


def dense(module: LoraModule, *, bias: bool = False) -> torch.Tensor:
    """An update of one linear as a matrix; with the bias as the column of one more input."""
    matrix = module.scaling * module.lora_B.double() @ module.lora_A.double()
    if not bias:
        return matrix
    column = torch.zeros(len(matrix)).double() if module.bias is None else module.scaling * module.bias.double()
    return torch.cat([matrix, column[:, None]], dim=1)


def dense_updates(adapters, weights, *, bias: bool) -> dict[str, list[torch.Tensor]]:
    found = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        like = next(dense(a.modules[name], bias=bias) for a in adapters if name in a.modules)
        found[name] = [
            w * dense(a.modules[name], bias=bias) if name in a.modules else torch.zeros_like(like)
            for a, w in zip(adapters, weights, strict=True)
        ]
    return found


def ties_by_hand(vectors, density):
    """Entry by entry: the largest of each vector stay, the sign of their sum wins, its entries are averaged."""
    kept = []
    for vector in vectors:
        # As PEFT counts them.
        order = sorted(range(len(vector)), key=lambda i: -abs(vector[i]))[: int(density * len(vector))]
        kept.append([value if i in set(order) else 0.0 for i, value in enumerate(vector)])
    merged = []
    for entries in zip(*kept, strict=True):
        sign = 1 if sum(entries) >= 0 else -1
        same = [entry for entry in entries if entry * sign > 0]
        merged.append(sum(same) / max(len(same), 1))
    return torch.tensor(merged, dtype=DOUBLE)


def over_all(parts: dict[str, list[torch.Tensor]], merge) -> dict[str, torch.Tensor]:
    """Merge one vector of each adapter over all places, and cut the result up again."""
    vectors = [torch.cat([found[i].flatten() for found in parts.values()]).tolist() for i in range(len(NAMES))]
    pieces = merge(vectors).split([found[0].numel() for found in parts.values()])
    return {name: piece.view_as(parts[name][0]) for name, piece in zip(parts, pieces, strict=True)}


def knots_by_hand(updates, merge):
    bases, parts = {}, {}
    for name, found in updates.items():
        U, S, _ = torch.linalg.svd(torch.cat(found, dim=1), full_matrices=False)
        bases[name] = U[:, S > 1e-5]
        parts[name] = [bases[name].T @ update for update in found]
    return {name: bases[name] @ piece for name, piece in over_all(parts, merge).items()}


def dare_by_hand(vectors, drop, seed):
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    masks = [torch.bernoulli(torch.full((len(vector),), 1 - drop).double()) for vector in vectors]
    torch.set_rng_state(state)
    return [
        (mask * torch.tensor(v, dtype=DOUBLE) / (1 - drop)).tolist() for mask, v in zip(masks, vectors, strict=True)
    ]


def core_by_hand(adapters, updates, merge):
    bases, parts = {}, {}
    for name, found in updates.items():
        mine = [adapter.modules[name] for adapter in adapters if name in adapter.modules]
        U, S, _ = torch.linalg.svd(torch.cat([module.lora_B.double() for module in mine], dim=1), full_matrices=False)
        V, T, _ = torch.linalg.svd(torch.cat([module.lora_A.double() for module in mine]).T, full_matrices=False)
        bases[name] = U[:, S > 1e-9], V[:, T > 1e-9]
        parts[name] = [bases[name][0].T @ update @ bases[name][1] for update in found]
    return {name: bases[name][0] @ core @ bases[name][1].T for name, core in merge(parts).items()}


def iso_c(parts):
    merged = {}
    for name, found in parts.items():
        U, S, Vh = torch.linalg.svd(sum(found), full_matrices=False)
        merged[name] = U @ torch.diag(torch.full_like(S, S.mean().item())) @ Vh
    return merged


def expected_of(name, adapters, updates):
    """What a merge gives by its formula, dense; `core` reads the adapters' own matrices too."""
    if name in ("sum", "core-sum"):
        return {place: sum(found) for place, found in updates.items()}
    if name == "knots-ties":
        return {p: 0.7 * d for p, d in knots_by_hand(updates, lambda v: ties_by_hand(v, 0.4)).items()}
    if name == "knots-dare-ties":
        dared = lambda vectors: ties_by_hand(dare_by_hand(vectors, 0.6, 5), 0.5)  # noqa: E731
        return {p: 0.7 * d for p, d in knots_by_hand(updates, dared).items()}
    if name == "core-ties":
        return core_by_hand(adapters, updates, lambda parts: over_all(parts, lambda v: ties_by_hand(v, 0.4)))
    assert name == "core-iso-c"
    return core_by_hand(adapters, updates, iso_c)


OPTIONS = {
    "knots-ties": {"density": 0.4, "scale": 0.7},
    "knots-dare-ties": {"drop": 0.6, "density": 0.5, "scale": 0.7, "seed": 5},
    "core-ties": {"density": 0.4},
}
SPACES = ("sum", "knots-ties", "knots-dare-ties", "core-sum", "core-ties", "core-iso-c")


@pytest.fixture(scope="module")
def base():
    return tiny_model(num_hidden_layers=2, dtype=DOUBLE)


@pytest.fixture(scope="module")
def unlike(base):
    """Three adapters of other ranks, targets and kinds."""
    return [
        random_adapter(base, "zh", ["q_proj", "up_proj"], r=3, seed=1),
        random_adapter(base, "math", ["q_proj", "v_proj"], r=2, kind="rslora", seed=2),
        random_adapter(base, "code", ["q_proj", "down_proj"], r=4, seed=3, layers=[1]),
    ]


@pytest.mark.parametrize("name", SPACES)
def test_merges_of_updates_are_their_formulas(unlike, name):
    merge = make_merge(name, OPTIONS.get(name, {}) | {"weights": {"math": 0.5, "code": -2.0}})
    before = torch.get_rng_state()
    merged = merge_adapters(unlike, merge, dtype=DOUBLE)
    assert torch.equal(torch.get_rng_state(), before), "what is drawn elsewhere must not depend on a merge"
    updates = dense_updates(unlike, [1.0, 0.5, -2.0], bias=False)
    expected = expected_of(name, unlike, updates)
    assert merged.adapter.modules.keys() == expected.keys()
    for place, matrix in expected.items():
        assert relative_error(dense(merged.adapter.modules[place]), matrix) < 1e-10, place
        # No more rank than the adapters' together.
        assert merged.adapter.modules[place].rank <= sum(a.modules[place].rank for a in unlike if place in a.modules)
    sums = {place: sum(found) for place, found in updates.items()}
    cut = sum((sums[p] - dense(m)).square().sum() for p, m in merged.adapter.modules.items())
    whole = sum(update.square().sum() for update in sums.values())
    assert merged.from_sum.error == pytest.approx((cut / whole).sqrt().item(), abs=1e-9)
    each = {p: ((sums[p] - dense(merged.adapter.modules[p])).norm() / sums[p].norm()).item() for p in sums}
    assert merged.from_sum.worst_error == pytest.approx(max(each.values()), abs=1e-9)
    assert (merged.from_sum.error < 1e-9) == (name in ("sum", "core-sum"))


@pytest.mark.parametrize("name", SPACES)
def test_a_bias_is_what_is_done_with_one_more_input(base, name):
    kinds = {"zh": "lora_bias", "math": "plain", "code": "lora_bias"}
    adapters = [
        random_adapter(base, n, ["o_proj"], r=2, kind=kind, seed=i) for i, (n, kind) in enumerate(kinds.items())
    ]
    merged = merge_adapters(adapters, make_merge(name, OPTIONS.get(name, {})), dtype=DOUBLE)
    updates = dense_updates(adapters, [1.0] * 3, bias=True)
    # In core space, the matrices have the biases in them: B's as columns, A's as the input that is always 1.
    wide = [copy.deepcopy(adapter) for adapter in adapters]
    for adapter in wide:
        for place, module in adapter.modules.items():
            A = torch.nn.functional.pad(module.lora_A.double(), (0, 1))
            B = module.lora_B.double()
            if module.bias is not None:
                A = torch.cat([A, torch.nn.functional.pad(torch.ones(1, 1).double(), (A.shape[1] - 1, 0))])
                B = torch.cat([B, module.bias.double()[:, None]], dim=1)
            adapter.modules[place] = LoraModule(A, B, module.scaling)
    for place, matrix in expected_of(name, wide, updates).items():
        assert relative_error(dense(merged.adapter.modules[place], bias=True), matrix) < 1e-10
    assert merged.adapter.config.lora_bias


PEFT_KINDS = {
    "linear": ("linear", {}),
    "ties": ("ties", {"density": 0.3, "sign": "frequency"}),
    "magnitude-prune": ("magnitude_prune", {"density": 0.3}),
    "dare-linear": ("dare_linear", {"density": 0.6, "seed": 3}),
    "dare-ties": ("dare_ties", {"density": 0.6, "seed": 3}),
    "sum": ("cat", {}),
}


@pytest.mark.parametrize("name", PEFT_KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_pefts_merges_are_pefts(tmp_path, architecture, name):
    base = tiny_model(architecture)
    targets = {"llama": (["q_proj", "v_proj"], ["q_proj"]), "gpt2": (["c_attn", "c_fc"], ["c_attn"])}[architecture]
    paths = {
        n: save_adapter(base, tmp_path / n, t, use_rslora=n == "math", seed=i)
        for i, (n, t) in enumerate(zip(("zh", "math"), targets, strict=True))
    }
    kind, options = PEFT_KINDS[name]
    weights = {"zh": 0.7, "math": -0.4}
    adapters = [match_adapter(load_adapter(n, path), base) for n, path in paths.items()]
    merged = merge_adapters(adapters, make_merge(name, {**options, "weights": weights}), dtype=DOUBLE)

    model = PeftModel.from_pretrained(copy.deepcopy(base), paths["zh"], adapter_name="zh").double()
    model.load_adapter(paths["math"], "math")
    model.double()
    inject = model.base_model.inject_adapter

    def inject_first(*args, **kwargs):
        inject(*args, **kwargs)
        # It draws values for the new adapter, before anything is merged.
        torch.manual_seed(options.get("seed", 0))

    model.base_model.inject_adapter = inject_first
    more = {"density": options.get("density"), "majority_sign_method": options.get("sign", "total")}
    model.base_model.add_weighted_adapter(["zh", "math"], list(weights.values()), "merged", kind, **more)
    for place, module in merged.adapter.modules.items():
        layer = model.get_submodule(f"base_model.model.{place}")
        expected = layer.lora_B["merged"].weight.double() @ layer.lora_A["merged"].weight.double()
        assert layer.scaling["merged"] == 1
        assert relative_error(dense(module), expected) < 1e-6, place


def test_biases_are_tensors_of_their_own_where_parameters_are_merged(base):
    adapters = [random_adapter(base, n, ["o_proj"], kind="lora_bias", seed=i) for i, n in enumerate(("zh", "math"))]
    merged = merge_adapters(adapters, make_merge("ties", {"density": 0.5}), dtype=DOUBLE)
    for place, module in merged.adapter.modules.items():
        found = [(a.modules[place].scaling * a.modules[place].bias).tolist() for a in adapters]
        assert torch.allclose(module.bias, ties_by_hand(found, 0.5), atol=1e-12)


def test_a_lower_rank_is_the_nearest_and_leaves_biases_alone(base):
    adapters = [random_adapter(base, n, ["o_proj"], r=3, kind="lora_bias", seed=i) for i, n in enumerate(NAMES)]
    full = merge_adapters(adapters, make_merge("sum"), dtype=DOUBLE)
    small = merge_adapters(adapters, make_merge("sum"), rank=2, dtype=DOUBLE)
    for place, module in small.adapter.modules.items():
        assert module.rank == 2
        whole = dense(full.adapter.modules[place])
        assert torch.allclose((whole - dense(module)).norm(), torch.linalg.svdvals(whole)[2:].norm())
        assert torch.allclose(module.bias, full.adapter.modules[place].bias)
    assert small.from_sum.error > full.from_sum.error


# ---- LoRA-LEGO -----------------------------------------------------------------------------------------------------


def test_lego_is_its_formula_given_its_clusters(unlike):
    merged = merge_adapters(unlike, Lego(clusters=2, seed=4), dtype=DOUBLE)
    generator = torch.Generator().manual_seed(4)
    for place, module in merged.adapter.modules.items():
        mine = [adapter.modules[place] for adapter in unlike if place in adapter.modules]
        units = [
            torch.cat([m.lora_A[j].double(), m.scaling * m.lora_B[:, j].double()]) for m in mine for j in range(m.rank)
        ]
        cluster = k_means(torch.stack(units), 2, generator).tolist()
        expected = torch.zeros_like(dense(module))
        for one in set(cluster):
            members = [unit for unit, of in zip(units, cluster, strict=True) if of == one]
            mean = sum(members) / len(members)
            centre = mean / mean.norm() * (sum(unit.norm() for unit in members) / len(members))
            a, b = centre[: module.lora_A.shape[1]], centre[module.lora_A.shape[1] :]
            expected += torch.outer(b, a)
        expected *= math.sqrt(sum(m.rank for m in mine) / len(mine) / 2)
        assert relative_error(dense(module), expected) < 1e-10


@given(seed=st.integers(0, 1000), count=st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_k_means_ends_where_no_point_is_nearer_to_another_centre(seed, count):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(12, 3, generator=generator, dtype=DOUBLE)
    cluster = k_means(points, count, generator)
    assert set(cluster.tolist()) == set(range(count))
    centres = torch.stack([points[cluster == one].mean(dim=0) for one in range(count)])
    assert torch.equal(torch.cdist(points, centres).argmin(dim=1), cluster)


def test_k_means_of_points_that_are_the_same_leaves_no_cluster_empty():
    generator = torch.Generator().manual_seed(0)
    assert set(k_means(torch.ones(5, 2).double(), 3, generator).tolist()) == {0, 1, 2}


# ---- Every merge ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_merge_is_an_adapter_that_can_be_fused(architecture, name):
    base = tiny_model(architecture, DOUBLE)
    adapters = [random_adapter(base, n, seed=i) for i, n in enumerate(NAMES)]
    merged = merge_adapters(adapters, make_merge(name), dtype=DOUBLE)
    again = merge_adapters(adapters, make_merge(name), dtype=DOUBLE)
    assert merged.adapter.digest == again.adapter.digest
    assert merged.names == NAMES
    if MERGES[name].draws:
        other = merge_adapters(adapters, make_merge(name, {"seed": 1}), dtype=DOUBLE)
        assert other.adapter.digest != merged.adapter.digest
    expected = copy.deepcopy(base)
    for place, module in merged.adapter.modules.items():
        weight = expected.get_submodule(place).weight
        weight += dense(module).T if architecture == "gpt2" else dense(module)
    model = FusedModel.from_adapters(base, {"merged": merged.adapter}, "merged")
    ids = random_ids()
    assert relative_error(model(ids).logits, expected(ids).logits) < 1e-9


@pytest.mark.parametrize("name", [name for name in MERGES if name != "lego"])
def test_experts_are_merged_one_by_one(name):
    generator = torch.Generator().manual_seed(0)
    base = tiny_model(num_hidden_layers=1)
    adapters = []
    for adapter in (random_adapter(base, n, ["q_proj"], seed=i) for i, n in enumerate(NAMES[:2])):
        A, B = (torch.randn(*size, generator=generator) for size in ((6, 5), (7, 6)))
        adapters.append(dataclasses.replace(adapter, modules={"experts": LoraModule(A, B, 2.0, experts=3)}))
    # TIES counts over all of them together, DARE draws over all: what each is alone is the same only without.
    options = {key: value for key, value in {"density": 1.0, "drop": 0.0}.items() if hasattr(MERGES[name], key)}
    merged = merge_adapters(adapters, make_merge(name, options), dtype=DOUBLE).adapter.modules["experts"]
    assert merged.experts == 3
    for expert in range(3):
        alone = [dataclasses.replace(a, modules={"expert": a.modules["experts"].of_expert(expert)}) for a in adapters]
        expected = merge_adapters(alone, make_merge(name, options), dtype=DOUBLE).adapter.modules["expert"]
        assert relative_error(dense(merged.of_expert(expert)), dense(expected)) < 1e-9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_merge("knots"), "Unknown merge 'knots'. Known: "),
        (lambda: make_merge("sum", {"scale": 1}), "The merge 'sum' has no option 'scale'."),
        (lambda: make_merge("ties", {"density": 0}), "`density` (=0) must be a share of the values, above 0 and at"),
        (lambda: make_merge("core-ties", {"density": 2}), "`density` (=2) must be a share"),
        (lambda: make_merge("ties", {"sign": "most"}), "`sign` is unknown: 'most'. Known: 'frequency', 'total'."),
        (lambda: make_merge("knots-ties", {"scale": -1}), "`scale` (=-1) must be a positive number."),
        (lambda: make_merge("core-iso-c", {"scale": "x"}), "`scale` (='x') must be a positive number."),
        (
            lambda: make_merge("knots-dare-ties", {"drop": 1}),
            "`drop` (=1) must be a share of the values, at least 0 an",
        ),
        (lambda: make_merge("dare-ties", {"seed": -1}), "`seed` (=-1) must be a whole number of at least 0."),
        (lambda: make_merge("lego", {"clusters": 0}), "`clusters` (=0) must be a whole number of at least 1."),
        (lambda: make_merge("sum").merge_biases({}), "The merge 'sum' reads biases as inputs of their updates."),
    ],
)
def test_options_that_cannot_be_are_refused(make, message):
    with pytest.raises(MethodError, match=re.escape(message)):
        make()


def test_what_cannot_be_merged_is_refused(base, unlike):
    def refuse(adapters, message, name="sum", error=MethodError, **options):
        with pytest.raises(error, match=re.escape(message)):
            merge_adapters(adapters, make_merge(name, options), **more)

    more: dict = {}
    dora = random_adapter(base, "dora", ["q_proj"], kind="dora")
    for name in MERGES:
        refuse([unlike[0], dora], "Adapter 'dora' is a DoRA: its update divides by the norm", name, AdapterError)
    refuse([unlike[0]], "The merge 'sum' is of two adapters or more, found ['zh']. Give more.")
    refuse(unlike, "`weights` names the unknown adapter 'mth'.", weights={"mth": 1.0})
    refuse(unlike, "Every weight of the merge 'sum' is 0", weights=dict.fromkeys(NAMES, 0))
    refuse(unlike, "at 'model.layers.0.self_attn.q_proj' the adapters have the ranks [3, 2]", "ties")
    refuse(
        unlike, "`clusters` (=9) is more than the 5 units that 'model.layers.0.self_attn.q_proj'", "lego", clusters=9
    )
    other = random_adapter(tiny_model(hidden_size=16, num_hidden_layers=2), "other", ["q_proj"])
    refuse([unlike[0], other], "'zh' and 'other' are of bases of different shapes", error=AdapterError)
    flat = [
        dataclasses.replace(a, modules={n: dataclasses.replace(m, lora_B=0 * m.lora_B) for n, m in a.modules.items()})
        for a in unlike
    ]
    for name in ("knots-ties", "knots-dare-ties", "core-sum", "core-iso-c", "sum"):
        refuse(flat, "leaves nothing of the adapters ['zh', 'math', 'code']: every merged update is zero. Keep", name)
    for name in ("knots-ties", "core-ties"):
        refuse(unlike, "density=1e-09", name, density=1e-9)
    more = {"rank": 0}
    refuse(unlike, "`rank` (=0) must be at least 1.")
    more = {"dtype": torch.float16}
    refuse(unlike, "has values that float16 cannot represent", weights={"zh": 1e9})


def test_weight_zero_leaves_an_adapter_out(unlike):
    merged = merge_adapters(unlike, make_merge("sum", {"weights": {"code": 0}}))
    assert merged.names == ("zh", "math")
    assert not any("down_proj" in place for place in merged.adapter.modules)
    assert merged.adapter.ranks == tuple(sorted({*itertools.accumulate((2, 1)), 5}))


@pytest.mark.parametrize("name", SPACES)
def test_a_linear_whose_updates_are_all_zero_stays_as_it_is(unlike, name):
    """It brings a zero of rank 1, and the others are merged as if it were not there."""
    place = "model.layers.0.self_attn.q_proj"

    def flattened(adapter):
        module = adapter.modules.get(place)
        changed = {} if module is None else {place: dataclasses.replace(module, lora_B=0 * module.lora_B)}
        return dataclasses.replace(adapter, modules={**adapter.modules, **changed})

    def without(adapter):
        return dataclasses.replace(adapter, modules={n: m for n, m in adapter.modules.items() if n != place})

    # Draws at random go on from linear to linear: the zero one takes none of them.
    merge = make_merge(name, OPTIONS.get(name, {}))
    merged = merge_adapters([flattened(adapter) for adapter in unlike], merge, dtype=DOUBLE).adapter.modules
    expected = merge_adapters([without(adapter) for adapter in unlike], merge, dtype=DOUBLE).adapter.modules
    assert not dense(merged[place]).any()
    if name != "sum":
        assert merged[place].rank == 1
    assert merged.keys() == {place, *expected}
    for other, module in expected.items():
        assert torch.equal(dense(merged[other]), dense(module))


@pytest.mark.parametrize("name", ["knots-ties", "knots-dare-ties"])
def test_knots_that_keeps_all_has_one_linear_in_memory(unlike, monkeypatch, name):
    sizes = []
    in_shared_basis = knots.in_shared_basis
    merge = make_merge(name, {"density": 1})
    together = type(merge).together
    monkeypatch.setattr(knots, "in_shared_basis", lambda updates: (sizes.append("in"), in_shared_basis(updates))[1])
    monkeypatch.setattr(type(merge), "together", lambda self, vs: (sizes.append("out"), together(self, vs))[1])
    merged = merge_adapters(unlike, merge, dtype=DOUBLE).adapter
    assert sizes == ["in", "out"] * len(merged.modules)
    if name == "knots-ties":
        by_hand = knots_by_hand(dense_updates(unlike, [1, 1, 1], bias=False), lambda v: ties_by_hand(v, 1.0))
        for place, expected in by_hand.items():
            assert relative_error(dense(merged.modules[place]), 0.5 * expected) < 1e-10

"""Updates of a few adapters at each position: every way to them against slow loops, and which is the cheapest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from loraflow.core.active import Use
from loraflow.core.picks import Picks, Sizes, by_adapter, cheapest, moved_bytes
from tests.core.test_linear import BATCH as ROWS
from tests.core.test_linear import SEQ, base_linear, expected_output, fuse, lora_modules, plans, tokens

WAYS = ["gathered", "grouped"]


@torch.no_grad()
@given(plan=plans, data=st.data(), way=st.sampled_from(WAYS), cut=st.booleans())
def test_any_adapters_give_the_reference(plan, data, way, cut):
    """Of any kinds and ranks, as many linears as read one input, each row with a few adapters of its own."""
    bases, modules, x = [base_linear(), base_linear(out_features=12)], lora_modules(plan), tokens()
    other = lora_modules(plan, out_features=12)
    layer, linears = fuse(bases, [modules, other])
    adapters = len(plan)
    active = sorted(data.draw(st.sets(st.integers(0, adapters - 1), min_size=1))) if cut else list(range(adapters))
    most = data.draw(st.integers(1, len(active)))
    by_row = data.draw(st.booleans())
    weights = torch.zeros(ROWS, SEQ, adapters, dtype=torch.float64)
    for row in range(ROWS):
        for position in range(SEQ):
            if position and by_row:
                weights[row, position] = 0.5 * weights[row, 0]
            else:
                chosen = data.draw(st.permutations(active))[: data.draw(st.integers(0, most))]
                weights[row, position, chosen] = torch.randn(len(chosen), dtype=torch.float64)
    layer.shape = (ROWS, SEQ)
    layer.weights = weights[..., active]
    layer.most, layer.by_row = most, by_row
    layer.active = Use(tuple(active)).active if cut else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraflow.core.group.cheapest", lambda _: way)
        for base, mine, linear in zip(bases, [modules, other], linears, strict=True):
            torch.testing.assert_close(linear(x), expected_output(base, mine, x, weights))


@pytest.mark.parametrize("slots", [(4, 4, 4), (3, 3), (1, 5, 0, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_matrices_by_adapter_have_rows_for_the_grouped_kernels(slots, dtype):
    stacked = torch.randn(sum(slots), 8).to(dtype)
    found = by_adapter(stacked, slots)
    assert found.shape[1] * found.element_size() % 16 == 0
    assert found.shape[0] == len(slots)
    for adapter, rows in enumerate(stacked.split(slots)):
        assert torch.equal(found[adapter, : slots[adapter]], rows)
        assert not found[adapter, slots[adapter] :].any()
    if slots == (4, 4, 4) and dtype != torch.bfloat16:
        assert found.data_ptr() == stacked.data_ptr(), "equal ranks need no copy"


class _Counting(TorchDispatchMode):
    """Counts the bytes that operations read and write, a matrix that all are taken from as what is taken."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("index_select", "index"):
            # Read from where it lies; the copy is read while it is in the cache.
            self.bytes += result.nbytes
        elif name not in ("view", "reshape", "split_with_sizes", "t", "transpose", "expand", "_unsafe_view", "slice"):
            skipped = self.gathered(name, args)
            tensors = [tensor for tensor in (*args, result) if isinstance(tensor, torch.Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in tensors if tensor is not skipped)
        return result

    def gathered(self, name, args):
        return None if name not in ("bmm", "baddbmm_") else args[-1]


@torch.no_grad()
@pytest.mark.parametrize(
    ("rows", "adapters", "most"), [(1, 64, 2), (8, 64, 2), (8, 2, 2), (64, 64, 2), (256, 8, 4), (256, 64, 2)], ids=str
)
def test_the_model_orders_ways_as_the_bytes_that_are_counted(rows, adapters, most):
    features, rank = 256, 16
    sizes = Sizes(rows, 1, adapters, most, features, (rank,), (features,), itemsize=4)
    lora_A, lora_B = torch.randn(adapters, rank, features), torch.randn(adapters, rank, features)
    x, output, weights = torch.randn(rows, features), torch.randn(rows, features), torch.zeros(rows, adapters)
    for row in range(rows):
        weights[row, torch.randperm(adapters)[:most]] = 1.0
    counted = {}
    with _Counting() as counting:
        slots = torch.mm(x, lora_A.view(-1, features).T) * weights.repeat_interleave(rank, dim=1)
        output.addmm_(slots, lora_B.view(-1, features))
    counted["all"] = counting.bytes
    for way in WAYS:
        picks = Picks.of(weights, most, 1, way)
        with _Counting() as counting:
            picks.write(picks.read(x, lora_A, None), lora_B, output)
        counted[way] = counting.bytes
    modelled = {way: moved_bytes(way, sizes) for way in counted}
    for one in counted:
        for other in counted:
            # Within a third they are alike, and the rest of the cost decides.
            if counted[one] < counted[other] / 1.5:
                assert modelled[one] < modelled[other], (counted, modelled)


def test_the_cheapest_way_is_that_which_was_fastest_where_it_was_measured():
    # `benchmarks/growth.py --ways` measures them, on one core.
    def way(rows, adapters, most, span=1):
        return cheapest(Sizes(rows, span, adapters, most, 512, (16,), (512,), itemsize=4))

    assert way(1, 64, 3) == "gathered"
    assert way(8, 64, 2) == "gathered"
    assert way(64, 64, 2) == "grouped"
    assert way(8, 2, 2) == "all"
    assert way(1, 4, 3) == "all"
    assert way(8, 16, 2, span=64) == "gathered"


@pytest.mark.parametrize(("width", "grouped"), [(512, True), (516, False)])
def test_the_grouped_kernels_want_whole_rows_of_16_bytes(width, grouped):
    def taken(in_features, out_features):
        return cheapest(Sizes(256, 1, 64, 1, in_features, (16,), (out_features,), itemsize=2))

    assert {taken(width, 512) == "grouped", taken(512, width) == "grouped"} == {grouped}


def test_copies_of_unequal_ranks_are_counted_and_never_large():
    bases, modules = [base_linear()], lora_modules([(4, "plain"), (6, "plain")])
    _, (linear,) = fuse(bases, [modules])
    reading = linear.fused.group.reading(None)
    before = reading.nbytes
    (part, _), *_ = reading.parts
    assert reading.nbytes == before + part.nbytes
    assert reading.pads_little
    _, (linear,) = fuse([base_linear()], [lora_modules([(1, "plain")] * 5 + [(8, "plain")])])
    assert not linear.fused.group.reading(None).pads_little

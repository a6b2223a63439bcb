"""The fused linear against slow loops: values, gradients, what is kept for the backward, quantised bases."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraflow import BaseOptions, FusedModel
from loraflow.adapters import LoraModule
from loraflow.bases import load_base
from loraflow.core.context import LayerContext
from loraflow.core.group import InputGroup
from loraflow.core.linear import Member, fuse_linear, unfuse_linear
from loraflow.core.products import ScaledOutput, WeightedProduct
from loraflow.core.quantized import keep_differentiable
from loraflow.core.reference import reference_linear
from loraflow.core.stack import stack_adapters
from tests.tiny import peft_model, random_ids, relative_error, save_adapter, tiny_model

IN, OUT, BATCH, SEQ = 24, 36, 2, 5
CPU = torch.device("cpu")

plans = st.lists(
    st.none() | st.tuples(st.integers(1, 6), st.sampled_from(["plain", "dora", "lora_bias"])), min_size=1, max_size=5
).filter(any)
"""Each adapter's rank and kind; None where it does not target the module."""
weight_shapes = st.sampled_from(["constant", "per token"])


class OneLayer(LayerContext):
    """Gives its linears these fusion weights, for all tokens in one axis, as a decoder layer does."""

    def __init__(self):
        super().__init__(0, 1, 0, None)

    def weights_for(self, names, rows, x):
        return self.weights if self.weights is None or self.weights.dim() == 1 else self.weights.flatten(0, -2)


def lora_modules(plan, out_features=OUT, in_features=IN, dtype=torch.float64):
    modules = []
    for entry in plan:
        if entry is None:
            modules.append(None)
            continue
        rank, kind = entry
        modules.append(
            LoraModule(
                torch.randn(rank, in_features, dtype=dtype) / math.sqrt(in_features),
                torch.randn(out_features, rank, dtype=dtype),
                scaling=1.7 / rank,
                bias=torch.randn(out_features, dtype=dtype) if kind == "lora_bias" else None,
                magnitude=torch.rand(out_features, dtype=dtype) + 0.5 if kind == "dora" else None,
            )
        )
    return modules


def fuse(linears, module_lists, dtype=torch.float64):
    """Fuse linears that read one input; returns the layer that gives them weights, and them."""
    layer = OneLayer()
    stacks = [stack_adapters(modules, linear, dtype) for linear, modules in zip(linears, module_lists, strict=True)]
    group = InputGroup([f"linear{member}" for member in range(len(linears))], stacks, CPU)
    for member, (linear, stack) in enumerate(zip(linears, stacks, strict=True)):
        fuse_linear(linear, stack, Member(group, member, layer))
    return layer, linears


def base_linear(bias=True, out_features=OUT, dtype=torch.float64):
    return nn.Linear(IN, out_features, bias, dtype=dtype).requires_grad_(False)


def fusion_weights(shape, adapters, dtype=torch.float64):
    return torch.randn(*(BATCH, SEQ) if shape == "per token" else (), adapters, dtype=dtype)


def expected_output(base, modules, x, weights):
    return reference_linear(x, base.weight, base.bias, modules, weights.expand(*x.shape[:-1], -1))


def tokens(dtype=torch.float64):
    return torch.randn(BATCH, SEQ, IN, dtype=dtype)


# ---- Values and gradients ------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(plan=plans, shape=weight_shapes, bias=st.booleans(), learning=st.booleans())
def test_any_adapters_give_the_reference(plan, shape, bias, learning):
    base, modules, x = base_linear(bias), lora_modules(plan), tokens()
    layer, (linear,) = fuse([base], [modules])
    layer.weights = fusion_weights(shape, len(plan)).requires_grad_(learning)
    torch.testing.assert_close(linear(x), expected_output(base, modules, x, layer.weights))


@settings(max_examples=30)
@given(plan=plans, shape=weight_shapes, bias=st.booleans())
def test_gradients_are_those_of_the_reference(plan, shape, bias):
    base, modules = base_linear(bias), lora_modules(plan)
    x, weights = tokens().requires_grad_(), fusion_weights(shape, len(plan)).requires_grad_()
    layer, (linear,) = fuse([base], [modules])
    layer.weights = weights
    direction = torch.randn(BATCH, SEQ, OUT, dtype=torch.float64)
    found = torch.autograd.grad(linear(x), (x, weights), direction)
    expected = torch.autograd.grad(expected_output(base, modules, x, weights), (x, weights), direction)
    torch.testing.assert_close(found, expected)


def leaf(*size):
    return torch.randn(*size, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("leading", [(), (BATCH, 1), (BATCH, SEQ)], ids=["constant", "per row", "per token"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_weighted_product_passes_gradcheck(leading, bias):
    lora_A, expand = leaf(4, 3).detach(), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]]).double()
    input_bias = torch.tensor([0, 0, 0, 1]).double() if bias else None

    def product(x, weights):
        return WeightedProduct.apply(x, lora_A, input_bias, weights, expand)

    assert torch.autograd.gradcheck(product, (leaf(BATCH, SEQ, 3), leaf(*leading, 3)))


@pytest.mark.parametrize("leading", [(), (BATCH, 1), (BATCH, SEQ)], ids=["constant", "per row", "per token"])
def test_the_scaled_output_passes_gradcheck(leading):
    output_scale = leaf(2, 4).detach()

    def product(base_output, weights):
        return ScaledOutput.apply(base_output, weights, output_scale)

    assert torch.autograd.gradcheck(product, (leaf(BATCH, SEQ, 4), leaf(*leading, 2)))


@settings(max_examples=20)
@given(
    first=plans,
    extra=st.lists(st.sampled_from([None, (1, "plain"), (3, "lora_bias"), (2, "dora")]), min_size=5, max_size=5),
)
def test_linears_that_share_an_input_give_the_reference(first, extra):
    second = extra[: len(first)]
    if not any(second):
        second[0] = (2, "plain")
    bases = [base_linear(), base_linear(bias=False, out_features=7)]
    module_lists = [lora_modules(first), lora_modules(second, out_features=7)]
    layer, linears = fuse(bases, module_lists)
    for _ in range(2):
        x, layer.weights = tokens(), fusion_weights("per token", len(first))
        for base, modules, linear in zip(bases, module_lists, linears, strict=True):
            torch.testing.assert_close(linear(x), expected_output(base, modules, x, layer.weights))


@settings(max_examples=20)
@given(first=plans, shape=weight_shapes, learning=st.booleans())
def test_linears_that_share_an_input_may_each_have_weights_of_their_own(first, shape, learning):
    bases, module_lists = [base_linear(), base_linear()], [lora_modules(first), lora_modules(first[::-1])]
    layer, linears = fuse(bases, module_lists)
    own = [fusion_weights(shape, len(first)).requires_grad_(learning) for _ in linears]
    x, layer.weights = tokens(), torch.cat(own, dim=-1)
    for base, modules, linear, weights in zip(bases, module_lists, linears, own, strict=True):
        torch.testing.assert_close(linear(x), expected_output(base, modules, x, weights))


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("view", [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[:, :0], lambda x: x[0]])
def test_inputs_of_any_layout_and_size(view, learning):
    base, modules, x = base_linear(), lora_modules([(2, "plain"), (3, "dora")]), view(tokens())
    layer, (linear,) = fuse([base], [modules])
    layer.weights = fusion_weights("constant", 2).requires_grad_(learning)
    torch.testing.assert_close(linear(x), expected_output(base, modules, x, layer.weights))


@pytest.mark.parametrize("kind", ["plain", "dora", "lora_bias"])
def test_under_autocast_gradients_are_those_of_the_reference(kind):
    base, modules = base_linear(dtype=torch.float32), lora_modules([(2, kind), (3, "plain")], dtype=torch.float32)
    x, weights = tokens(torch.float32).requires_grad_(), fusion_weights("per token", 2, torch.float32).requires_grad_()
    layer, (linear,) = fuse([base], [modules], torch.float32)
    layer.weights = weights
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear(x).float().square().sum()
    # As trainers do: the backward runs outside.
    found = torch.autograd.grad(loss, (x, weights))
    expected = torch.autograd.grad(expected_output(base, modules, x, weights).square().sum(), (x, weights))
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 0.03


def test_linears_that_are_called_with_different_inputs_are_right_too():
    bases, module_lists = [base_linear(), base_linear()], [lora_modules([(2, "plain")]), lora_modules([(3, "plain")])]
    layer, linears = fuse(bases, module_lists)
    layer.weights = fusion_weights("constant", 1)
    first, second = tokens(), tokens()
    for x, i in [(first, 0), (second, 1), (first, 1), (second, 0)]:
        torch.testing.assert_close(linears[i](x), expected_output(bases[i], module_lists[i], x, layer.weights))


def test_one_product_serves_all_that_read_one_input(monkeypatch):
    layer, linears = fuse([base_linear(), base_linear()], [lora_modules([(2, "plain")])] * 2)
    layer.weights, shared = fusion_weights("constant", 1), linears[0].fused.group
    calls, original = [], torch.nn.functional.linear
    monkeypatch.setattr("loraflow.core.group.F.linear", lambda x, A, b: calls.append(A) or original(x, A, b))
    x = tokens()
    for linear in linears:
        linear(x)
    assert sum(A is shared.lora_A for A in calls if A is not None) == 1
    layer.close()
    assert layer.seen is layer.group is layer.weights is None
    assert layer.products == layer.member_weights == ()


def test_without_weights_the_base_answers_bit_for_bit():
    base, x = base_linear(), tokens()
    expected = base(x)
    layer, (linear,) = fuse([base], [lora_modules([(2, "lora_bias"), (3, "dora")])])
    layer.weights = None
    assert torch.equal(linear(x), expected)


def test_conv1d_is_a_linear_with_its_weight_transposed():
    base = Conv1D(OUT, IN).double().requires_grad_(False)
    nn.init.normal_(base.weight)
    modules, x = lora_modules([(2, "plain"), None, (3, "dora")]), tokens()
    layer, (linear,) = fuse([base], [modules])
    layer.weights = fusion_weights("per token", 3)
    torch.testing.assert_close(linear(x), reference_linear(x, base.weight.T, base.bias, modules, layer.weights))


@settings(max_examples=20)
@given(plan=plans, dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), learning=st.booleans())
def test_low_precision_is_near_the_float64_truth(plan, dtype, learning):
    base, modules, x = base_linear(dtype=dtype), lora_modules(plan, dtype=torch.float32), tokens(dtype)
    layer, (linear,) = fuse([base], [modules], dtype)
    layer.weights = fusion_weights("per token", len(plan), torch.float32).requires_grad_(learning)
    found = linear(x)
    assert found.dtype == dtype
    truth = expected_output(base.double(), modules, x.double(), layer.weights.double())
    assert relative_error(found, truth) < 8 * torch.finfo(dtype).eps


# ---- Stacking ------------------------------------------------------------------------------------------------------


def test_a_stack_is_what_its_docstring_says():
    plain, biased, dora = modules = lora_modules([(2, "plain"), (1, "lora_bias"), (3, "dora")])
    base = base_linear()
    stack = stack_adapters([plain, None, biased, dora], base, torch.float64)
    assert stack.slots == (2, 0, 2, 3)
    assert stack.lora_A.shape == (7, IN)
    assert stack.lora_B.shape == (7, OUT)
    assert stack.input_bias.tolist() == [0, 0, 0, 1, 0, 0, 0]
    torch.testing.assert_close(stack.lora_B[:2], plain.lora_B.T * plain.scaling)
    torch.testing.assert_close(stack.lora_B[3], biased.bias * biased.scaling)
    norm = (base.weight + dora.scaling * dora.lora_B @ dora.lora_A).norm(dim=1)
    torch.testing.assert_close(stack.output_scale[3], dora.magnitude / norm - 1)
    assert not stack.output_scale[:3].any()
    assert len(modules) == 3


def test_plain_adapters_pay_for_neither_bias_nor_dora():
    stack = stack_adapters(lora_modules([(2, "plain"), (1, "plain")]), base_linear(), torch.float32)
    assert stack.input_bias is None
    assert stack.output_scale is None
    assert stack.lora_A.dtype == stack.lora_B.dtype == torch.float32


def test_values_are_rounded_once():
    module = LoraModule(torch.randn(3, IN), torch.randn(OUT, 3), scaling=1 / 3)
    stack = stack_adapters([module], base_linear(dtype=torch.bfloat16), torch.bfloat16)
    assert torch.equal(stack.lora_B, (module.lora_B.T * module.scaling).bfloat16())


# ---- The base, and what the backward keeps -------------------------------------------------------------------------


def test_the_base_is_called_and_never_modified():
    base = base_linear()
    before, kind, x = copy.deepcopy(base.state_dict()), type(base), tokens().requires_grad_()
    expected = base(x)
    layer, (linear,) = fuse([base], [lora_modules([(2, "dora"), (3, "lora_bias")])])
    layer.weights = fusion_weights("per token", 2).requires_grad_()
    linear(x).sum().backward()
    assert base.weight.grad is None
    # Under its old names, and without the adapters.
    assert linear.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in linear.state_dict().items())
    unfuse_linear(linear)
    assert type(base) is kind
    assert vars(base).keys() == vars(base_linear()).keys()
    assert torch.equal(base(x), expected)


def test_plain_lora_keeps_only_slots_for_the_backward():
    modules = lora_modules([(2, "plain"), None, (3, "lora_bias")])
    layer, (linear,) = fuse([base_linear()], [modules])
    x, layer.weights = tokens().requires_grad_(), fusion_weights("per token", 3).requires_grad_()
    constant = {t.data_ptr() for t in (*linear.parameters(), *linear.buffers(), *linear.fused.group.buffers())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x).sum().backward()
    per_token = [t for t in kept if t.data_ptr() not in constant and t.numel() >= BATCH * SEQ]
    assert per_token, "nothing was kept: the hooks saw nothing"
    slots = 2 + 3 + 1
    for tensor in per_token:
        assert tensor.shape[-1] not in (IN, OUT), f"a tensor of shape {tuple(tensor.shape)} is kept"
        assert tensor.numel() <= BATCH * SEQ * slots


def test_weights_that_do_not_learn_keep_no_slots():
    modules = lora_modules([(2, "plain"), (3, "plain")])
    layer, (linear,) = fuse([base_linear()], [modules])
    x, layer.weights = tokens().requires_grad_(), fusion_weights("per token", 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x).sum().backward()
    assert kept
    assert not [t for t in kept if t.shape == (BATCH * SEQ, 5)]


def test_adapter_dropout_only_acts_while_training():
    base, modules, x = base_linear(), lora_modules([(4, "plain")]), tokens()
    layer, (linear,) = fuse([base], [modules])
    layer.weights = fusion_weights("constant", 1)
    linear.fused.group.dropout = 0.5
    plain = expected_output(base, modules, x, layer.weights)
    linear.fused.group.eval()
    torch.testing.assert_close(linear(x), plain)
    linear.fused.group.train()
    layer.close()
    assert relative_error(linear(x), plain) > 0.01


# ---- Quantised bases -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["bnb-4bit", "bnb-8bit"])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "dora", "lora_bias"])
def test_on_a_quantised_base_one_adapter_gives_what_peft_gives_on_its_weights(tmp_path, quantization, config):
    pytest.importorskip("bitsandbytes")
    # bitsandbytes' kernels need multiples of 64.
    base = tiny_model(hidden_size=64, intermediate_size=64, head_dim=16, num_key_value_heads=4)
    base.save_pretrained(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", **config)
    options = BaseOptions(quantization=quantization, dtype=torch.float32)
    ids, dense = random_ids(), dequantised(tmp_path / "base", options)
    packed = load_base(tmp_path / "base", options)(ids).logits
    # A fused base stays on the kernels that have a backward, which round otherwise.
    unpacked = load_base(tmp_path / "base", options)
    keep_differentiable(unpacked)
    plain = unpacked(ids).logits
    # PEFT itself is wrong for DoRA on a quantised base on the CPU, so it is asked about the dequantised one.
    expected = peft_model(dense, adapter)(ids).logits
    kernel_error = relative_error(plain, dense(ids).logits)
    model = FusedModel.from_adapters(tmp_path / "base", {"one": adapter}, "one", options=options)
    assert type(model.base_model.model.layers[0].self_attn.q_proj).__module__.startswith("bitsandbytes")
    for _ in range(2):
        assert relative_error(model(ids).logits, expected) <= 2 * kernel_error < 0.1 < relative_error(plain, expected)
    with model.using("base"):
        assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model.unload()(ids).logits, packed)


def dequantised(path, options):
    """A quantised base's weights in a plain float64 model."""
    quantised, dense = load_base(path, options), load_base(path, BaseOptions(dtype=torch.float64))
    for name, module in quantised.named_modules():
        if type(module).__module__.startswith("bitsandbytes"):
            dense.get_submodule(name).weight.copy_(dequantize_module_weight(module))
    return dense

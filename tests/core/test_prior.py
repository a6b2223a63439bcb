"""Methods that weigh tokens by what their whole prompt says: `prior` reaches each row's gates, wherever that row is."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loraflow import Average, FusedModel, Method, QueryMethod
from loraflow.core.active import use_of
from loraflow.core.batch import lanes_of_methods
from loraflow.core.lanes import Heard, Informed, check_apart
from loraflow.errors import ArchitectureError, MethodError
from loraflow.training import mean_loss
from loraflow.training.data import TokenExample, TokenExamples
from tests.tiny import VOCAB, random_adapter, random_ids, relative_error, tiny_model


def fixed(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class HintGate(nn.Module):
    def __init__(self, adapters, features):
        super().__init__()
        self.register_buffer("vectors", fixed(adapters, features, seed=features), persistent=False)

    def forward(self, x, prior=None):
        if prior is None:
            raise MethodError("No prompt was read.")
        return torch.softmax(x.to(self.vectors) @ self.vectors.T + prior, dim=-1)


class Keeper(nn.Module):
    def __init__(self, adapters):
        super().__init__()
        self.register_buffer("table", 3 * fixed(VOCAB, adapters))


@dataclass(frozen=True)
class Hinted(Method):
    """Weighs by the tokens of the prompt and by the input; the adapter with the lowest prior is excluded."""

    stands: str = "module"

    name: ClassVar[str] = "hinted"
    level: ClassVar[str] = "token"

    @property
    def place(self):
        return self.stands

    @property
    def reads_prompt(self):
        return True

    def gate(self, site):
        return HintGate(len(site.adapters), site.features)

    def keeper(self, site):
        return Keeper(len(site.adapters))

    def prior(self, query, keeper):
        return hint(query.input_ids, keeper.table)


def hint(ids, table):
    scores = table[ids].mean(dim=0)
    return scores.masked_fill(scores == scores.min(), float("-inf"))


def make(method=None, architecture="llama", names="abc"):
    base = tiny_model(architecture, torch.float64)
    adapters = {name: random_adapter(base, name, r=i + 1, seed=i) for i, name in enumerate(names)}
    return FusedModel.from_adapters(copy.deepcopy(base), adapters, method or Hinted()), base, adapters


def slow_logits(base, adapters, ids, prompt):
    """One text through the base, each linear with every adapter's update by the softmax of its input and the prior."""
    prior = hint(prompt, 3 * fixed(VOCAB, len(adapters)))
    handles = []
    for name, linear in base.named_modules():
        updates = [adapter.modules.get(name) for adapter in adapters.values()]
        if not any(updates):
            continue

        def route(_, args, output, updates=updates):
            x = args[0]
            weights = torch.softmax(x @ fixed(len(updates), x.shape[-1], seed=x.shape[-1]).T + prior, dim=-1)
            for i, u in enumerate(updates):
                said = x @ u.lora_A.double().T @ u.lora_B.double().T * u.scaling
                output = output + weights[..., i : i + 1] * said
            return output

        handles.append(linear.register_forward_hook(route))
    try:
        return base(ids[None]).logits[0]
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
@settings(max_examples=6)
@given(
    architecture=st.sampled_from(["llama", "gpt2", "opt"]),
    rows=st.integers(1, 3),
    prompts=st.lists(st.integers(1, 5), min_size=3, max_size=3),
)
def test_each_row_is_weighed_by_what_its_own_prompt_says(architecture, rows, prompts):
    model, base, adapters = make(architecture=architecture)
    ids = random_ids(rows, 6)
    mask = torch.zeros_like(ids)
    for row in range(rows):
        mask[row, : prompts[row]] = 1
    found = model(ids, prompt_mask=mask).logits
    for row in range(rows):
        expected = slow_logits(base, adapters, ids[row], ids[row, : prompts[row]])
        assert relative_error(found[row], expected) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("place", ["module", "layer"])
def test_generation_does_not_depend_on_the_batch_its_padding_or_its_beams(place):
    model, _, _ = make(Hinted(place))
    ids = random_ids(1, 6)
    options = {"max_new_tokens": 5, "do_sample": False}
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, 6:]
    padded = torch.cat([nn.functional.pad(ids, (3, 0)), random_ids(1, 9, seed=3)])
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[0, 9:], alone)
    for methods in ([None, "b"], ["base", None]):
        beside = model.generate(padded, attention_mask=mask, methods=methods, **options)
        whole = model.generate(padded, attention_mask=mask, **options)
        assert torch.equal(beside[methods.index(None)], whole[methods.index(None)])
    beams = {**options, "num_beams": 2, "num_return_sequences": 2}
    both = model.generate(padded, attention_mask=mask, **beams)
    assert torch.equal(both[:2, 9:], model.generate(ids, attention_mask=torch.ones_like(ids), **beams)[:, 6:])


@torch.no_grad()
def test_a_trace_has_the_weights_and_losses_are_those_of_the_prompts():
    model, base, adapters = make()
    ids = random_ids(2, 6)
    lengths = (2, 4)
    masks = torch.tensor([[int(i < n) for i in range(6)] for n in lengths])
    traced = model.trace(ids, prompt_mask=masks)
    for row, length in enumerate(lengths):
        alone = model.trace(ids[row : row + 1], prompt_length=length).weights[0]
        torch.testing.assert_close(alone, traced.weights[row])
        excluded = hint(ids[row, :length], 3 * fixed(VOCAB, 3)).isinf()
        assert not traced.weights[row][..., excluded].any()
    rows = [TokenExample(row.tolist(), [-100] * n + row[n:].tolist()) for row, n in zip(ids, lengths, strict=True)]
    expected = []
    for row, length in zip(ids, lengths, strict=True):
        logits = slow_logits(base, adapters, row, row[:length])
        expected.append(nn.functional.cross_entropy(logits[length - 1 : -1], row[length:], reduction="sum"))
    assert mean_loss(model, TokenExamples(rows, []), 2) == pytest.approx(float(sum(expected) / 6), abs=1e-9)


def test_only_adapters_that_some_prompt_does_not_exclude_are_computed():
    model, _, _ = make(names="abcde")
    first, second = torch.tensor([0.0, 1, -torch.inf, -torch.inf, 2]), torch.tensor([0.0, 1, -torch.inf, 3, -torch.inf])

    def lanes_with(*priors):
        prior = torch.stack(priors)[:, None].expand(-1, 3, -1)
        chosen = [(model.method, model._choice.now.gates)] * len(priors)
        return lanes_of_methods(model.attachment, chosen, lambda *_: prior)

    used = use_of(lanes_with(first), 5, first=True)
    assert (used.active, used.most) == ((0, 1, 4), None)
    used = use_of(lanes_with(first, second), 5, first=True)
    assert (used.active, used.most) == ((0, 1, 3, 4), 3)


def test_what_is_kept_is_saved_and_moved_with_the_gates():
    model, _, _ = make()
    assert model.state_dict().keys() == {"model.table"}
    assert any(name.endswith("gates.model.table") for name, _ in model.base_model.named_buffers())
    model.load_state_dict({"model.table": torch.zeros(VOCAB, 3)})
    assert not model.gates["model"].table.any()
    copied = copy.deepcopy(model)
    copied.gates["model"].table.add_(1)
    assert not model.gates["model"].table.any()


def test_where_nothing_says_what_the_prompt_is_it_is_refused():
    model, _, _ = make()
    ids = random_ids()
    with pytest.raises(MethodError, match=r"No prompt was read\."):
        model(ids)
    with pytest.raises(MethodError, match=r"'hinted' reads a whole prompt before it is answered\. Give `prompt_mask`"):
        model(ids, methods=["a", None])
    with pytest.raises(MethodError, match=r"'hinted' does not weigh whole prompts\. `trace` shows"):
        model.weigh(ids)
    with pytest.raises(MethodError, match="'hinted' weighs each prompt before it is answered"):
        model.generate_batch([[3, 4]])
    with pytest.raises(MethodError, match=r"'hinted' reads the prompt, and `input_ids` is missing"):
        model.generate(inputs_embeds=torch.randn(1, 3, 32, dtype=torch.float64), max_new_tokens=1)
    with pytest.raises(MethodError, match=r"Row 1 has no tokens\. Give every prompt at least one"):
        model(ids, prompt_mask=torch.tensor([[1] * 9, [0] * 9]))
    with pytest.raises(NotImplementedError, match=r"'average' has nothing to say of whole prompts"):
        Average().prior(None, None)


def test_prompts_that_cannot_be_told_apart_are_refused():
    gate = Informed(HintGate(2, 4), Heard(torch.zeros(2, 2)))
    check_apart([Informed(HintGate(2, 4), Heard(torch.zeros(1, 2))), None], "'q' of decoder layer 1")
    with pytest.raises(ArchitectureError, match=r"'q' of decoder layer 1 reads rows of which it cannot be told whose"):
        check_apart([None, gate], "'q' of decoder layer 1")


def test_methods_say_whether_they_read_prompts():
    from loraflow.methods import METHODS

    assert [name for name, method in METHODS.items() if issubclass(method, QueryMethod)] == [
        name for name, method in METHODS.items() if name != "static" and method().reads_prompt
    ]

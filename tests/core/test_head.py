"""The loss of answers against that of a model's own forward: value, gradients, logits, and what is never made."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from loraflow import FusedModel
from loraflow.core import head
from loraflow.core.head import IGNORED, KnownGradient, call_with_labels
from loraflow.core.lazy import LazyTensor, lazy_tensor
from tests.tiny import VOCAB, random_adapter, random_ids, set_random_gates, tiny_model
from tests.zoo.bases import FIRST_WORD, silent, small_model

IDS = random_ids(3, 9)
# The second row has no label at all; the third has one at its very start, which nothing predicts.
LABELS = IDS.clone()
LABELS[0, :5] = LABELS[1] = IGNORED
LABELS[2, 1:6] = IGNORED

# Heads with a bias, of their own layers, tied; scales and caps; a decoder past the trunk; experts, states, images.
ZOO = [
    *("llama", "gpt2", "opt", "phi3", "gptj", "phi", "bert", "modernbert-decoder", "gemma2", "gemma3_text", "gemma3"),
    *("granite", "cohere", "falcon_h1", "recurrent_gemma", "mamba", "rwkv", "bloom", "falcon", "mpt", "llama4_text"),
    *("mixtral", "gpt_oss", "qwen2_vl", "electra", "hyperclovax", "xlnet", "bart"),
]


@pytest.fixture
def small_chunks(monkeypatch):
    """Two positions at a time, of the tiny models; one of the zoo's."""
    monkeypatch.setattr(head, "LOGITS_A_CHUNK", 2 * VOCAB)


def losses(model, inputs, **kwargs):
    """The loss of a model's own forward and ours, each with its gradient of the embeddings; and ours, whole."""
    found = []
    for call in (lambda k: model(**k), lambda k: call_with_labels(model, model, (), k)):
        embeddings = inputs.detach().clone().requires_grad_()
        with silent():
            output = call({"inputs_embeds": embeddings, "use_cache": False, **kwargs})
        found += [output.loss, *torch.autograd.grad(output.loss, embeddings, retain_graph=True), output]
    return found


def check(found, rtol=1e-6, gradients=1e-5):
    plain, plain_gradient, plain_output, ours, our_gradient, our_output = found
    assert ours.dtype == plain.dtype
    torch.testing.assert_close(ours, plain, rtol=rtol, atol=1e-6)
    limit = gradients * plain_gradient.abs().max().item()
    torch.testing.assert_close(our_gradient, plain_gradient, rtol=0, atol=limit)
    torch.testing.assert_close(our_output.logits + 0, plain_output.logits, rtol=1e-4, atol=1e-5)
    return our_output


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("architecture", ZOO)
def test_any_model_has_its_own_loss(architecture):
    model = small_model(architecture).unused.float().requires_grad_(False)
    ids = torch.arange(FIRST_WORD, FIRST_WORD + 27).view(3, 9)
    labels = torch.where(LABELS == IGNORED, IGNORED, ids)
    check(losses(model, model.get_input_embeddings()(ids), labels=labels, attention_mask=torch.ones_like(ids)))
    # These compute a loss of their own, from all logits.
    assert head._can_be_cut[model] == (architecture not in ("xlnet", "bart"))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_any_count_divides_it(changes, options):
    model = tiny_model("gemma2", **changes).requires_grad_(False)
    check(losses(model, model.get_input_embeddings()(IDS), labels=LABELS, **options))


@pytest.mark.usefixtures("small_chunks")
def test_the_balance_of_experts_is_a_part_of_it():
    model = tiny_model("mixtral", router_aux_loss_coef=0.5).requires_grad_(False)
    output = check(losses(model, model.get_input_embeddings()(IDS), labels=LABELS, output_router_logits=True))
    assert output.aux_loss > 0


@pytest.mark.usefixtures("small_chunks")
def test_half_precision_is_widened_for_the_loss():
    model = tiny_model(dtype=torch.bfloat16).requires_grad_(False)
    found = losses(model, model.get_input_embeddings()(IDS), labels=LABELS)
    assert found[3].dtype == torch.float32
    check(found, rtol=2e-3, gradients=2e-2)


@pytest.mark.usefixtures("small_chunks")
def test_float64_stays_float64():
    model = tiny_model(dtype=torch.float64).requires_grad_(False)
    loss = call_with_labels(model, model, (), {"input_ids": IDS, "labels": LABELS}).loss
    logits, targets = model(IDS).logits[:, :-1], LABELS[:, 1:]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_learns_has_its_gradients(tied):
    model = tiny_model("gemma2", tie_word_embeddings=tied)
    gradients = []
    for call in (lambda **k: model(**k), lambda **k: call_with_labels(model, model, (), k)):
        model.zero_grad()
        call(input_ids=IDS, labels=LABELS).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("small_chunks")
def test_an_adapter_of_the_head_has_its_gradients():
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    gradients = []
    for call in (lambda **k: model(**k), lambda **k: call_with_labels(model, model.get_base_model(), (), k)):
        model.zero_grad()
        call(input_ids=IDS, labels=LABELS).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    assert any("lm_head" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("small_chunks")
def test_a_quantised_head_is_called_as_it_is():
    class Quantised(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.register_buffer("scale", linear.weight.abs().amax() / 127)
            self.register_buffer("weight", (linear.weight / self.scale).round().to(torch.int8))

        def forward(self, x):
            return x @ (self.weight.float() * self.scale).T

    model = tiny_model().requires_grad_(False)
    model.lm_head = Quantised(model.lm_head)
    check(losses(model, model.get_input_embeddings()(IDS), labels=LABELS))
    assert head._can_be_cut[model]


def test_a_batch_without_labels_is_the_models_own():
    model = tiny_model()
    labels = torch.full_like(IDS, IGNORED)
    assert call_with_labels(model, model, (), {"input_ids": IDS, "labels": labels}).loss.isnan()


def head_rows(model, call):
    """How many rows the head reads in each of its calls."""
    rows = []
    handle = model.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    call()
    handle.remove()
    return rows


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("learning", [True, False])
def test_the_head_sees_the_answers_only_a_chunk_at_a_time(learning):
    model = tiny_model().requires_grad_(False)
    model.lm_head.requires_grad_(learning)

    def call():
        call_with_labels(model, model, (), {"input_ids": IDS, "labels": LABELS})

    call()
    # Four labels in the first row, three in the third; the first loss has shown that it is right.
    assert head_rows(model, call) == [2, 2, 2, 1]


def test_a_head_that_looks_at_other_positions_is_left_alone():
    model = tiny_model().requires_grad_(False)
    expected = model(IDS, labels=LABELS)

    class Neighbours(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x + x.roll(1, dims=1))

    model.lm_head.__class__ = Neighbours
    found = losses(model, model.get_input_embeddings()(IDS), labels=LABELS)
    check(found)
    assert not head._can_be_cut[model]
    assert found[3] != expected.loss


@pytest.mark.parametrize("option", [{"logits_to_keep": 9}, {"return_dict": False}])
def test_whoever_says_what_he_wants_gets_it(option):
    model = tiny_model()
    found = call_with_labels(model, model, (), {"input_ids": IDS, "labels": LABELS, **option})
    torch.testing.assert_close(found[1], model(IDS).logits)
    assert not isinstance(found[1], LazyTensor)


# ---- In a fusion ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fused():
    base = tiny_model()
    adapters = {name: random_adapter(base, name, seed=i) for i, name in enumerate("ab", 1)}
    model = FusedModel.from_adapters(base, adapters)
    set_random_gates(model)
    return model


def gate_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for gate in model.gates.values() for p in gate.parameters()])


@pytest.mark.usefixtures("small_chunks")
def test_gates_get_the_gradients_of_the_plain_loss(fused):
    expected = gate_gradients(fused, fused.base_model(input_ids=IDS, labels=LABELS).loss)
    output = fused(input_ids=IDS, labels=LABELS)
    found = gate_gradients(fused, output.loss)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_loss_of_the_logits_beside_it_has_gradients(fused):
    output = fused(IDS, labels=LABELS)
    found = gate_gradients(fused, output.loss + output.logits.square().mean())
    plain = fused.base_model(IDS, labels=LABELS)
    expected = gate_gradients(fused, plain.loss + plain.logits.square().mean())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metrics", [None, lambda prediction: {"shape": prediction.predictions.shape[1]}])
def test_the_trainer_computes_logits_only_for_metrics(fused, tmp_path, metrics):
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(IDS[[0, 2]], LABELS[[0, 2]], strict=True)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True
    )
    trainer = Trainer(fused, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics)
    fused(IDS, labels=LABELS)
    assert sum(head_rows(fused.base_model, trainer.train)) == 7
    read = head_rows(fused.base_model, lambda: assert_evaluates(trainer, metrics))
    assert sum(read) == (7 if metrics is None else 7 + 18)


def assert_evaluates(trainer, metrics):
    found = trainer.evaluate()
    assert ("eval_shape" in found) == (metrics is not None)


# ---- What is computed later ----------------------------------------------------------------------------------------


def test_a_lazy_tensor_is_computed_when_something_is_done_with_it():
    calls = []

    def compute():
        calls.append(1)
        return torch.arange(6.0, dtype=torch.bfloat16).view(2, 3)

    lazy = lazy_tensor((2, 3), torch.device("cpu"), torch.bfloat16, compute)
    assert (lazy.shape, lazy.dtype, lazy.device) == ((2, 3), torch.bfloat16, torch.device("cpu"))
    assert not lazy.requires_grad
    wide = lazy.float()
    assert (wide.dtype, wide.shape, calls) == (torch.float32, (2, 3), [])
    assert wide.sum() == 15
    assert torch.cat([lazy, lazy]).shape == (4, 3)
    assert lazy[1].tolist() == [3, 4, 5]
    assert type(copy.deepcopy(lazy)) is torch.Tensor
    assert calls == [1]


def test_the_known_gradient_passes_on():
    states, gradient = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2)
    (3 * KnownGradient.apply(states, torch.tensor(1.5), gradient)).backward()
    torch.testing.assert_close(states.grad, 3 * gradient)

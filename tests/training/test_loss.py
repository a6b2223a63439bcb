"""The loss of answers of any model, in what fits and what measures."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from loraflow import FusedModel
from loraflow.core import head
from loraflow.training import answer_loss, mean_loss
from loraflow.training.data import IGNORED, TokenExample, TokenExamples
from loraflow.training.learners.finetune import TrainedAdapter
from tests.tiny import VOCAB, number_tokenizer, random_adapter, random_ids, set_random_gates, tiny_model

IDS = random_ids(2, 8)
LABELS = torch.cat([torch.full((2, 5), IGNORED), IDS[:, 5:]], dim=1)


def fused(method="lora-flow"):
    base = tiny_model()
    adapters = {name: random_adapter(base, name, seed=i) for i, name in enumerate("ab", 1)}
    model = FusedModel.from_adapters(base, adapters, method, tokenizer=number_tokenizer())
    set_random_gates(model)
    return model


def peft(config):
    torch.manual_seed(1)
    return get_peft_model(tiny_model(), config)


MODELS = {
    "fused": fused,
    "plain": tiny_model,
    "lora": lambda: peft(LoraConfig(target_modules=["q_proj"], init_lora_weights=False)),
    # Its states have positions that no label is for.
    "prompt": lambda: peft(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("count", [None, 4])
def test_any_model_has_the_loss_of_its_answers(kind, count, monkeypatch):
    monkeypatch.setattr(head, "LOGITS_A_CHUNK", 2 * VOCAB)
    model = MODELS[kind]()
    logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -8:-1].float()
    sums = torch.nn.functional.cross_entropy(logits.flatten(0, 1), LABELS[:, 1:].flatten(), reduction="sum")
    for _ in range(2):
        loss = answer_loss(model, input_ids=IDS, labels=LABELS, num_items_in_batch=count)
        torch.testing.assert_close(loss, sums / (6 if count is None else count), rtol=1e-6, atol=1e-6)


def test_a_query_method_reads_what_has_no_label():
    model = fused("qa-flora")
    weights = model.weigh(IDS[:, :5])
    expected = answer_loss(model, input_ids=IDS, labels=LABELS, fusion_weights=weights)
    torch.testing.assert_close(answer_loss(model, input_ids=IDS, labels=LABELS), expected)


def rows_read(model, call):
    rows = []
    handle = model.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    call()
    handle.remove()
    return rows


def test_whatever_measures_reads_the_answers_only():
    model = fused()
    data = TokenExamples(
        [TokenExample(ids, labels) for ids, labels in zip(IDS.tolist(), LABELS.tolist(), strict=True)], truncated=[]
    )
    first = mean_loss(model, data, 2)
    assert rows_read(model.base_model, lambda: mean_loss(model, data, 2)) == [6]
    assert mean_loss(model, data, 1) == pytest.approx(first, rel=1e-6)
    assert first == pytest.approx(model(IDS, labels=LABELS).loss.item(), rel=1e-6)


def test_a_finetuning_reads_the_answers_only():
    adapted = TrainedAdapter(peft(LoraConfig(target_modules=["q_proj"])), number_tokenizer(), None)
    inputs = {"input_ids": IDS, "labels": LABELS}
    expected = adapted.peft_model(**inputs).loss
    torch.testing.assert_close(adapted(**inputs).loss, expected, rtol=1e-6, atol=1e-6)
    base = adapted.peft_model.get_base_model()
    assert rows_read(base, lambda: adapted(**inputs).loss.backward()) == [6]

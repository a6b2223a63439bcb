"""Statistics of fusion weights against slow loops over traces, and what is said about gates."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from loraflow import FusedModel, LoraFlow
from loraflow.analysis import findings as f
from loraflow.analysis import weights as w
from loraflow.errors import LoraflowError
from loraflow.examples import parse_examples
from tests.tiny import byte_tokenizer, random_adapter, save_adapter, set_random_gates, tiny_model

RECORDS = [
    {"prompt": "1 2 3", "completion": "3 2 1, as was asked, backwards"},
    {"prompt": "5", "completion": "5!"},
    {"prompt": "the longest of all the prompts", "completion": "a longer answer than the others have: 42"},
    {"prompt": "8 9", "completion": "9 8"},
    {"prompt": "7", "completion": "seven"},
]


def fused(method="lora-flow", names=("zh", "math"), layers=None):
    """A tiny model that reads text, with adapters in all layers or some."""
    base = tiny_model(vocab_size=259, max_position_embeddings=512)
    adapters = {name: random_adapter(base, name, seed=seed, layers=layers) for seed, name in enumerate(names)}
    model = FusedModel.from_adapters(base, adapters, method, tokenizer=byte_tokenizer())
    set_random_gates(model)
    return model


def slow_weights(model):
    """Each example's weights that produced the answer, `[answer, layers, adapters]`, and those of the prompt.

    Written from the definition, position by position.
    """
    found = []
    for example in parse_examples(RECORDS):
        prompt = model.prompt.prompt_ids(model.tokenizer, example.messages)
        answer = model.prompt.completion_ids(model.tokenizer, example.messages, example.completion)
        trace = model.trace(torch.tensor([prompt + answer]))
        own = trace.weights[0].double()
        positions = range(len(prompt), len(prompt) + len(answer))
        found.append((torch.stack([own[p - 1] for p in positions]), own[: len(prompt)]))
    return found


def check_summary(summary, site, tokens):
    """One site of a summary against `[tokens, adapters]`, by plain numpy."""
    tokens = np.array([t.tolist() for t in tokens])
    assert summary.count[site] == len(tokens)
    for name, expected in (
        ("mean", tokens.mean(0)),
        ("std", tokens.std(0)),
        ("absolute", np.abs(tokens).mean(0)),
        ("largest", np.eye(tokens.shape[1])[tokens.argmax(1)].mean(0)),
    ):
        np.testing.assert_allclose(getattr(summary, name)[site], expected, atol=1e-5, err_msg=name)
    for name, level in (("low", 0.1), ("high", 0.9)):
        expected = np.quantile(tokens, level, axis=0, method="inverted_cdf")
        np.testing.assert_allclose(getattr(summary, name)[site], expected, atol=w.RESOLUTION / 2 + 1e-5, err_msg=name)
    entropies = [slow_entropy(row) for row in tokens]
    spoken = [entropy for entropy in entropies if entropy is not None]
    if spoken:
        assert summary.entropy[site].item() == pytest.approx(sum(spoken) / len(spoken), abs=1e-5)
    assert summary.silent[site].item() == pytest.approx(1 - len(spoken) / len(entropies))


def slow_entropy(row):
    positive = [max(weight, 0.0) for weight in row]
    shares = [weight / sum(positive) for weight in positive] if sum(positive) else None
    return None if shares is None else -sum(p * math.log(p) for p in shares if p) / math.log(len(row))


@pytest.mark.parametrize("method", [LoraFlow(), LoraFlow("step"), LoraFlow("module"), "arrow"], ids=str)
def test_statistics_are_those_of_the_traces(method):
    model = fused(method, names=("zh", "math", "code"))
    found, expected = w.weight_statistics(model, RECORDS, batch_size=2), slow_weights(model)
    assert found.adapters == ("zh", "math", "code")
    assert found.examples == 5
    assert found.layers == (0, 1, 2)
    assert found.prompts is not None
    for layer in range(3):
        check_summary(found.answers, layer, [row[layer] for answer, _ in expected for row in answer])
        check_summary(found.prompts, layer, [row[layer] for _, prompt in expected for row in prompt])
    check_summary(found.overall, 0, [row.mean(dim=0) for answer, _ in expected for row in answer])
    for tenth in range(10):
        mine = [
            answer[at].mean(dim=0)
            for answer, _ in expected
            for at in range(len(answer))
            if tenth / 10 <= at / len(answer) < (tenth + 1) / 10
        ]
        check_summary(found.tenths, tenth, mine)


def test_modules_have_statistics_of_their_own():
    model = fused(LoraFlow("module"))
    found = w.weight_statistics(model, RECORDS)
    assert len(found.modules) == 21
    by_name = {name: [] for name in found.modules}
    for example in parse_examples(RECORDS):
        prompt = model.prompt.prompt_ids(model.tokenizer, example.messages)
        answer = model.prompt.completion_ids(model.tokenizer, example.messages, example.completion)
        trace = model.trace(torch.tensor([prompt + answer]))
        for name, seen in by_name.items():
            seen += list(trace.module_weights[name][0, len(prompt) - 1 : -1].double())
    assert found.module_answers is not None
    for site, seen in enumerate(by_name.values()):
        check_summary(found.module_answers, site, seen)
    assert w.weight_statistics(fused(), RECORDS).module_answers is None


def test_batches_add_up_to_all_at_once():
    model = fused()
    one, all_at_once = (w.weight_statistics(model, RECORDS, batch_size=size) for size in (1, 5))
    for part in ("answers", "prompts", "overall", "tenths"):
        for name, values in vars(getattr(one, part)).items():
            expected = getattr(getattr(all_at_once, part), name)
            # A percentile may fall to the next step where the last digits of a weight differ.
            torch.testing.assert_close(values, expected, atol=1.1e-3 if name in ("low", "high") else 1e-5, rtol=0)


def test_batches_are_counted():
    counts = []
    w.weight_statistics(fused(), RECORDS, batch_size=2, on_batch=counts.append)
    assert counts == [2, 2, 1]


def test_nothing_is_kept_of_many_tokens():
    tally = w._Tally(sites=1, adapters=2)
    for _ in range(50):
        tally.add_all(torch.rand(1000, 1, 2))
    kept = sum(value.numel() for value in vars(tally).values() if isinstance(value, torch.Tensor))
    assert kept < 2 * 2 * 1.1 / w.RESOLUTION
    assert int(tally.summary().count[0]) == 50_000


def test_weights_may_have_any_range():
    tally = w._Tally(sites=2, adapters=1)
    values = torch.tensor([-1000.0, -0.5, 0.25, 3.0, 20_000.0])
    tally.add(values[:, None], torch.ones(5, dtype=torch.long))
    summary = tally.summary()
    assert summary.low[1, 0].item() == pytest.approx(-1000)
    assert summary.high[1, 0].item() == pytest.approx(20_000)
    # A site without tokens has no numbers, and does not disturb the others.
    assert summary.count.tolist() == [0, 5]
    assert summary.mean[0].isnan().all()
    assert summary.low[0].isnan().all()
    assert summary.as_json()["mean"][0] == [None]


def test_equal_weights_share_the_lead():
    found = w.weight_statistics(fused("average", names=("zh", "math", "code")), RECORDS)
    torch.testing.assert_close(found.answers.largest, torch.full((3, 3), 1 / 3).double())
    torch.testing.assert_close(found.answers.entropy, torch.ones(3).double())


@pytest.mark.parametrize(
    ("weights", "entropy"),
    [([1.0, 0.0], 0), ([0.3, 0.3], 1), ([2.0, -5.0], 0), ([0.2, 0.6], 0.8112781), ([7.0], 0), ([-1.0, -2.0], None)],
    ids=str,
)
def test_entropy_is_of_the_positive_parts(weights, entropy):
    found = w.normalized_entropy(torch.tensor([weights], dtype=torch.float64)).item()
    assert math.isnan(found) if entropy is None else found == pytest.approx(entropy)


def test_silent_tokens_are_counted():
    found = w.weight_statistics(fused({"zh": -0.5, "math": -0.1}), RECORDS)
    assert found.answers.silent.tolist() == [1, 1, 1]
    assert found.answers.entropy.isnan().all()
    assert found.as_json()["answers"]["entropy"] == [None] * 3


def test_layers_without_adapters_are_left_out():
    model = fused(layers=[0, 2])
    found, expected = w.weight_statistics(model, RECORDS), slow_weights(model)
    assert found.layers == (0, 2)
    for site, layer in enumerate((0, 2)):
        check_summary(found.answers, site, [row[layer] for answer, _ in expected for row in answer])
    both = [row[[0, 2]].mean(dim=0) for answer, _ in expected for row in answer]
    check_summary(found.overall, 0, both)


def test_methods_that_weigh_prompts_count_prompts():
    model = fused("qa-flora")
    found = w.weight_statistics(model, RECORDS, batch_size=2)
    expected = [model.weigh(**model.encode(record["prompt"]))[0].double() for record in RECORDS]
    assert found.counted == "prompts"
    assert found.prompts is None
    for layer in range(3):
        check_summary(found.answers, layer, [weights[layer] for weights in expected])
    # Tenths are of tokens: long answers count more.
    lengths = [len(byte_tokenizer()(record["completion"])["input_ids"]) + 1 for record in RECORDS]
    first = [math.ceil(length / 10) for length in lengths]
    assert int(found.tenths.count[0]) == sum(first)
    mean = sum(n * weights.mean(dim=0) for n, weights in zip(first, expected, strict=True)) / sum(first)
    torch.testing.assert_close(found.tenths.mean[0], mean, atol=1e-5, rtol=0)
    kinds = {finding.kind for finding in f.findings(found)}
    assert "by-design" in kinds
    assert not kinds & {"collapsed", "constant", "varies"}


def test_prompts_that_are_weighed_alike_are_named_so():
    same = [{**record, "prompt": "the same"} for record in RECORDS]
    found = f.findings(w.weight_statistics(fused("qa-flora"), same))
    assert [finding.kind for finding in found] == ["by-design", "alike"]
    assert "in all 3 layers, all prompts have nearly the same weights" in found[1].text


@pytest.mark.parametrize("method", ["average", "math", {"zh": 0.9, "math": 0.4}], ids=str)
def test_constant_by_design_is_no_collapse(method):
    kinds = [finding.kind for finding in f.findings(w.weight_statistics(fused(method), RECORDS))]
    assert kinds[0] == "by-design"
    assert not {"collapsed", "constant", "varies"} & {*kinds}


def set_gate(model, site, weight, bias):
    with torch.no_grad():
        model.gates[site].weight.copy_(
            weight * torch.ones_like(model.gates[site].weight) * torch.tensor([[1.0], [-1.0]])
        )
        model.gates[site].bias.copy_(torch.tensor(bias))


def test_gates_that_vary_are_said_to():
    (finding,) = f.findings(w.weight_statistics(fused(), RECORDS))
    assert finding.kind == "varies"
    assert "0.02" in finding.text
    assert "99%" in finding.text


def test_a_gate_that_gives_a_constant_is_named():
    model = fused()
    set_gate(model, "layers.1", 0.0, [0.3, -0.2])
    (finding,) = f.findings(w.weight_statistics(model, RECORDS))
    assert (finding.kind, finding.gates) == ("constant", ("layers.1",))
    assert "1 of 3 gates (layers.1) give every token the same weights (on average zh 0.80, math 0.30)" in finding.text
    assert "no standard deviation is above 0.001" in finding.text


def test_variation_below_the_threshold_is_none():
    model = fused()
    set_gate(model, "layers.1", 5e-5, [0.3, -0.2])
    found = w.weight_statistics(model, RECORDS)
    assert 0 < found.answers.std[1].max() <= f.CONSTANT_STD
    assert [(finding.kind, finding.gates) for finding in f.findings(found)] == [("constant", ("layers.1",))]


def test_gates_that_were_not_fitted_are_constant():
    base = tiny_model(vocab_size=259)
    adapters = {"zh": random_adapter(base, "zh"), "math": random_adapter(base, "math", seed=2)}
    model = FusedModel.from_adapters(base, adapters, LoraFlow("step"), tokenizer=byte_tokenizer())
    (finding,) = f.findings(w.weight_statistics(model, RECORDS))
    assert (finding.kind, finding.gates) == ("constant", ("model",))


def test_a_gate_that_collapsed_is_named():
    model = fused()
    # The softmax moves by some thousandths between tokens, and the bias decides who leads.
    set_gate(model, "layers.2", 0.002, [-0.5, 0.5])
    found = w.weight_statistics(model, RECORDS)
    assert f.CONSTANT_STD < found.answers.std[2].max() <= f.COLLAPSED_STD
    (finding,) = f.findings(found)
    assert (finding.kind, finding.gates, finding.adapter) == ("collapsed", ("layers.2",), "math")
    assert "in 1 of 3 gates (layers.2), 'math' has the largest weight at 99% or more of the tokens" in finding.text
    assert "no standard deviation is above 0.02" in finding.text


def test_small_variation_around_a_tie_is_no_collapse():
    model = fused()
    set_gate(model, "layers.2", 0.002, [0.0, 0.0])
    found = w.weight_statistics(model, RECORDS)
    assert found.answers.std[2].max() <= f.COLLAPSED_STD
    assert 0.01 < found.answers.largest[2, 0] < 0.99
    assert [finding.kind for finding in f.findings(found)] == ["varies"]


def test_collapse_is_looked_for_at_every_modules_gate():
    model = fused(LoraFlow("module"))
    set_gate(model, "layers.0.mlp.up_proj", 0.0, [0.0, 0.0])
    (finding,) = f.findings(w.weight_statistics(model, RECORDS))
    assert (finding.kind, finding.gates) == ("constant", ("layers.0.mlp.up_proj",))
    assert "1 of 21 gates" in finding.text


@pytest.mark.parametrize(("weight", "unused"), [(0.04, True), (-0.04, True), (0.06, False), (-0.06, False)])
def test_an_adapter_that_is_never_used_is_named(weight, unused):
    found = f.findings(w.weight_statistics(fused({"zh": weight, "math": 1.0}), RECORDS))
    assert [finding.adapter for finding in found if finding.kind == "unused"] == (["zh"] if unused else [])
    if unused:
        assert "'zh' never has the largest weight, and its mean absolute weight is at most 0.040" in found[1].text
        assert "(threshold 0.05)" in found[1].text


def test_a_small_weight_that_is_the_largest_is_used():
    found = f.findings(w.weight_statistics(fused({"zh": 0.04, "math": 0.01}), RECORDS))
    assert [finding.adapter for finding in found if finding.kind == "unused"] == ["math"]


def test_an_adapter_that_leads_at_some_tokens_is_used():
    model = fused()
    for layer in range(3):
        set_gate(model, f"layers.{layer}", 0.0, [0.0, -0.9])
    unused = [finding for finding in f.findings(w.weight_statistics(model, RECORDS)) if finding.kind == "unused"]
    assert not unused
    for layer in range(3):
        set_gate(model, f"layers.{layer}", 0.0, [-0.49, 0.5])
    unused = [finding for finding in f.findings(w.weight_statistics(model, RECORDS)) if finding.kind == "unused"]
    assert [finding.adapter for finding in unused] == ["zh"]


def test_few_tokens_are_not_judged():
    (finding,) = f.findings(w.weight_statistics(fused(), [{"prompt": "5", "completion": "6"}]))
    assert finding.kind == "too-few"
    assert finding.text == "2 tokens are too few to say how the weights vary (at least 20)."
    few = f.findings(w.weight_statistics(fused("qa-flora"), RECORDS[:2]))
    assert few[0].text == "2 prompts are too few to say how the weights vary (at least 5)."


def test_numbers_as_json():
    found = w.weight_statistics(fused(LoraFlow("module")), RECORDS)
    content = json.loads(json.dumps(f.report_json(found), allow_nan=False))
    assert content["answers"]["mean"] == found.answers.mean.tolist()
    assert content["module_answers"]["largest"][20] == found.module_answers.largest[20].tolist()
    assert content["thresholds"]["collapsed_std"] == f.COLLAPSED_STD
    assert content["findings"][0]["kind"] == "varies"
    assert content["counted"] == "tokens"


def test_long_examples_are_cut_and_reported():
    found = w.weight_statistics(fused(), RECORDS, max_length=40)
    assert found.truncated == ("example 2",)


def test_answers_are_those_of_generate():
    model = fused()
    conversations = [example.messages for example in parse_examples(RECORDS)]
    data = w.answer_tokens(model, conversations, max_new_tokens=6, batch_size=2)
    for record, row in zip(RECORDS, data.rows, strict=True):
        inputs = model.encode(record["prompt"])
        whole = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist()
        assert row.input_ids == whole
        prompt = inputs["input_ids"].shape[1]
        assert row.labels == [-100] * prompt + whole[prompt:]


def test_an_answer_ends_with_its_end_token(monkeypatch):
    model = fused()
    ends = torch.tensor([[7, 2, 0, 0], [8, 9, 2, 0]])
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat([input_ids, ends[: len(input_ids)]], dim=1))
    data = w.answer_tokens(model, [[{"role": "user", "content": text}] for text in ("5", "66")], max_new_tokens=4)
    assert [row.input_ids[-2:] for row in data.rows] == [[7, 2], [9, 2]]
    assert [len(row.input_ids) for row in data.rows] == [1 + 2, 2 + 3]


def test_weights_that_are_not_finite_are_refused():
    model = fused()
    set_gate(model, "layers.1", 0.0, [math.nan, 0.0])
    with pytest.raises(LoraflowError, match=r"'lora-flow' gave weights that are not finite \(NaN or infinite\)"):
        w.weight_statistics(model, RECORDS)


def test_the_base_alone_has_no_weights():
    with pytest.raises(LoraflowError, match="'base', which has no fusion weights"):
        w.weight_statistics(fused("base"), RECORDS)


def test_text_needs_a_tokenizer(tmp_path):
    base = tiny_model(vocab_size=259)
    model = FusedModel.from_adapters(base, {"zh": save_adapter(base, tmp_path)}, "average")
    with pytest.raises(LoraflowError, match="Text needs a tokenizer"):
        w.weight_statistics(model, RECORDS)

"""The beginning that rows share: the same losses with it, read once, and left alone where it is none."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from loraflow import FitConfig, FusedModel, LoraFlow, Static
from loraflow.training import fit, mean_loss
from loraflow.training import prefix as module
from loraflow.training.data import IGNORED, TokenExample, TokenExamples
from loraflow.training.prefix import read_prefix
from tests.tiny import number_tokenizer, random_adapter, random_ids, set_random_gates, tiny_model

SYSTEM = random_ids(1, 20, seed=3)[0].tolist()


def rows(system=SYSTEM, count=5):
    found = []
    for index in range(count):
        question, answer = (
            random_ids(1, 3 + index % 3, seed=index)[0].tolist(),
            random_ids(1, 4, seed=50 + index)[0].tolist(),
        )
        ids = [*system, 3 + index, *question, *answer]
        found.append(TokenExample(ids, [IGNORED] * (len(ids) - 4) + answer))
    return TokenExamples(found, [])


def fused(architecture="llama", method=None, **changes):
    base = tiny_model(architecture, torch.float64, **changes)
    adapters = {name: random_adapter(base, name, seed=ord(name)) for name in "ab"}
    model = FusedModel.from_adapters(base, adapters, method or LoraFlow(), tokenizer=number_tokenizer())
    set_random_gates(model)
    return model


def widths_of(model, data, batch_size=2):
    """Widths of the forwards of a pass over the data, and its loss."""
    seen = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    loss = mean_loss(model, data, batch_size)
    hook.remove()
    return seen, loss


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        ("llama", LoraFlow()),
        ("llama", LoraFlow("module")),
        ("llama", LoraFlow("step")),
        ("gpt2", LoraFlow()),
        ("phi3", Static({"a": 0.5})),
        ("opt", LoraFlow()),
        ("deepseek_v3", LoraFlow()),
    ],
)
def test_the_loss_is_that_of_whole_rows(architecture, method, monkeypatch):
    model, data = fused(architecture, method), rows()
    widths, loss = widths_of(model, data)
    assert widths[0] == 20
    # Two rows are tried as a whole (and at a model's first loss its head); after that, none is.
    assert max(widths[3:]) < 20
    monkeypatch.setattr(module, "_SHORTEST", 99)
    whole_widths, whole = widths_of(model, data)
    assert min(whole_widths) > 20
    assert loss == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("architecture", ["mistral", "gemma2"])
def test_a_cache_that_forgets_is_not_gone_on_from(architecture):
    widths, _ = widths_of(fused(architecture), rows())
    assert min(widths[1:]) > 20


def test_rows_that_share_little_are_read_whole():
    model = fused()
    assert read_prefix(model.eval(), rows(SYSTEM[:9]).rows) is None
    mixed = rows().rows + rows(random_ids(1, 20, seed=9)[0].tolist()).rows
    assert read_prefix(model, mixed) is None
    assert read_prefix(model, rows(count=1).rows) is None
    unlabelled = [TokenExample(row.input_ids, [IGNORED] * len(row.labels)) for row in rows().rows]
    assert read_prefix(model, unlabelled) is None


def test_what_predicts_the_first_answer_is_left_to_each_row():
    same = TokenExamples([TokenExample([*SYSTEM, 5], [IGNORED] * 20 + [5]) for _ in range(3)], [])
    prefix = read_prefix(fused().eval(), same.rows)
    assert prefix is not None
    assert prefix.length == 19


def test_a_prefix_that_gives_another_loss_is_not_believed(monkeypatch):
    model = fused().eval()
    monkeypatch.setattr(module.Prefix, "rest", lambda self, batch: {**batch, "labels": batch["labels"].roll(1, 0)})
    assert read_prefix(model, rows().rows) is None


def test_dev_losses_of_a_fit_are_those_of_whole_rows(monkeypatch):
    examples = [
        {"prompt": " ".join(map(str, [*range(10, 30), 30 + index])), "completion": f"{index + 3} {index + 4}"}
        for index in range(6)
    ]
    config = FitConfig(epochs=2, batch_size=2, learning_rate=1e-2)

    def losses():
        model = fused()
        return fit(model, examples, dev=examples, config=config, console=Console(file=io.StringIO()))

    with_prefix = losses()
    read = []
    monkeypatch.setattr(module, "_SHORTEST", 999)
    own = module._common
    monkeypatch.setattr(module, "_common", lambda rows: read.append(own(rows)) or own(rows))
    whole = losses()
    assert min(read) >= 20
    assert with_prefix.dev_loss == pytest.approx(whole.dev_loss, rel=1e-6)
    assert with_prefix.start_losses == pytest.approx(whole.start_losses, rel=1e-6)

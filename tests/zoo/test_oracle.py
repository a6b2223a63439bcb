"""The oracles of all architectures against PEFT: what is wrong there would find faults that are none."""

from __future__ import annotations

import copy

import pytest
import torch

from loraflow.core.architecture import find_decoder_layers
from tests.zoo.bases import small_model
from tests.zoo.checks import BOUND, RANKS, Case
from tests.zoo.oracle import TokenByToken
from tests.zoo.replay import Reader
from tests.zoo.targets import targets_of


def cases(architecture, directory):
    base, reader = small_model(architecture), Reader()
    for targets in targets_of(base, find_decoder_layers(base.model), reader):
        yield Case(base, targets, reader, directory / targets.name.replace(" ", "-"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "deepseek_v3", "qwen3_moe", "gpt_oss", "mixtral"])
def test_an_adapter_by_itself_is_what_peft_gives(architecture, tmp_path):
    for case in cases(architecture, tmp_path):
        for position, name in enumerate(RANKS):
            expected = case.logits[name]
            merged = case.reader.at_once(case.merged(dict.fromkeys(RANKS, 0.0) | {name: 1.0}), case.words)
            assert case.error(merged, expected) < BOUND, case.targets
            with one_by_one(case, position).installed() as model:
                found = case.reader.step_by_step(model, case.words[:1], 1)
            assert case.error(found, expected[:1]) < BOUND, case.targets


def one_by_one(case, position):
    """The slow oracle with one adapter for every token."""

    def gate(x):
        return torch.eye(len(RANKS), dtype=x.dtype)[position].expand(*x.shape[:-1], -1)

    gates = dict.fromkeys(range(len(case.layers.layers)), gate)
    return TokenByToken(copy.deepcopy(case.base.model), case.updates, case.layers.prefix, gates, stepwise=True)

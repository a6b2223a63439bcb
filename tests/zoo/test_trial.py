"""Some of every kind of architecture, each with every check; `scripts/check_architectures.py` has all of them."""

from __future__ import annotations

import pytest

from tests.zoo.trial import try_architecture

# Dense, of other shapes and norms, grouped or latent attention, experts, states in place of attention, images.
TRIED = {
    "llama": ["linears"],
    "gpt2": ["linears"],
    "phi3": ["linears"],
    "gemma3_text": ["linears"],
    "deepseek_v3": ["linears", "without kv_b_proj", "experts"],
    "mixtral": ["linears", "experts", "all-linear"],
    "gpt_oss": ["linears", "experts"],
    "qwen3_next": ["linears"],
    "bamba": ["linears"],
    "zamba": ["linears"],
    "doge": ["without dt_proj"],
}


@pytest.mark.parametrize("architecture", TRIED)
def test_what_is_accepted_is_right(architecture):
    found = try_architecture(architecture)["targets"]
    for targets, row in found.items():
        bad = {check: detail for check, (kind, detail) in row.items() if kind in ("wrong", "raw")}
        assert not bad, targets
    for targets in TRIED[architecture]:
        # Zamba by itself says something else with a cache.
        allowed = {"ok", "unable"} if architecture == "zamba" else {"ok"}
        assert {kind for kind, _ in found[targets].values()} <= allowed, found[targets]

"""A bank behind the server: each adapter answers as it does alone, and is loaded when a request names it."""

from __future__ import annotations

import pytest

from loraflow import AdapterBank, FusedModel
from loraflow.serving.catalog import Catalog
from loraflow.serving.config import EngineLimits
from tests.serving.worlds import alone, job, running, send
from tests.tiny import byte_tokenizer, random_ids, save_adapter, tiny_model

NAMES = ("code", "law", "math", "zh")
PROMPT = [3 + int(token) for token in random_ids(1, 37)[0]]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("banked")
    base = tiny_model(vocab_size=259, max_position_embeddings=256)
    base.save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    for seed, name in enumerate(NAMES):
        save_adapter(base, root / "bank" / name, seed=seed, r=1 + seed)
    save_adapter(base, root / "late", seed=9)
    return root


def test_adapters_and_weights_answer_as_they_do_in_memory_and_others_come_and_go(root):
    catalog = Catalog.open(str(root / "base"), AdapterBank(root / "bank"))
    whole = FusedModel.from_adapters(
        root / "base", {**{name: root / "bank" / name for name in NAMES}, "late": root / "late"}, "base"
    )
    stock = catalog.model.attachment.stock
    assert stock.nbytes == 0
    mixed = catalog.with_weights(catalog.find("base"), {"law": 0.7, "zh": -0.4})

    def answers(*cases):
        limits = EngineLimits(requests=8, batch_tokens=64, cache_tokens=1024, page_tokens=16)
        with running(catalog.model, limits) as engine:
            heard = [send(engine, job(PROMPT, catalog.weigher(served, PROMPT), 12)) for served in cases]
            return [listener.ids() for listener in heard]

    weights = {"law": 0.7, "zh": -0.4}
    assert answers(catalog.find("code"), mixed) == [alone(whole, PROMPT, one, 12) for one in ("code", weights)]
    # Nobody asked for "math".
    assert stock.nbytes > 0
    assert not any(NAMES.index("math") in active for active in stock._kept)
    catalog.load("late", str(root / "late"))
    assert answers(*map(catalog.find, ("late", "math"))) == [alone(whole, PROMPT, one, 12) for one in ("late", "math")]
    catalog.withdraw("late")
    catalog.free()
    assert catalog.model.adapter_names == list(NAMES)
    assert answers(catalog.find("zh")) == [alone(whole, PROMPT, "zh", 12)]

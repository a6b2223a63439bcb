"""Pages of the cache that requests share: only where all that decides them is the same."""

from __future__ import annotations

import contextlib
import random
import re

import pytest
import torch

from loraflow import FusedModel, LoraFlow
from loraflow.methods import Arrow
from loraflow.serving.catalog import Catalog
from loraflow.serving.config import EngineLimits
from loraflow.serving.jobs import Weigher
from loraflow.serving.service import ServerConfig
from tests.serving.worlds import alone, call, job, running, send, serving, tiny_fusion
from tests.tiny import byte_tokenizer, random_ids, save_adapter, set_random_gates, tiny_model

PAGE = 8
LIMITS = EngineLimits(requests=8, batch_tokens=32, cache_tokens=1024, page_tokens=PAGE)


def prompt(length=37, seed=0):
    return random_ids(1, length, seed=seed)[0].tolist()


@contextlib.contextmanager
def counting(model):
    """How many tokens each forward of the model has."""
    counts = []
    handle = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(kwargs["input_ids"].shape[-1]), with_kwargs=True
    )
    try:
        yield counts
    finally:
        handle.remove()


def ask(engine, counts, served, tokens, salt=None, new=8):
    """The answer to a request, how many tokens were computed for it, and how many it took from the cache."""
    weigher = served if isinstance(served, Weigher) else served[0].weigher(served[1], tokens)
    request = job(tokens, weigher, new)
    request.prefix = weigher.prefix(salt)
    counts.clear()
    answer = send(engine, request).ids()
    return answer, sum(counts), request.cached or 0


# ---- One engine ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_fusion()


def test_a_common_beginning_is_computed_once(model):
    tokens, weigher = prompt(), Weigher(digest="base")
    with running(model, LIMITS) as engine, counting(model) as counts:
        first, computed, cached = ask(engine, counts, weigher, tokens)
        assert (first, computed, cached) == (alone(model, tokens, "base"), 37 + 7, 0)
        # What waits to be shared is in nobody's way.
        assert engine.cache_usage == pytest.approx(0)
        # Of 37 tokens, four pages are full.
        assert ask(engine, counts, weigher, tokens) == (first, 37 - 32 + 7, 32)
        # The next turn of a conversation: what was answered is shared too.
        longer = tokens + first + prompt(6, seed=1)
        assert ask(engine, counts, weigher, longer) == (alone(model, longer, "base"), len(longer) - 40 + 7, 40)
        # Another beginning with the same tokens after it.
        other = [tokens[0] ^ 1, *tokens[1:]]
        assert ask(engine, counts, weigher, other) == (alone(model, other, "base"), 37 + 7, 0)
        # A prompt of full pages: its last token is computed all the same, and with it its page.
        assert ask(engine, counts, weigher, tokens[:32]) == (alone(model, tokens[:32], "base"), 8 + 7, 24)


@pytest.mark.parametrize(
    "other",
    [(Weigher(digest="b"), None), (Weigher(digest="a"), "salt"), (Weigher(), None), (Weigher(), "salt")],
    ids=["weights", "salt", "unknown", "unknown, salt"],
)
def test_nothing_is_shared_where_anything_differs(model, other):
    tokens, (weigher, salt) = prompt(), other
    with running(model, LIMITS) as engine, counting(model) as counts:
        ask(engine, counts, Weigher(digest="a"), tokens)
        ask(engine, counts, Weigher(digest="a"), tokens, "another salt")
        assert ask(engine, counts, weigher, tokens, salt)[1:] == (37 + 7, 0)
        assert ask(engine, counts, weigher, tokens, salt)[2] == (0 if weigher.digest is None else 32)


def test_a_prompt_whose_tokens_are_told_is_read_whole(model):
    with running(model, LIMITS) as engine, counting(model) as counts:
        answer = ask(engine, counts, Weigher(digest="a"), prompt())[0]
        request = job(prompt())
        request.prefix, request.tells_prompt = Weigher(digest="a").prefix(None), True
        counts.clear()
        assert send(engine, request).ids() == answer
        assert (sum(counts), len(request.read)) == (37 + 7, 36)


def test_it_can_be_turned_off(model):
    limits = EngineLimits(requests=8, batch_tokens=32, cache_tokens=1024, page_tokens=PAGE, prefix_caching=False)
    with running(model, limits) as engine, counting(model) as counts:
        for _ in range(2):
            assert ask(engine, counts, Weigher(digest="a"), prompt())[1:] == (37 + 7, 0)


def test_bases_with_sliding_windows_share_nothing():
    model, tokens = tiny_fusion("mistral"), prompt()
    with running(model, LIMITS) as engine, counting(model) as counts:
        for _ in range(2):
            assert ask(engine, counts, Weigher(digest="a"), tokens) == (alone(model, tokens, "base"), 37 + 7, 0)


@pytest.mark.parametrize("seed", range(2))
def test_a_small_cache_forgets_and_answers_stay_the_same(model, seed):
    rng = random.Random(seed)
    beginnings = [prompt(24, seed=seed) for seed in range(4)]
    weighers = {"base": Weigher(digest="base"), "b": Weigher(weights=torch.tensor([[0.0, 1.0, 0.0]] * 3), digest="b")}
    cases = []
    for index in range(32):
        tokens = rng.choice(beginnings)[: rng.choice([9, 17, 24])] + prompt(rng.randint(1, 9), seed=100 + index)
        cases.append((tokens, rng.choice(["base", "b"]), rng.randint(1, 12)))
    expected = [alone(model, tokens, method, new=new) for tokens, method, new in cases]
    # Room for some three requests: pages are forgotten, and requests begun anew.
    limits = EngineLimits(requests=8, batch_tokens=24, cache_tokens=128, page_tokens=PAGE)
    with running(model, limits) as engine:
        requests = []
        for tokens, method, new in cases:
            request = job(tokens, weighers[method], new)
            request.prefix = weighers[method].prefix(None)
            requests.append((request, send(engine, request)))
        assert [listener.ids() for _, listener in requests] == expected
        assert sum(request.cached or 0 for request, _ in requests) > 0
        # One that needs all of it gets it.
        tokens = prompt(100, seed=9)
        assert ask(engine, [], weighers["base"], tokens, new=28)[0] == alone(model, tokens, "base", new=28)


# ---- What decides weights ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base, two adapters, another one of the same name, and fusions of them."""
    root = tmp_path_factory.mktemp("prefixes")
    base = tiny_model(vocab_size=259, max_position_embeddings=256)
    base.save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    for seed, name in enumerate(["zh", "math", "other/zh"]):
        save_adapter(base, root / name, seed=seed)
    for seed, name in enumerate(["flow", "refitted"]):
        fused = FusedModel.from_adapters(root / "base", {one: root / one for one in ("zh", "math")}, LoraFlow("layer"))
        set_random_gates(fused, seed)
        fused.save_pretrained(root / name)
    return root


@pytest.fixture
def catalog(root):
    adapters = {name: str(root / name) for name in ("zh", "math")}
    return Catalog.open(root / "base", adapters, {name: str(root / name) for name in ("flow", "refitted")})


def test_every_kind_of_weights_shares_with_itself_alone(catalog):
    tokens, flow = prompt(), catalog.find("flow")
    kinds = {name: catalog.find(name) for name in catalog.served}
    kinds |= {f"weights {w}": catalog.with_weights(flow, {"zh": w}) for w in (0.5, 0.5000001)}
    kinds |= {f"arrow {k}": catalog.with_method(flow, "arrow", {"top_k": k}) for k in (1, 2)}
    kinds |= {name: catalog.with_method(flow, name, {}) for name in ("average", "qa-flora", "logo")}
    assert isinstance(kinds["arrow 1"].method, Arrow)
    with running(catalog.model, LIMITS) as engine, counting(catalog.model) as counts:
        answers = {}
        for name, served in kinds.items():
            answers[name], computed, cached = ask(engine, counts, (catalog, served), tokens)
            # Methods that read the prompt do that first, in forwards of their own.
            assert (computed - 37 - 7 >= 0, cached) == (True, 0), name
        for name, served in kinds.items():
            assert ask(engine, counts, (catalog, served), tokens)[::2] == (answers[name], 32), name


def test_weights_that_a_prompt_decides_belong_to_it(catalog):
    served = catalog.with_method(catalog.find("flow"), "qa-flora", {})
    tokens = prompt()
    first, again = (catalog.weigher(served, tokens) for _ in range(2))
    other = catalog.weigher(served, [*tokens[:32], *prompt(5, seed=8)])
    assert first.digest == again.digest
    assert (first.digest == other.digest) == torch.equal(first.weights, other.weights)
    assert not torch.equal(first.weights, other.weights)


def test_another_adapter_of_the_same_name_shares_nothing_and_the_first_one_again_does(root):
    catalog = Catalog.open(root / "base", {name: str(root / name) for name in ("zh", "math")})
    tokens = prompt()
    with running(catalog.model, LIMITS) as engine, counting(catalog.model) as counts:

        def replace(path):
            catalog.withdraw("zh")
            catalog.free()
            catalog.load("zh", str(root / path))
            return ask(engine, counts, (catalog, catalog.find("zh")), tokens)

        answer = ask(engine, counts, (catalog, catalog.find("zh")), tokens)[0]
        other, computed, cached = replace("other/zh")
        assert (computed, cached) == (37 + 7, 0)
        assert other != answer
        assert replace("zh") == (answer, 37 - 32 + 7, 32)


# ---- A server ------------------------------------------------------------------------------------------------------


def test_a_server_counts_what_was_found(catalog):
    config = ServerConfig(limits=LIMITS)
    with serving(catalog, config) as (_, address):

        def post(**more):
            body = {"model": "flow", "prompt": prompt(), "max_tokens": 4, "temperature": 0, **more}
            answer = call("POST", f"{address}/v1/completions", body)
            assert answer.status == 200, answer.text
            metrics = call("GET", f"{address}/metrics").text
            found = [
                float(re.search(rf"^vllm:prefix_cache_{name}_total\{{.*\}} (\S+)$", metrics, re.MULTILINE)[1])
                for name in ("queries", "hits")
            ]
            return answer.json()["choices"][0]["text"], found

        text, found = post()
        assert found == [37, 0]
        assert post() == (text, [74, 32])
        assert post(cache_salt="mine") == (text, [111, 32])
        assert post(cache_salt="mine") == (text, [148, 64])
        assert post(cache_salt="theirs") == (text, [185, 64])

"""The model `auto`: which adapters it picks for a request, what it says of them, and that it answers by them."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import threading
from dataclasses import dataclass

import openai
import pytest
import torch

from loraflow import (
    Arrow,
    Centroid,
    FusedModel,
    Logo,
    LoraRetriever,
    Method,
    Phatgoose,
    PromptFormat,
    QaFlora,
    QueryMethod,
)
from loraflow.core.probe import Prompt
from loraflow.errors import LoraflowError, MethodError
from loraflow.methods.base import QueryGate
from loraflow.serving.auto import AUTO, TOP_K, Auto, Picking
from loraflow.serving.catalog import Catalog
from loraflow.serving.config import EngineLimits
from loraflow.serving.picking import check_method, limited, pick
from loraflow.serving.service import ServerConfig
from tests.serving.worlds import DEADLINE_S, alone, call, job, running, send, serving, wait_for
from tests.tiny import byte_tokenizer, save_adapter, set_random_gates, tiny_model

LIMITS = EngineLimits(requests=16, batch_tokens=64, cache_tokens=4096, page_tokens=16)
NAMES = ("zh", "math", "code", "law", "es")
TARGETS = (None, ["q_proj", "o_proj"], ["q_proj", "up_proj", "down_proj"], ["q_proj"], None)
ADMIN = {"Authorization": "Bearer boss"}
GREEDY = {"temperature": 0, "max_tokens": 10}
PROMPTS = ("17 and 4 is", "Wie geht es?", "def main():", "x", "Anna has 3 apples and eats one of them, then")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base, adapters of unequal ranks and targets, and fusions of some of them by methods that were fitted."""
    root = tmp_path_factory.mktemp("auto")
    base = tiny_model(vocab_size=259, max_position_embeddings=256)
    base.save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    for seed, (name, targets) in enumerate(zip(NAMES, TARGETS, strict=True)):
        save_adapter(base, root / name, targets, seed=seed, r=seed + 1, use_rslora=seed == 2)
    for name, method in (("cents", Centroid(center=False)), ("goose", Phatgoose())):
        model = made(root, NAMES[:3], method)
        if name == "cents":
            model.gates["model"].set_samples(torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(1)).unbind())
        else:
            set_random_gates(model, 1)
        model.save_pretrained(root / name)
    return root


@functools.cache
def made(root, names, method="average"):
    """These adapters alone in a model of their own."""
    return FusedModel.from_adapters(root / "base", {name: root / name for name in names}, method)


def opened(root, auto, names=NAMES, **options):
    fusions = {name: str(root / name) for name in ("cents", "goose")}
    adapters = {name: str(root / name) for name in names}
    prompt = PromptFormat(template="{prompt}")
    return Catalog.open(root / "base", adapters, fusions, base_id="tiny", prompt=prompt, auto=auto, **options)


@pytest.fixture(scope="module")
def catalog(root):
    return opened(root, Auto("logo", top_k=2))


def ids_of(catalog, text):
    return catalog.model.tokenizer(text)["input_ids"]


def picked(catalog, text, method=None, **wish):
    """The weigher of a prompt, of one request to `auto`."""
    return catalog.weigher(catalog.with_picks(catalog.find(AUTO), method=method, **wish), ids_of(catalog, text))


# ---- What is picked ------------------------------------------------------------------------------------------------


def slow_pick(scores, top_k, floor, allowed):
    """The rule in a loop: of the allowed, the best again and again, until there are enough or the rest is too low."""
    left, found = [name for name in scores if name in allowed], []
    while left and len(found) < top_k:
        best = left[0]
        for name in left:
            best = name if scores[name] > scores[best] else best
        if floor is not None and scores[best] < floor:
            break
        found.append(best)
        left.remove(best)
    return found


@pytest.mark.parametrize("method", [Logo(), Logo("entropy"), QaFlora(), QaFlora("cosine", "all")], ids=str)
@pytest.mark.parametrize("allowed", [NAMES, NAMES[1:4]], ids=len)
def test_the_best_are_picked_and_weighed_as_if_there_were_no_others(root, catalog, method, allowed):
    asked = method.name, {name: value for name, value in method.parameters().items() if name != "top_k"}
    for text in PROMPTS[:2]:
        whole = made(root, NAMES, method).weigh(torch.tensor([ids_of(catalog, text)]))[0]
        everything = picked(catalog, text, asked, top_k=len(NAMES)).picks
        assert (len(everything.scores), everything.candidates, everything.measure) == (5, 5, method.measure)
        scores = {name: everything.scores[name] for name in NAMES}
        middle = sorted(scores.values())[2]
        for top_k, floor in ((1, None), (2, None), (9, None), (3, middle), (None, None), (2, 1e9)):
            weigher = picked(catalog, text, asked, adapters=allowed, top_k=top_k, floor=floor)
            expected = slow_pick(scores, top_k or 2, floor, allowed)
            assert list(weigher.picks.weights) == expected
            assert weigher.adapters == tuple(name for name in NAMES if name in expected)
            assert weigher.picks.candidates == len(allowed)
            if not expected:
                assert (weigher.weights, weigher.gates) == (None, {})
                continue
            few = whole[:, [NAMES.index(name) for name in weigher.adapters]]
            few = few / few.sum(dim=-1, keepdim=True)
            torch.testing.assert_close(weigher.weights, few, rtol=1e-5, atol=1e-7)
            means = dict(zip(weigher.adapters, few.double().mean(dim=0).tolist(), strict=True))
            assert weigher.picks.weights == pytest.approx(means, rel=1e-5)
            told = {name: scores[name] for name in sorted(allowed, key=lambda name: -scores[name])}
            assert weigher.picks.scores == pytest.approx(told, rel=1e-5)


def test_a_fusions_method_picks_from_its_own_adapters(root):
    catalog = opened(root, Auto("cents", top_k=2))
    assert catalog.adapters_of(catalog.find(AUTO)) == NAMES[:3]
    model = FusedModel.from_pretrained(root / "cents")
    for text in PROMPTS[:3]:
        whole = model.weigh(torch.tensor([ids_of(catalog, text)]))[0, 0]
        weigher = picked(catalog, text)
        best = sorted(whole.topk(2).indices.tolist())
        expected = whole[best] / whole[best].sum()
        assert weigher.adapters == tuple(NAMES[i] for i in best)
        torch.testing.assert_close(weigher.weights, expected.expand(3, -1), rtol=1e-4, atol=1e-6)
        cosines = list(weigher.picks.scores.values())
        assert (weigher.picks.measure, cosines) == ("cosine", sorted(cosines, reverse=True))
        assert all(abs(cosine) <= 1 for cosine in cosines)
        # The centroids of the others are there still.
        one = picked(catalog, text, adapters=["code"])
        assert (one.adapters, one.picks.weights) == (("code",), {"code": pytest.approx(1)})
        assert one.picks.scores == {"code": weigher.picks.scores["code"]}


def test_retrieved_adapters_have_their_shares_as_if_there_were_no_others(root, tmp_path):
    model = FusedModel.from_pretrained(root / "cents")
    kept = model.gates["model"].kept_samples()
    model.set_method(LoraRetriever(center=False))
    model.gates["model"].set_samples(kept)
    model.save_pretrained(tmp_path / "retriever")
    catalog = Catalog.open(None, None, {"picks": str(tmp_path / "retriever")}, auto=Auto("picks"))
    for text in PROMPTS[:3]:
        whole = picked(catalog, text, top_k=3)
        assert (whole.picks.measure, len(whole.adapters)) == ("inner product", 3)
        assert whole.weights.flatten().tolist() == pytest.approx([1 / 3] * 9)
        one = picked(catalog, text, top_k=1)
        assert one.picks.weights == {next(iter(whole.picks.scores)): pytest.approx(1)}
        for name in NAMES[:3]:
            assert picked(catalog, text, adapters=[name]).picks.weights == {name: pytest.approx(1)}
        best, second, _ = whole.picks.scores.values()
        assert len(picked(catalog, text, floor=(best + second) / 2).adapters) == 1


class Fixed(QueryMethod):
    """Weights that are given, with no scores."""

    name, place = "fixed", "model"

    def weigh(self, query, gate):
        return torch.tensor(gate.weights, dtype=torch.float64)


def weighing(weights):
    gate = QueryGate()
    gate.weights = weights
    return gate


@pytest.mark.parametrize(
    ("weights", "top_k", "floor", "expected"),
    [
        ([0.5, 0.1, 0.4], 2, None, {"zh": 0.5, "code": 0.4}),
        # Equal ones in their order.
        ([0.3, 0.3, 0.3], 2, None, {"zh": 0.3, "math": 0.3}),
        ([0.5, 0.1, 0.4], None, 0.45, {"zh": 0.5}),
        ([0.5, 0.1, 0.4], None, 0.6, {}),
        # A weight of zero is none; a negative one is the lowest.
        ([0.0, -0.5, 0.4], None, None, {"code": 0.4, "math": -0.5}),
        ([[1.0, 0.0, 0.0], [0.0, 0.0, 0.5], [0.2, 0.0, 0.0]], None, None, {"zh": 0.4, "code": 0.5 / 3}),
        ([0.0, 0.0, 0.0], None, None, {}),
    ],
)
def test_without_scores_weights_are_the_scores_and_stay_what_they_are(root, weights, top_k, floor, expected):
    model = made(root, NAMES[:3])
    prompt = Prompt(model.attachment, torch.tensor([5, 6]))
    picks, names, found = pick(Fixed(), weighing(weights), prompt, Picking(NAMES[:3], top_k, floor))
    assert list(picks.weights.items()) == [(name, pytest.approx(weight)) for name, weight in expected.items()]
    assert picks.measure == "fusion weight"
    assert names == [name for name in NAMES[:3] if name in expected]
    rows = torch.tensor(weights, dtype=torch.float64).expand(3, -1)
    assert torch.equal(found, rows[:, [NAMES.index(name) for name in names]])


def test_a_score_that_is_no_number_is_told(root):
    model = made(root, NAMES[:3])
    gate, prompt = weighing([0.1, math.nan, 0.2]), Prompt(model.attachment, torch.tensor([5, 6]))
    with pytest.raises(
        MethodError, match=r"The method 'fixed' scores the adapter 'math' with no number\. Leave it out"
    ):
        pick(Fixed(), gate, prompt, Picking(NAMES[:3], None, None))
    assert pick(Fixed(), gate, prompt, Picking(("zh", "code"), None, None))[1] == ["zh", "code"]


def test_only_the_best_of_many_are_told(root):
    many = {f"a{i}": root / "law" for i in range(12)}
    model = FusedModel.from_adapters(root / "base", many)
    prompt = Prompt(model.attachment, torch.tensor([5, 6]))
    weights = [float(i) for i in range(12)]
    picks = pick(Fixed(), weighing(weights), prompt, Picking(tuple(many), None, None))[0]
    assert list(picks.weights) == ["a11", "a10", "a9"]
    assert list(picks.scores) == [f"a{i}" for i in range(11, 3, -1)]
    assert (picks.candidates, len(picks.weights)) == (12, TOP_K)


class Crossing(Fixed):
    """One that mixes A and B each."""

    mixing = "parameters"


@dataclass(frozen=True)
class PerToken(Method):
    """One that weighs each token, and has no `top_k`."""

    name, level, place = "per-token", "token", "layer"

    def gate(self, site):
        return None


def test_methods_that_cannot_be_limited_are_told():
    message = (
        "The method 'fixed' does not only weigh the adapters' outputs, so that `auto` cannot leave any of them out"
    )
    with pytest.raises(MethodError, match=re.escape(message)):
        check_method(Crossing())
    check_method(Fixed())
    with pytest.raises(MethodError, match=r"The method 'per-token' has no `top_k` \(=2\)\. Leave it out\."):
        limited(PerToken(), Picking(("a", "b", "c"), 2, None))
    assert limited(Arrow(temperature=2.0), Picking(("a", "b"), 3, None)) == Arrow(2, 2.0)
    assert limited(Arrow(), Picking(("a", "b"), None, None)) == Arrow()
    assert limited(Logo(), Picking(("a",), 3, 0.5)) == Logo()


# ---- One step for all ----------------------------------------------------------------------------------------------


def test_rows_of_one_step_with_different_picks_are_answered_as_alone(root, catalog):
    cases = [(text, {}) for text in PROMPTS]
    cases += [(PROMPTS[0], {"top_k": 1}), (PROMPTS[1], {"adapters": ["law", "es"]}), (PROMPTS[2], {"floor": 1e9})]
    cases += [(PROMPTS[3], {"method": ("qa-flora", {}), "top_k": 3}), (PROMPTS[4], {"method": ("arrow", {})})]
    weighers = [picked(catalog, text, **wish) for text, wish in cases]
    assert len({weigher.adapters for weigher in weighers}) > 4
    with running(catalog.model, LIMITS) as engine:
        heard = [
            send(engine, job(ids_of(catalog, text), weigher, 10))
            for (text, _), weigher in zip(cases, weighers, strict=True)
        ]
        found = [listener.ids() for listener in heard]
    for (text, wish), weigher, answer in zip(cases, weighers, found, strict=True):
        method = {"qa-flora": QaFlora(), "arrow": Arrow(2)}.get(wish.get("method", ("",))[0], Logo())
        method = method if weigher.adapters else "base"
        few = made(root, weigher.adapters or NAMES[:1], method)
        assert answer == alone(few, ids_of(catalog, text), new=10), (text, wish)


def test_the_cache_is_shared_by_what_was_picked_and_its_weights(catalog):
    text = PROMPTS[4]
    one = picked(catalog, text, top_k=1)
    (name,) = one.adapters
    # Whoever else was a candidate, and by whatever floor.
    assert picked(catalog, text, adapters=[name], floor=-5.0).digest == one.digest
    assert picked(catalog, text, top_k=2).digest != one.digest
    assert picked(catalog, PROMPTS[0], top_k=1, adapters=[name]).digest == one.digest
    base = catalog.weigher(catalog.find("tiny"), [1])
    assert picked(catalog, text, floor=1e9).digest == base.digest
    pair = [picked(catalog, text, adapters=["zh", "es"]).digest for text in PROMPTS[:2]]
    assert pair[0] != pair[1]


# ---- A server ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(catalog):
    with serving(catalog, ServerConfig(limits=LIMITS, max_new_tokens=64)) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="any", max_retries=0, timeout=DEADLINE_S) as client:
        yield client


def expected(catalog, root, text, new=10, **wish):
    """The answer's text by a model of the picked adapters alone, and what is said of them."""
    weigher = picked(catalog, text, **wish)
    few = made(root, weigher.adapters or NAMES[:1], "logo" if weigher.adapters else "base")
    ids = alone(few, ids_of(catalog, text), new=new)
    return catalog.model.tokenizer.decode(ids, skip_special_tokens=True), weigher.picks.as_json()


def chat(client, text, auto=None, **more):
    extra = {} if auto is None else {"auto": auto}
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=AUTO, messages=messages, extra_body=extra, **{**GREEDY, **more})


def test_a_chat_is_answered_and_says_by_whom_and_why(catalog, root, client):
    for text in PROMPTS[:3]:
        said, picks = expected(catalog, root, text)
        answer = chat(client, text)
        (choice,) = answer.choices
        assert (choice.message.content, choice.auto) == (said, picks)
        assert len(choice.auto["adapter_weights"]) == 2
        assert sum(choice.auto["adapter_weights"].values()) == pytest.approx(1, abs=1e-4)
        assert list(choice.auto["scores"]) == sorted(NAMES, key=lambda name: -choice.auto["scores"][name])
        assert (choice.auto["measure"], choice.auto["candidates"]) == ("norm of the update", 5)
        assert (answer.model, answer.fusion["method"]) == (AUTO, "logo")
        assert answer.fusion["adapters"] == [name for name in NAMES if name in choice.auto["adapter_weights"]]
        # What it says can be asked for, of any adapters.
        body = {"adapter_weights": choice.auto["adapter_weights"]}
        again = client.completions.create(model="tiny", prompt=text, extra_body=body, **GREEDY)
        assert again.choices[0].text == said


def test_requests_limit_it(catalog, root, client):
    text = PROMPTS[0]
    for wish in ({"adapters": ["law", "es"]}, {"top_k": 1}, {"top_k": 9}, {"floor": 1e9}, {"adapters": ["zh"]}, {}):
        said, picks = expected(catalog, root, text, **wish)
        (choice,) = chat(client, text, wish).choices
        assert (choice.message.content, choice.auto) == (said, picks)
    alone_by_base = client.completions.create(model="tiny", prompt=text, **GREEDY).choices[0].text
    (choice,) = chat(client, text, {"floor": 1e9}).choices
    assert (choice.message.content, choice.auto["adapter_weights"]) == (alone_by_base, {})
    assert len(choice.auto["scores"]) == 5


def test_streams_tell_it_with_their_first_chunk(catalog, root, client):
    text = PROMPTS[1]
    said, picks = expected(catalog, root, text)
    chunks = [chunk.choices[0] for chunk in chat(client, text, n=2, stream=True)]
    for index in range(2):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.delta.content for chunk in mine) == said
        assert [getattr(chunk, "auto", None) for chunk in mine] == [picks] + [None] * (len(mine) - 1)
    messages = [{"role": "user", "content": text}]
    with client.chat.completions.stream(model=AUTO, messages=messages, temperature=0, max_tokens=64) as stream:
        for _ in stream:
            pass
        # Its end would refuse an answer that was cut.
        assert stream.current_completion_snapshot.choices[0].auto == picks


def test_each_prompt_of_a_request_has_its_own_picks(catalog, root, client):
    texts = list(PROMPTS)
    found = [expected(catalog, root, text) for text in texts]
    answer = client.completions.create(model=AUTO, prompt=texts, n=2, **GREEDY)
    assert [choice.text for choice in answer.choices] == [said for said, _ in found for _ in range(2)]
    assert [choice.auto for choice in answer.choices] == [picks for _, picks in found for _ in range(2)]
    together = {name for _, picks in found for name in picks["adapter_weights"]}
    assert set(answer.fusion["adapters"]) == together
    chunks = [c.choices[0] for c in client.completions.create(model=AUTO, prompt=texts, stream=True, **GREEDY)]
    for index, (said, picks) in enumerate(found):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.text for chunk in mine) == said
        assert [chunk.auto for chunk in mine if hasattr(chunk, "auto")] == [picks]


def test_echo_and_weights_of_tokens_are_of_the_picked(catalog, root, client):
    text = PROMPTS[4]
    said, picks = expected(catalog, root, text)
    extra = {"return_fusion_weights": "all"}
    body = {"model": AUTO, "prompt": text, "echo": True, "logprobs": 1, "temperature": 0}
    (choice,) = client.completions.create(**body, max_tokens=10, extra_body=extra).choices
    assert (choice.text, choice.auto) == (text + said, picks)
    names = [name for name in NAMES if name in picks["adapter_weights"]]
    assert choice.fusion_weights["adapters"] == names
    for token in choice.fusion_weights["weights"]:
        for layer in token:
            assert dict(zip(names, layer, strict=True)) == pytest.approx(picks["adapter_weights"], abs=2e-5)
    (choice,) = client.completions.create(**body, max_tokens=0).choices
    assert (choice.text, choice.auto) == (text, picks)
    # The base has none, and says so by empty lists.
    (choice,) = client.completions.create(**body, max_tokens=3, extra_body={**extra, "auto": {"floor": 1e9}}).choices
    assert choice.fusion_weights["adapters"] == []
    assert choice.fusion_weights["weights"] == [[[], [], []]] * len(choice.fusion_weights["tokens"])


def test_another_method_may_pick_for_a_request(catalog, root, client):
    text = PROMPTS[0]
    extra = {"fusion": {"method": "qa-flora", "options": {"distance": "cosine"}}, "auto": {"top_k": 1}}
    answer = client.completions.create(model=AUTO, prompt=text, extra_body=extra, **GREEDY)
    weigher = picked(catalog, text, ("qa-flora", {"distance": "cosine"}), top_k=1)
    assert answer.choices[0].auto == weigher.picks.as_json()
    assert answer.choices[0].auto["measure"] == "cosine distance"
    assert answer.fusion["parameters"]["distance"] == "cosine"


@pytest.mark.parametrize("stream", [False, True])
def test_methods_that_weigh_each_token_tell_their_means_at_the_end(root, client, stream):
    text = PROMPTS[2]
    extra = {"fusion": {"method": "arrow"}, "auto": {"adapters": ["zh", "code", "es"], "top_k": 1}}
    body = {"model": AUTO, "prompt": text, "n": 2, **GREEDY}
    if stream:
        chunks = list(client.completions.create(**body, stream=True, extra_body=extra))
        texts = ["".join(c.choices[0].text for c in chunks if c.choices[0].index == i) for i in range(2)]
        told = [c.choices[0].auto for c in chunks if hasattr(c.choices[0], "auto")]
        assert all(hasattr(c.choices[0], "auto") == (c.choices[0].finish_reason is not None) for c in chunks)
    else:
        choices = client.completions.create(**body, extra_body=extra).choices
        texts, told = [choice.text for choice in choices], [choice.auto for choice in choices]
    few = made(root, ("zh", "code", "es"), Arrow(1))
    ids = alone(few, few.tokenizer(text)["input_ids"], new=10)
    assert texts == [few.tokenizer.decode(ids, skip_special_tokens=True)] * 2
    assert told[0] == told[1]
    assert (told[0]["scores"], told[0]["measure"], told[0]["candidates"]) == (None, None, 3)
    # One adapter in each linear.
    assert sum(told[0]["adapter_weights"].values()) == pytest.approx(1, abs=1e-3)
    extra["return_fusion_weights"] = True
    (choice,) = client.completions.create(**{**body, "n": 1}, extra_body=extra).choices
    rows = choice.fusion_weights["weights"]
    for place, name in enumerate(choice.fusion_weights["adapters"]):
        mean = sum(row[place] for row in rows) / len(rows)
        assert choice.auto["adapter_weights"].get(name, 0) == pytest.approx(mean, abs=1e-4)


def test_it_is_listed_with_what_it_picks_from(catalog, client):
    assert [model.id for model in client.models.list()][-1] == AUTO
    card = client.models.retrieve(AUTO)
    assert (card.kind, card.method, card.parent, tuple(card.adapters)) == ("auto", "logo", "tiny", NAMES)


def counters(address):
    lines = call("GET", f"{address}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_what_is_picked_is_counted_and_logged(catalog, client, server, caplog):
    address = server[1]
    before = counters(address)
    with caplog.at_level("INFO", logger="loraflow.serving"):
        answers = [chat(client, text) for text in PROMPTS[:3]]
        chat(client, PROMPTS[0], {"floor": 1e9})
    after = counters(address)

    def grown(name):
        return after.get(name, 0) - before.get(name, 0)

    for name in NAMES:
        mine = [one for one in answers if name in one.choices[0].auto["adapter_weights"]]
        label = f'{{adapter="{name}"}}'
        assert grown(f"loraflow:auto_requests_total{label}") == len(mine)
        tokens = sum(one.usage.completion_tokens for one in mine)
        assert grown(f"loraflow:auto_generation_tokens_total{label}") == tokens
        weight = sum(one.choices[0].auto["adapter_weights"][name] for one in mine)
        assert grown(f"loraflow:auto_weight_total{label}") == pytest.approx(weight, abs=1e-4)
    assert grown("loraflow:auto_base_alone_total") == 1
    assert grown('loraflow:requests_total{model="auto",outcome="finished"}') == 4
    facts = [json.loads(record.message) for record in caplog.records if '"picked"' in record.message]
    assert [list(one["picked"]) for one in facts] == [
        *(list(one.choices[0].auto["adapter_weights"]) for one in answers),
        [],
    ]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"auto": {"adapters": ["mth"]}}, "auto", "`adapters` names the unknown adapter 'mth'. Known: 'code', 'es',"),
        ({"auto": {"adapters": ["mth"]}}, "auto", "Did you mean 'math'?"),
        ({"auto": {"adapters": ["math", "math"]}}, "auto", "`adapters` names 'math' twice. Name each once."),
        ({"auto": {"adapters": ["cents"]}}, "auto", "`adapters` names the unknown adapter 'cents'."),
        ({"auto": {"adapters": []}}, "auto.adapters", "at least 1 item"),
        ({"auto": {"top_k": 0}}, "auto.top_k", "greater than or equal to 1"),
        ({"auto": {"top_k": True}}, "auto.top_k", "valid integer"),
        ({"auto": {"floor": "low"}}, "auto.floor", "valid number"),
        ({"auto": {"most": 2}}, "auto.most", "unknown or not supported"),
        ({"auto": True}, "auto", ""),
        ({"top_k": 2}, "top_k", "is not supported, only -1 or 0 is"),
        ({"adapters": ["math"]}, "adapters", "unknown or not supported"),
        ({"adapter_weights": {"math": 1}}, "adapter_weights", "`adapter_weights` says what 'auto' is there to find."),
        ({"model": "math", "auto": {}}, "auto", "`auto` is for the model 'auto', and 'math' is asked."),
        ({"fusion": {"method": "average"}}, "fusion", "The method 'average' weighs all requests alike, and `auto`"),
        ({"fusion": {"method": "math"}}, "fusion", "weighs all requests alike"),
        ({"fusion": {"method": "centroid"}}, "fusion", "The method 'centroid' learns, and a request cannot wait"),
        (
            {"fusion": {"method": "logo", "options": {"top_k": 2}}},
            "fusion",
            "`top_k` (=2) is among the method's options",
        ),
        ({"fusion": {"method": "logo", "options": {"scor": "norm"}}}, "fusion", "Did you mean 'score'?"),
        (
            {"fusion": {"method": "arrow"}, "auto": {"floor": 0.5}},
            "fusion",
            "has no score of a request that the `floor`",
        ),
        ({"return_fusion_weights": "every"}, "return_fusion_weights", ""),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_told(server, body, param, message):
    answer = call("POST", f"{server[1]}/v1/completions", {"model": AUTO, "prompt": "x", **body})
    error = answer.json()["error"]
    assert answer.status == 400, error
    assert message in error["message"]
    assert (error["param"] or "").startswith(param)


# ---- Coming and going ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def changing(root, auto, names):
    config = ServerConfig(limits=LIMITS, max_new_tokens=200, admin_keys=("boss",), load_from=(root,))
    with serving(opened(root, auto, names), config) as running_server:
        yield running_server


def post(address, path, **body):
    return call("POST", f"{address}/v1/{path}", body, **(ADMIN if "lora_name" in body else {}))


def ask(address, text=PROMPTS[4], **more):
    answer = post(address, "completions", model=AUTO, prompt=text, **{**GREEDY, **more})
    assert answer.status == 200, answer.text
    return answer.json()["choices"][0]


def test_it_picks_from_those_that_are_there_and_old_requests_end_as_they_began(root):
    catalog = opened(root, Auto("logo", top_k=9))
    order = list(picked(catalog, PROMPTS[4]).picks.scores)
    # The fusions need the first three.
    movable = [name for name in order if name not in NAMES[:3]]
    with changing(root, Auto("logo", top_k=1), NAMES[:3]) as (service, address):
        first = next(name for name in order if name in NAMES[:3])
        whole = ask(address, max_tokens=150)
        assert list(whole["auto"]["adapter_weights"]) == [first]
        for name in movable:
            assert post(address, "load_lora_adapter", lora_name=name, lora_path=str(root / name)).status == 200
        everybody = ask(address)["auto"]
        assert (list(everybody["scores"]), everybody["candidates"]) == (order, 5)
        # One that runs by an adapter that leaves.
        limited = {"adapters": [movable[0]]}
        quiet = ask(address, max_tokens=150, auto=limited)
        found = []
        thread = threading.Thread(target=lambda: found.append(ask(address, max_tokens=150, auto=limited)))
        thread.start()
        wait_for(lambda: service.engine.running or not thread.is_alive())
        assert post(address, "unload_lora_adapter", lora_name=movable[0]).status == 200
        thread.join(DEADLINE_S)
        assert found == [quiet]
        assert ask(address)["auto"]["candidates"] == 4
        answer = post(address, "completions", model=AUTO, prompt="x", auto=limited)
        assert answer.status == 400
        assert f"names the unknown adapter {movable[0]!r}" in answer.json()["error"]["message"]
        assert f'adapter="{movable[0]}"' not in call("GET", f"{address}/metrics").text
        card = call("GET", f"{address}/v1/models/{AUTO}").json()
        assert set(card["adapters"]) == {*NAMES[:3], movable[1]}
        assert ask(address, max_tokens=150, auto={"adapters": list(NAMES[:3])}) == {**whole}


def test_it_stays_and_so_does_the_fusion_that_it_picks_by(root):
    with changing(root, Auto("cents"), NAMES[3:]) as (_, address):
        for name, message in (
            (AUTO, "'auto' is what picks among the adapters, which stays."),
            ("cents", "The fusion 'cents' is needed by 'auto', which picks by its method. It stays."),
            ("zh", "The adapter 'zh' is needed by 'cents'"),
        ):
            answer = post(address, "unload_lora_adapter", lora_name=name)
            assert (answer.status, message in answer.json()["error"]["message"]) == (400, True), answer.text
        answer = post(address, "load_lora_adapter", lora_name=AUTO, lora_path=str(root / "law"))
        assert "There is a model 'auto' already." in answer.json()["error"]["message"]
        # Those that it was not fitted on come and go.
        assert post(address, "unload_lora_adapter", lora_name="law").status == 200
        assert ask(address)["auto"]["candidates"] == 3


def test_without_adapters_there_is_nothing_to_pick_from(root):
    catalog = Catalog.open(root / "base", {"zh": str(root / "zh")}, base_id="tiny", auto=Auto("logo"))
    assert list(picked(catalog, "x").picks.weights) == ["zh"]
    catalog.withdraw("zh")
    catalog.free()
    with pytest.raises(MethodError, match=r"There are no adapters that `auto` could pick\. Load one, or ask for"):
        picked(catalog, "x")
    catalog.load("law", str(root / "law"))
    assert list(picked(catalog, "x").picks.weights) == ["law"]


def test_an_adapter_that_the_method_cannot_compare_does_not_come_in(root, tmp_path):
    base = tiny_model(vocab_size=259, max_position_embeddings=256)
    odd = save_adapter(base, tmp_path / "odd", ["down_proj"], seed=9)
    catalog = Catalog.open(root / "base", {"zh": str(root / "zh"), "law": str(root / "law")}, auto=Auto("logo"))
    before = dict(catalog.served)
    with pytest.raises(MethodError, match="LoGo compares the adapters at one linear of the last layer"):
        catalog.load("odd", odd)
    assert (catalog.served, catalog.model.adapter_names) == (before, ["zh", "law"])
    assert picked(catalog, "x").picks.candidates == 2
    with pytest.raises(MethodError, match="LoGo compares the adapters"):
        Catalog.open(root / "base", {"law": str(root / "law"), "odd": odd}, auto=Auto("logo"))


# ---- What cannot be served -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("auto", "message"),
    [
        (("lgo",), "`auto` cannot pick by 'lgo': there is no such method, and no such fusion here. Known: "),
        (("lgo",), "Did you mean 'logo'?"),
        (("cent",), "Did you mean 'cents'?"),
        (("math",), "`auto` cannot pick by 'math': there is no such method"),
        (("average",), "The method 'average' weighs all requests alike"),
        (("base",), "The method 'base' weighs all requests alike"),
        (("arrow", {"on_top": ["zh"]}), "`on_top` (=['zh']) is among the method's options, and what is picked has"),
        (("centroid",), "The method 'centroid' learns, and picks nothing before. Fit it (`loraflow fit`)"),
        (("lora-flow",), "The method 'lora-flow' learns, and picks nothing before."),
        (("logo", {"top_k": 2}), "`top_k` (=2) is among the method's options, and `auto` says how many are picked."),
        (("logo", {"scor": 2}), "Did you mean 'score'?"),
        (("cents", {"temperature": 2}), "'cents' is a fusion, whose method has its own parameters, and `auto` has"),
        (("goose", {}, 2), "The method 'phatgoose' weighs each token by what it learned of all its adapters together"),
        (("arrow", {}, None, 0.5), "The method 'arrow' weighs each token anew, and has no score of a request"),
    ],
    ids=str,
)
def test_what_cannot_pick_is_told_when_the_server_starts(root, catalog, auto, message):
    del catalog
    with pytest.raises(MethodError, match=re.escape(message)):
        opened(root, Auto(*auto), NAMES[:3])


def test_numbers_are_checked_and_the_name_is_its_own(root):
    for top_k in (0, -1, True):
        with pytest.raises(LoraflowError, match=rf"The `top_k` of `auto` \(={top_k}\) must be at least 1"):
            Auto("logo", top_k=top_k)
    for floor in (math.nan, math.inf):
        with pytest.raises(LoraflowError, match=rf"The `floor` of `auto` \(={floor}\) must be a finite number"):
            Auto("logo", floor=floor)
    adapters = {AUTO: str(root / "zh")}
    with pytest.raises(LoraflowError, match=r"Two models are called 'auto'\. Give each a name of its own\."):
        Catalog.open(root / "base", adapters, auto=Auto("logo"))
    assert Catalog.open(root / "base", adapters).find(AUTO).kind == "adapter"


def test_a_fusion_that_weighs_each_token_may_pick(root):
    catalog = opened(root, Auto("goose"), NAMES[:3])
    model = FusedModel.from_pretrained(root / "goose")
    weigher = picked(catalog, PROMPTS[0])
    assert (weigher.picks, weigher.adapters) == (None, NAMES[:3])
    with running(catalog.model, LIMITS) as engine:
        answer = send(engine, job(ids_of(catalog, PROMPTS[0]), weigher, 10)).ids()
    assert answer == alone(model, ids_of(catalog, PROMPTS[0]), new=10)
    with pytest.raises(MethodError, match="knows no `adapters`, `top_k` and `floor`"):
        picked(catalog, PROMPTS[0], adapters=["zh"])

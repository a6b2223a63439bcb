"""One fusion in several threads and tasks: each answers as it does alone, and what was learned stays."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest
import torch

from loraflow import FitConfig, FusedModel, Static
from loraflow.adapters import load_adapter
from loraflow.errors import LoraflowError, MethodError
from tests.tiny import number_tokenizer, random_ids, save_adapter, set_random_gates, tiny_model

IDS = random_ids()
METHODS = ["base", "a", "b", "average", "arrow", "qa-flora", Static({"a": 0.5, "b": -1.0})]
BESIDE = [None, *METHODS]


@pytest.fixture
def adapters(tmp_path):
    return {name: str(save_adapter(tiny_model(), tmp_path / name, seed=i)) for i, name in enumerate("ab")}


@pytest.fixture
def model(adapters):
    fused = FusedModel.from_adapters(tiny_model(), adapters, tokenizer=number_tokenizer())
    set_random_gates(fused)
    return fused


def generate(model):
    return model.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None)


def forward(model):
    # A bare forward does not say what the prompt is.
    return generate(model) if model.method.level == "query" else model(IDS).logits


def trace(model):
    return None if model.method.name == "base" else model.trace(IDS).weights


def weigh(model):
    return model.weigh(IDS, method="qa-flora")


def rows(model):
    return model.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None, methods=["b", None])


CALLS = [forward, generate, trace, weigh, rows]


def in_use(model, method):
    return contextlib.nullcontext() if method is None else model.using(method)


def equal(found, expected):
    return found is expected is None or torch.equal(found, expected)


@torch.no_grad()
def quiet_answers(model):
    answers = {}
    for index, method in enumerate(BESIDE):
        with in_use(model, method):
            answers.update({(index, call): call(model) for call in CALLS})
    return answers


def wander(model, expected, seed, steps):
    """Random use of a model by one thread; gives what was not as it is alone."""
    chance, wrong = random.Random(seed), []

    @torch.no_grad()
    def check(index):
        call = chance.choice(CALLS)
        if not equal(call(model), expected[index, call]):
            wrong.append((BESIDE[index], call.__name__))

    def visit(depth, index):
        for _ in range(chance.randint(1, 2)):
            check(index)
            inner = chance.randrange(len(BESIDE))
            if depth and inner:
                with contextlib.suppress(ZeroDivisionError), model.using(METHODS[inner - 1]):
                    visit(depth - 1, inner)
                    if chance.random() < 0.3:
                        raise ZeroDivisionError
            check(index)

    for _ in range(steps):
        visit(2, 0)
    return wrong


@pytest.mark.parametrize("seed", range(3))
def test_eight_threads_answer_as_one(model, seed):
    expected = quiet_answers(model)
    gates, learned = model.gates, {name: value.clone() for name, value in model.state_dict().items()}
    with ThreadPoolExecutor(8) as pool:
        wrong = [pool.submit(wander, model, expected, 8 * seed + i, 1) for i in range(8)]
        while not all(one.done() for one in wrong):
            assert model.state_dict().keys() == learned.keys()
            assert model.method.name == "lora-flow"
    assert [one.result() for one in wrong] == [[]] * 8
    assert all(torch.equal(model.state_dict()[name], value) for name, value in learned.items())
    assert {name: id(gate) for name, gate in model.gates.items()} == {name: id(gate) for name, gate in gates.items()}
    own = dict(model.named_parameters())
    assert all(any(parameter is p for p in own.values()) for gate in gates.values() for parameter in gate.parameters())


@torch.no_grad()
def test_a_block_may_wait_for_another_threads_answer(model):
    expected = quiet_answers(model)
    with ThreadPoolExecutor(1) as pool, model.using("a"):
        assert torch.equal(pool.submit(torch.no_grad()(generate), model).result(60), expected[0, generate])
        assert torch.equal(generate(model), expected[2, generate])


@torch.no_grad()
def test_what_is_learned_is_the_fusions_own_inside_a_block_too(model, adapters, tmp_path):
    learned = {name: value.clone() for name, value in model.state_dict().items()}
    with model.using("average"):
        assert (model.method.name, model.own_method.name) == ("average", "lora-flow")
        assert model.state_dict().keys() == learned.keys()
        model.save_pretrained(tmp_path / "saved")
    saved = FusedModel.from_pretrained(tmp_path / "saved", base=tiny_model())
    assert saved.method.name == "lora-flow"
    assert all(torch.equal(saved.state_dict()[name], value) for name, value in learned.items())


@torch.no_grad()
def test_set_method_is_of_the_block_or_of_the_fusion(model):
    expected = quiet_answers(model)
    with ThreadPoolExecutor(1) as pool, model.using("base"):
        model.set_method("b")
        assert torch.equal(forward(model), expected[3, forward])
        assert model.own_method.name == "lora-flow"
        pool.submit(model.set_method, "average").result(60)
        assert torch.equal(forward(model), expected[3, forward])
    assert model.method.name == "average"
    assert torch.equal(forward(model), expected[4, forward])
    assert model.state_dict().keys() != {}


def using_for_ever(model, method):
    with model.using(method):
        while True:
            yield model.method.name


def test_generators_that_are_left_half_way_end_in_any_order(model):
    one, two = using_for_ever(model, "a"), using_for_ever(model, "b")
    assert (next(one), next(two)) == ("static", "static")
    assert model.method.parameters() == {"weights": {"b": 1.0}}
    one.close()
    assert model.method.parameters() == {"weights": {"b": 1.0}}
    two.close()
    assert model.method.name == "lora-flow"


def test_a_generator_that_another_thread_ends_has_ended_for_its_own(model):
    left = using_for_ever(model, "a")
    next(left)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(left.close).result(60)
    assert model.method.name == "lora-flow"


@torch.no_grad()
def test_tasks_inherit_what_their_block_uses_and_executors_do_not(model):
    expected = quiet_answers(model)

    async def ask(method):
        with in_use(model, method):
            await asyncio.sleep(0)
            return generate(model)

    async def all_of_them():
        with model.using("b"):
            late = asyncio.create_task(ask(None))
            inside = await asyncio.to_thread(torch.no_grad()(generate), model)
            beside = await asyncio.get_running_loop().run_in_executor(None, torch.no_grad()(generate), model)
        return [await late, inside, beside, *await asyncio.gather(*map(ask, BESIDE))]

    order = [3, 3, 0, *range(len(BESIDE))]
    for found, index in zip(asyncio.run(all_of_them()), order, strict=True):
        assert torch.equal(found, expected[index, generate])


@torch.no_grad()
def test_a_call_inside_a_call_leaves_the_outer_one_as_it_was(model):
    expected = quiet_answers(model)
    outside, seen = copy_context(), []

    def look(ids, scores, **kwargs):
        with model.using("base"):
            seen.append(torch.equal(forward(model), expected[1, forward]))
        seen.append(torch.equal(outside.run(forward, model), expected[0, forward]))
        return torch.zeros(len(ids), dtype=torch.bool)

    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "stopping_criteria": [look]}
    with model.using("a"):
        assert torch.equal(model.generate(IDS, **options), expected[2, generate])
        assert torch.equal(model.generate(IDS, methods=["b", None], **options), expected[2, rows])
        assert torch.equal(forward(model), expected[2, forward])
    assert seen == [True] * 12


@torch.no_grad()
def test_a_method_that_a_call_sets_is_for_the_next_one(model):
    expected = quiet_answers(model)

    def change(ids, scores, **kwargs):
        model.set_method("average")
        return torch.ones(len(ids), dtype=torch.bool)

    # What weighs where no call runs is another thread's, whose block is left half-way.
    left = using_for_ever(model, "b")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(next, left).result(60)
        model.generate(IDS, max_new_tokens=2, stopping_criteria=[change])
        assert torch.equal(forward(model), expected[4, forward])
        assert torch.equal(pool.submit(torch.no_grad()(forward), model).result(60), expected[3, forward])
        pool.submit(left.close).result(60)
    assert torch.equal(forward(model), expected[4, forward])


def test_others_wait_while_one_fits(model):
    answers, done = [], threading.Event()

    @torch.no_grad()
    def ask():
        while not done.is_set():
            answers.append(model(IDS).logits)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    alone = copy.deepcopy(model)
    config = FitConfig(epochs=1, batch_size=2)
    examples = [{"prompt": "5 6", "completion": "6 5"}] * 4
    alone.fit(examples, config=config)
    thread = threading.Thread(target=ask)
    thread.start()
    model.fit(examples, config=config)
    done.set()
    thread.join(60)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[name])


def test_a_block_is_not_what_is_fitted(model):
    learns = r"own method, 'lora-flow', and 'learned-static' is in use here. Leave the `using` block"
    with model.using("learned-static"), pytest.raises(MethodError, match=learns):
        model.fit([{"prompt": "5 6", "completion": "6 5"}])


@torch.no_grad()
def test_a_block_of_adapters_that_have_left_is_refused(model, adapters):
    expected = quiet_answers(model)
    again = [load_adapter(name, path) for name, path in adapters.items()]
    with model.using("average"):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(model.exchange_adapters, again).result(60)
            assert torch.equal(forward(model), expected[4, forward])
            pool.submit(model.exchange_adapters, again[::-1]).result(60)
        with pytest.raises(LoraflowError, match=r"were exchanged, and 'average' is in use here for those before"):
            model(IDS)
    assert model.method.name == "base"
    assert torch.equal(model(IDS).logits, tiny_model()(IDS).logits)


@torch.no_grad()
def test_gates_of_blocks_move_with_the_model(model):
    with model.using("average"):
        model.to(torch.float64)
        found = model(IDS).logits
    with model.using("average"):
        assert torch.equal(model(IDS).logits, found)

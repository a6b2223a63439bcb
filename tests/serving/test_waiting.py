"""Whose request is next in the engine."""

from __future__ import annotations

import pytest

from loraflow.errors import LoraflowError
from loraflow.serving.config import EngineLimits
from loraflow.serving.jobs import Failure
from loraflow.serving.waiting import Waiting
from tests.serving.worlds import DEADLINE_S, job, running, send, tiny_fusion


def of(client, count=1, prompt=(5, 6), new=8):
    jobs = [job(prompt, new=new) for _ in range(count)]
    for one in jobs:
        one.client, one.ends = client, ()
    return jobs


def test_who_has_fewest_in_the_engine_is_next():
    waiting, (a, b, c), (d,) = Waiting(), of("much", 3), of("little")
    for one in (a, b, c, d):
        waiting.put(one)
    assert waiting.take([]) is a
    assert waiting.take([a]) is d
    assert [waiting.take([a, d]), waiting.take([a, b, d])] == [b, c]
    assert waiting.take([]) is None


def test_clients_with_as_many_take_turns():
    waiting, jobs = Waiting(), [one for client in "abc" for one in of(client, 2)]
    for one in jobs:
        waiting.put(one)
    assert [waiting.take([]).client for _ in jobs] == [*"abcabc"]


def test_a_job_that_was_given_up_waits_no_more():
    waiting, (a, b) = Waiting(), of("one", 2)
    waiting.put(a)
    waiting.put(b)
    waiting.remove(a)
    waiting.remove(a)
    assert waiting.take([]) is b
    waiting.put(a)
    waiting.remove(a)
    assert waiting.take([]) is None


@pytest.fixture(scope="module")
def model():
    return tiny_fusion()


def test_one_who_asks_for_much_holds_nobody_up(model):
    limits = EngineLimits(requests=2, batch_tokens=16, cache_tokens=1024, page_tokens=16)
    with running(model, limits) as engine:
        much, (little,) = of("much", 12, new=20), of("little")
        for one in much:
            send(engine, one)
        heard = send(engine, little)
        assert len(heard.tokens()) == 8
        # Those that were in it, and the one that took the place of the first of them.
        assert sum(one.begun is not None for one in much) <= 5
        assert all(len(one.listener.tokens()) == 20 for one in much)


def test_a_long_prompt_lets_others_in_before_the_next_one(model):
    limits = EngineLimits(requests=8, batch_tokens=16, cache_tokens=2048, page_tokens=16)
    with running(model, limits) as engine:
        much, (little,) = of("much", 6, prompt=[5] * 200, new=2), of("little", new=1)
        for one in much:
            send(engine, one)
        send(engine, little).tokens()
        assert sum(one.begun is not None for one in much) < 6
        assert all(len(one.listener.tokens()) == 2 for one in much)


def test_what_waits_is_given_up_or_ends_with_the_engine(model):
    limits = EngineLimits(requests=1, batch_tokens=16, cache_tokens=1024, page_tokens=16)
    with running(model, limits) as engine:
        first, second, third = of("one", 3, new=200)
        for one in (first, second, third):
            send(engine, one)
        engine.cancel(second.id)
        assert engine.running == 2
        engine.close(finish=False)
        for one in (first, third):
            assert one.listener.ended.wait(DEADLINE_S)
            assert isinstance(one.listener.heard[-1], Failure)
        with pytest.raises(LoraflowError, match=r"The engine has ended: it was closed"):
            send(engine, of("one")[0])
    assert second.begun is None

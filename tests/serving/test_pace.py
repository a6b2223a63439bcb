"""Who is read for nothing rests, and only while others are there."""

from __future__ import annotations

import asyncio

import pytest

from loraflow.serving.pace import Pace
from loraflow.serving.protocol import ApiError


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_who_was_read_for_nothing_rests_a_hundred_times_as_long_but_not_alone():
    clock = Clock()
    pace = Pace(clock)
    with pace.there("one"):
        pace.rest("one", 0.02)
        assert pace.rest_s("one") == 0
        with pace.there("other"):
            assert pace.rest_s("one") == pytest.approx(2)
            assert pace.rest_s("other") == 0
            clock.now = 1.5
            assert pace.rest_s("one") == pytest.approx(0.5)
            # Requests that were read beside each other rest one after the other, but nobody for ever.
            pace.rest("one", 0.01)
            assert pace.rest_s("one") == pytest.approx(1)
            pace.rest("one", 60)
            assert pace.rest_s("one") == pytest.approx(10)
        assert pace.rest_s("one") == 0
    with pace.there("other"):
        assert pace.rest_s("one") == pytest.approx(10)
        clock.now = 12
        assert pace.rest_s("one") == 0
        pace.rest("other", 0.1)
        assert set(pace._rests) == {"other"}


def test_requests_that_wait_go_on_one_at_a_time_and_are_not_many():
    async def run():
        pace, order = Pace(), []

        async def ask(client):
            await pace.rested(client)
            order.append(client)

        with pace.there("one"), pace.there("other"):
            pace.rest("one", 0.0002)
            waiting = [asyncio.ensure_future(ask("one")) for _ in range(16)]
            await asyncio.sleep(0)
            with pytest.raises(
                ApiError, match=r"16 requests of this client wait, for others of its were refused or given up\. Ask"
            ) as error:
                await pace.rested("one")
            assert (error.value.status, error.value.headers) == (429, {"Retry-After": "10"})
            await ask("other")
            assert order == ["other"]
            started = asyncio.get_running_loop().time()
            await asyncio.wait_for(asyncio.gather(*waiting), 60)
            assert asyncio.get_running_loop().time() - started >= 15 * 0.02
        assert not pace._waiting
        assert not pace._there

    asyncio.run(run())

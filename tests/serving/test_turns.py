"""Whose turn it is."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from loraflow.serving.turns import READING, Reading, Turns, current_client, end_reading, let_others_go_first


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


def order_of(clients):
    """The order in which requests of these clients, all there at once, have their turn of a second each."""

    async def run():
        order, clock = [], [0.0]
        turns = Turns(lambda: clock[0])

        async def ask(client):
            async with turns.turn(client):
                order.append(client)
                clock[0] += 1
                await asyncio.sleep(0)

        await asyncio.gather(*map(ask, clients))
        return order

    return asyncio.run(run())


def test_who_comes_seldom_waits_for_nobody_who_comes_often():
    assert order_of(["many"] * 20 + ["one"])[:2] == ["many", "one"]
    assert order_of(["a"] * 3 + ["b"] * 3) == ["a", "b", "a", "b", "a", "b"]


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_everybody_has_a_turn_and_an_equal_share(clients):
    order = order_of(clients)
    assert sorted(order) == sorted(clients)
    for place in range(len(order)):
        waiting = {client for client in order[place:] if client in clients}
        had = {client: order[:place].count(client) for client in waiting}
        assert max(had.values()) - min(had.values()) <= 1


def test_one_that_goes_away_while_it_waits_or_as_it_is_let_in_holds_nobody_up():
    async def run():
        turns, order = Turns(), []

        async def ask(client, until=None):
            async with turns.turn(client):
                order.append(client)
                if until is not None:
                    await until.wait()

        done = asyncio.Event()
        first = asyncio.ensure_future(ask("first", done))
        await settle()
        waits, let_in, last = (asyncio.ensure_future(ask(name)) for name in ("waits", "let in", "last"))
        await settle()
        waits.cancel()
        await settle()
        done.set()
        # It is let in within this step, and told so in the next.
        await first
        let_in.cancel()
        await asyncio.wait_for(last, 60)
        await settle()
        assert order[0] == "first"
        assert order[-1] == "last"
        assert waits.cancelled()
        async with turns.turn("later"):
            pass

    asyncio.run(run())


def test_a_request_lets_others_in_between_its_pieces_and_ends_once():
    async def run():
        turns, order = Turns(), []

        async def long():
            reading = Reading(turns, "long")
            READING.set(reading)
            await reading.begin()
            for piece in range(3):
                order.append(f"long {piece}")
                await asyncio.sleep(0.01)
                await let_others_go_first()
            assert current_client() == "long"
            await end_reading()
            await reading.end()

        async def short():
            async with turns.turn("short"):
                order.append("short")

        work = asyncio.ensure_future(long())
        await settle()
        await asyncio.gather(work, short())
        assert order.index("short") == 1

    asyncio.run(run())
    assert current_client() == ""

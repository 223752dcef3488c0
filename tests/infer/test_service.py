"""The service around an engine: streams, refusals, cancellation, draining, faults; nothing is left behind."""

import asyncio
import gc
import sys
import threading

import pytest
from tests.infer.fake_engine import FakeEngine

from orogen.config.checks import ConfigError
from orogen.infer.request import CANCELLED, ERROR, LENGTH, Full, Request
from orogen.infer.service import ClosedError, Service, Stream


def ask(*prompt: int, tokens: int = 3) -> Request:
    return Request(prompt=prompt, max_tokens=tokens)


def serve(engine: FakeEngine, use, *, limit: int = 100):
    """What `use(service)` returns, with the service of `engine` around it."""

    async def run():
        service = Service(engine, limit=limit)
        service.start()
        try:
            return await use(service)
        finally:
            await service.close()

    return asyncio.run(run())


async def ids(stream: Stream) -> list[int]:
    return [chosen.id async for output in stream for chosen in output.tokens]


def test_each_stream_gets_its_own_tokens():
    async def use(service):
        streams = [await service.submit(ask(10 + n, 20 + n, tokens=5)) for n in range(9)]
        return await asyncio.gather(*map(ids, streams)), service.open

    answers, left = serve(FakeEngine(slots=4, queue=9), use)
    assert answers == [[10 + n, 20 + n, 10 + n, 20 + n, 10 + n] for n in range(9)]
    assert left == 0


def test_a_request_that_never_fits_and_a_full_queue_are_refused():
    async def use(service):
        with pytest.raises(ConfigError, match="expected at most 64"):
            await service.submit(ask(1, tokens=64))
        streams = [await service.submit(ask(3, tokens=60)) for _ in range(2)]
        with pytest.raises(Full, match="2 requests are open; expected at most 2"):
            await service.submit(ask(3))
        for stream in streams:
            stream.close()
        assert await ids(await service.submit(ask(4))) == [4, 4, 4], "closed ones make room"

    serve(FakeEngine(wait=0.001), use, limit=2)


def test_the_engines_own_queue_refuses_too():
    async def flood(service):
        results = await asyncio.gather(*(service.submit(ask(3)) for _ in range(9)), return_exceptions=True)
        return sum(isinstance(r, Full) for r in results), sum(isinstance(r, Stream) for r in results), service.open

    refused, taken, _ = serve(FakeEngine(slots=1, queue=2, wait=0.2), flood)
    assert refused >= 1 and refused + taken == 9


def test_closing_a_stream_cancels_its_request_and_no_other():
    engine = FakeEngine(slots=4, queue=9, wait=0.001)

    async def use(service):
        first, other = await service.submit(ask(3, tokens=50)), await service.submit(ask(4, tokens=20))
        await anext(first)
        first.close()
        assert await ids(other) == [4] * 20
        other.close()
        return first.number

    number = serve(engine, use)
    assert engine.cancelled == [number], "one that has ended is not cancelled"


def test_a_client_that_vanishes_while_its_request_is_handed_over_leaves_none_behind():
    engine = FakeEngine(slots=1, queue=9, wait=0.05)

    async def use(service):
        running = await service.submit(ask(3, tokens=5))
        task = asyncio.create_task(service.submit(ask(4, tokens=50)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await ids(running)
        await asyncio.sleep(0.1)
        return service.open

    assert serve(engine, use) == 0
    assert not engine.busy


def test_a_caller_who_is_gone_when_the_engine_answers_does_not_end_its_thread():
    """Cancelled while the action runs, or before it begins, which it then does not."""
    begun, goes_on, done = threading.Event(), threading.Event(), []

    def slow():
        begun.set()
        assert goes_on.wait(10)
        done.append("slow")

    async def use(service):
        callers = [asyncio.create_task(service.between(slow))]
        await asyncio.to_thread(begun.wait, 10)
        callers.append(asyncio.create_task(service.between(lambda: done.append("late"))))
        await asyncio.sleep(0)
        for caller in callers:
            caller.cancel()
        assert all(
            isinstance(one, asyncio.CancelledError) for one in await asyncio.gather(*callers, return_exceptions=True)
        )
        goes_on.set()
        async with asyncio.timeout(10):
            await service.between(lambda: done.append("next"))
            with pytest.raises(ValueError, match="no"):
                await service.between(lambda: int("no"))
            return await ids(await service.submit(ask(5)))

    assert serve(FakeEngine(), use) == [5, 5, 5]
    assert done == ["slow", "next"]


def test_a_request_that_fails_leaves_the_others():
    async def use(service):
        bad, good = await service.submit(ask(7)), await service.submit(ask(5))
        (last,) = [output async for output in bad]
        return last, await ids(good)

    last, good = serve(FakeEngine(fails=7), use)
    assert (last.finish, last.error) == (ERROR, "the logits of this request are not finite")
    assert good == [5, 5, 5]


def test_an_engine_that_raises_ends_every_stream_and_takes_no_more():
    engine = FakeEngine(breaks=7, wait=0.001)

    async def use(service):
        good, bad = await service.submit(ask(5, tokens=50)), await service.submit(ask(7))
        finals = [[output async for output in stream][-1] for stream in (good, bad)]
        with pytest.raises(ClosedError, match="engine failed"):
            await service.submit(ask(5))
        return finals, service.open

    finals, left = serve(engine, use)
    assert [(end.finish, end.error) for end in finals] == [(ERROR, "the engine failed: the device is gone")] * 2
    assert left == 0


def test_draining_lets_requests_end_and_cancels_those_that_take_too_long():
    async def use(service):
        short, long = await service.submit(ask(5, tokens=3)), await service.submit(ask(6, tokens=60))
        draining = asyncio.create_task(service.drain(0.3))
        await asyncio.sleep(0)
        with pytest.raises(ClosedError, match="shutting down"):
            await service.submit(ask(5))
        outputs = [[output async for output in stream] for stream in (short, long)]
        await draining
        return outputs, service.open

    (short, long), left = serve(FakeEngine(wait=0.01), use)
    assert short[-1].finish == LENGTH and long[-1].finish == CANCELLED
    assert left == 0


def test_ten_thousand_requests_and_vanished_clients_leave_nothing():
    engine = FakeEngine(slots=64, queue=10_000)

    async def client(service, number):
        vanishes = number % 3 == 0
        stream = await service.submit(ask(number % 100 + 3, tokens=60 if vanishes else 2))
        try:
            async for _ in stream:
                if vanishes:
                    break
        finally:
            stream.close()

    async def rounds(service, count):
        for first in range(0, count, 200):
            await asyncio.gather(*(client(service, first + n) for n in range(200)))
        while engine.busy:
            await asyncio.sleep(0.001)
        cancelled = len(engine.cancelled)
        engine.seen.clear(), engine.cancelled.clear()
        gc.collect()
        return cancelled, sys.getallocatedblocks()

    async def use(service):
        _, before = await rounds(service, 1000)
        cancelled, after = await rounds(service, 10_000)
        return service.open, after - before, cancelled, sum(isinstance(o, Stream) for o in gc.get_objects())

    left, grown, cancelled, streams = serve(engine, use, limit=1000)
    assert (left, streams) == (0, 0)
    assert not engine.waiting and not engine.running
    assert cancelled > 3000
    assert grown < 5000, f"{grown} blocks of memory more after 10,000 requests"
    assert not [thread for thread in threading.enumerate() if thread.name == "engine"]

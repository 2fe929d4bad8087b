"""A usual call waits for its model without a task: who leaves, what goes wrong, and that nothing is left of it."""

import asyncio
import gc
import logging
import re
import time
from contextlib import asynccontextmanager

import pytest
from http_support import listening, request_of
from PIL import Image
from support import Engines, encode, random_pixels, until

from service.app import create_app, direct_of
from service.config import Settings
from service.logs import REQUEST
from service.queueing import Awaiting, Listening, Pending
from service.routes.calls import Call, Exchange
from service.running import Job

FILES = [encode(Image.fromarray(one), "PNG") for one in random_pixels(3, seed=71)]


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 60))


class Caller:
    """Remembers what it was told; `broken` is what it fails with at an answer."""

    def __init__(self, broken: Exception | None = None) -> None:
        self.statuses: list[int] = []
        self.faults: list[BaseException] = []
        self.serving: list[asyncio.Task] = []
        self._broken = broken

    def since_last_byte_s(self) -> float:
        return 0.0

    def run(self, serving) -> None:
        self.serving.append(asyncio.create_task(serving))

    def give_up(self, error) -> None:
        self.faults.append(error)

    def reply(self, exchange, status, fields, content) -> None:
        if self._broken is not None:
            raise self._broken
        self.statuses.append(status)


class Side:
    """A service of one lane, its engine, and its direct way."""

    def __init__(self, app, engine) -> None:
        self.service, self.direct, self.engine = app.state.service, direct_of(app), engine

    def ask(self, content: bytes, caller: Caller) -> Exchange:
        exchange = Exchange(keep_alive=True)
        fields = [(b"content-length", str(len(content)).encode()), (b"x-request-id", b"the-call")]
        self.direct.take(self.direct.heads.read(b"POST", b"/predict", fields), content, exchange, caller)
        return exchange

    async def ask_twice(self) -> tuple[Caller, Caller, Exchange]:
        """Ask for one image, which runs until the gate opens, and for another, which waits; return the latter's too."""
        self.engine.close_gate()
        first, second = Caller(), Caller()
        self.ask(FILES[0], first)
        await until(self.engine.entered.is_set, "the first image runs")
        waiting = self.ask(FILES[1], second)
        await until(lambda: self.depth == 1, "the second waits")
        return first, second, waiting

    @property
    def held(self) -> tuple[int, int]:
        return self.service.deployment().opened()._holders, self.service.classifier()._batcher.admitted

    @property
    def depth(self) -> int:
        return self.service.classifier()._batcher.depth

    def dropped(self) -> int:
        metrics = self.service.metrics.exposition().decode()
        return int(float(re.search(r'dropped_total\{model="tiny",reason="cancelled",version="1"\} (\S+)', metrics)[1]))


@asynccontextmanager
async def direct_side(models):
    engines = Engines()
    settings = Settings(models=models, device="cpu", lanes=1, share_identical=False, spot_check_share=0)
    app = create_app(settings, open_engine=engines)
    async with app.router.lifespan_context(app):
        await until(lambda: app.state.service.is_ready, "ready")
        try:
            yield Side(app, engines.opened[0])
        finally:
            engines.opened[0].gate.set()


def test_who_leaves_while_the_model_runs_is_counted_and_told_nothing(models):
    async def scenario():
        async with direct_side(models) as side:
            side.engine.close_gate()
            caller = Caller()
            exchange = side.ask(FILES[0], caller)
            await until(side.engine.entered.is_set, "the image runs")
            exchange.leave()
            await asyncio.gather(*caller.serving)
            held = side.held
            side.engine.gate.set()
            stays = Caller()
            side.ask(FILES[1], stays)
            await until(lambda: stays.statuses, "the next is answered")
            return caller.statuses, held, side.dropped(), stays.statuses

    assert run(scenario()) == ([499], (0, 0), 0, [200])


def test_who_leaves_the_queue_is_not_run(models):
    async def scenario():
        async with direct_side(models) as side:
            first, second, leaving = await side.ask_twice()
            leaving.leave()
            await asyncio.gather(*second.serving)
            counted = side.dropped(), side.depth
            side.engine.gate.set()
            await until(lambda: first.statuses, "the first is answered")
            return first.statuses, second.statuses, counted, len(side.engine.sizes), side.held

    assert run(scenario()) == ([200], [499], (1, 0), 1, (0, 0))


def test_an_answer_that_cannot_be_given_takes_neither_the_lane_nor_its_neighbours_along(models):
    async def scenario():
        async with direct_side(models) as side:
            side.engine.close_gate()
            first, broken, good = Caller(), Caller(ZeroDivisionError("its connection broke")), Caller()
            side.ask(FILES[0], first)
            await until(side.engine.entered.is_set, "the first image runs")
            for caller, content in ((broken, FILES[1]), (good, FILES[2])):
                side.ask(content, caller)
            await until(lambda: side.depth == 2, "both wait")
            side.engine.gate.set()
            await until(lambda: good.statuses, "his neighbour is answered")
            after = Caller()
            side.ask(FILES[0], after)
            await until(lambda: after.statuses, "so is who comes after")
            return [type(one) for one in broken.faults], good.statuses, after.statuses, side.held

    assert run(scenario()) == ([ZeroDivisionError], [200], [200], (0, 0))


class NamesOfRequests(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str | None] = []

    def emit(self, record) -> None:
        names = REQUEST.get()
        self.names.append(None if names is None else names.request_id)


def test_what_is_logged_of_a_failed_run_names_its_request(models):
    def fail(images, logits):
        raise RuntimeError("the kernel broke")

    async def scenario():
        async with direct_side(models) as side:
            side.engine.twist, caller = fail, Caller()
            side.ask(FILES[0], caller)
            await until(lambda: caller.statuses, "it is answered")
            side.engine.twist = None
            return caller.statuses

    handler, logger = NamesOfRequests(), logging.getLogger("service.classifier")
    logger.addHandler(handler)
    try:
        assert run(scenario()) == [500]
    finally:
        logger.removeHandler(handler)
    assert handler.names == ["the-call"]


@pytest.mark.parametrize("line", ["", "Origin: https://other.example\r\n"], ids=["direct", "through the app"])
def test_nothing_of_an_answered_request_waits_for_the_collector(models, line):
    async def scenario():
        async with listening(models, Engines()) as (address, _):
            reader, writer = await asyncio.open_connection(*address)
            for index in range(12):
                content = FILES[index % 3]
                head = f"POST /predict HTTP/1.1\r\nhost: x\r\n{line}content-length: {len(content)}\r\n\r\n"
                writer.write(head.encode() + content)
                fields = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                assert fields.startswith("http/1.1 200")
                await reader.readexactly(int(re.search(r"content-length: (\d+)", fields)[1]))
            kinds = {Call, Pending, Listening, Awaiting, Job}
            await until(lambda: not any(type(one) in kinds for one in gc.get_objects()), "nothing is left")
            writer.close()

    gc.collect()
    gc.disable()
    try:
        run(scenario())
    finally:
        gc.enable()


def test_who_leaves_lets_go_of_all_he_held_even_where_an_observer_breaks(models):
    def broken(reason):
        raise ZeroDivisionError("the observer broke")

    async def scenario():
        async with direct_side(models) as side:
            first, second, leaving = await side.ask_twice()
            side.service.classifier().metrics.dropped = broken
            with pytest.raises(ZeroDivisionError):
                leaving.leave()
            await asyncio.gather(*second.serving)
            side.engine.gate.set()
            await until(lambda: first.statuses, "the first is answered")
            return second.statuses, side.held

    assert run(scenario()) == ([499], (0, 0))


async def ask_slowly(address, content: bytes) -> bytes:
    """Return what comes until the connection is closed."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(request_of(content))
    try:
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def test_when_the_time_to_drain_is_over_who_waits_is_called_off_and_the_service_is_not_stuck(models, caplog):
    def slow(images, logits):
        time.sleep(0.3)
        return logits

    async def scenario():
        engines = Engines()
        limits = {"max_batch_size": 1, "mode": "off", "drain_timeout_s": 1, "request_timeout_s": 60}
        async with listening(models, engines, spot_check_share=0, **limits) as (address, service):
            engines.opened[0].twist = slow
            asked = [asyncio.create_task(ask_slowly(address, FILES[0])) for _ in range(20)]
            await until(lambda: service.classifier()._batcher.admitted == 20, "all are let in")
        told = [answer[:12] for answer in await asyncio.gather(*asked)]
        return service.is_stuck, len(told), set(told), len(engines.opened[0].sizes)

    is_stuck, callers, told, runs = run(scenario())

    assert (is_stuck, callers, told) == (False, 20, {b"HTTP/1.1 200", b""})
    assert runs < 20, "what nobody waits for was run all the same"
    assert "closed without an answer" in caplog.text
    assert "did not end in time" not in caplog.text

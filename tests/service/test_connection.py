"""One connection: what is refused is refused once and let go, and nothing that was sent is kept for nothing."""

import asyncio
import logging

from http_support import listening
from support import Engines


def test_a_head_that_is_refused_just_before_its_time_is_up_is_refused_once_and_let_go(models, caplog):
    async def scenario():
        closed = asyncio.Event()
        async with listening(models, Engines(), on_closed=closed.set, head_timeout_s=0.3) as (address, service):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"this is no HTTP\r\n\r\n")
            received = await reader.read()
            await asyncio.wait_for(closed.wait(), 10)
            writer.close()
            return received, service.metrics.exposition().decode()

    received, metrics = asyncio.run(asyncio.wait_for(scenario(), 60))

    assert received.startswith(b"HTTP/1.1 400")
    assert received.count(b"HTTP/1.1 4") == 1
    assert 'code="408"' not in metrics
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]

"""What is written in one turn of the loop leaves in one piece, and nothing is lost at a close."""

import asyncio

import pytest

from service.joining import JoinedWrites


class Wire:
    """A transport that keeps what it is given."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.is_closed = False
        self.has_ended = False

    def write(self, piece: bytes) -> None:
        assert not self.is_closed
        if self.has_ended:
            raise RuntimeError("Cannot call write() after write_eof()")  # as the transports of asyncio do
        self.sent.append(piece)

    def close(self) -> None:
        self.is_closed = True

    def write_eof(self) -> None:
        self.has_ended = True
        self.sent.append(b"EOF")

    def is_closing(self) -> bool:
        return self.is_closed

    def get_extra_info(self, name: str) -> str:
        return f"the wire's {name}"


def test_a_head_and_its_body_are_one_piece_and_the_next_turns_are_another():
    async def scenario() -> list[bytes]:
        wire = Wire()
        joined = JoinedWrites(wire, asyncio.get_running_loop())
        joined.write(b"head ")
        joined.write(b"body")
        assert wire.sent == []
        await asyncio.sleep(0)
        joined.write(b"next")
        await asyncio.sleep(0)
        return wire.sent

    assert asyncio.run(scenario()) == [b"head body", b"next"]


def test_a_close_sends_what_is_held_first_and_once():
    async def scenario() -> Wire:
        wire = Wire()
        joined = JoinedWrites(wire, asyncio.get_running_loop())
        joined.write(b"last")
        joined.close()
        await asyncio.sleep(0)
        return wire

    wire = asyncio.run(scenario())
    assert wire.sent == [b"last"]
    assert wire.is_closed


def test_the_end_of_a_direction_comes_after_what_is_held():
    async def scenario() -> list[bytes]:
        wire = Wire()
        joined = JoinedWrites(wire, asyncio.get_running_loop())
        joined.write(b"last")
        joined.write_eof()
        await asyncio.sleep(0)
        return wire.sent

    assert asyncio.run(scenario()) == [b"last", b"EOF"]


def test_what_comes_after_the_end_of_a_direction_is_an_error_once_and_the_close_still_closes():
    async def scenario() -> Wire:
        wire = Wire()
        joined = JoinedWrites(wire, asyncio.get_running_loop())
        joined.write_eof()
        joined.write(b"too late")
        with pytest.raises(RuntimeError, match="write_eof"):
            joined.close()
        assert wire.is_closed
        joined.close()
        return wire

    assert asyncio.run(scenario()).sent == [b"EOF"]


def test_what_is_written_to_a_transport_that_was_cut_goes_nowhere():
    async def scenario() -> Wire:
        wire = Wire()
        joined = JoinedWrites(wire, asyncio.get_running_loop())
        joined.write(b"too late")
        wire.close()
        await asyncio.sleep(0)
        return wire

    assert asyncio.run(scenario()).sent == []


def test_all_else_is_the_transports_own():
    async def scenario() -> str:
        return JoinedWrites(Wire(), asyncio.get_running_loop()).get_extra_info("name")

    assert asyncio.run(scenario()) == "the wire's name"

"""Threads that work for an event loop: what they give, what they raise, and how they end."""

import asyncio
import os
import subprocess
import sys
import threading

import pytest
from support import until

from service.threads import Threads


def named(word: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(word)]


def test_each_piece_of_work_gets_what_is_made_of_it():
    async def scenario():
        threads = Threads(3, "double", lambda number: 2 * number)
        try:
            return await asyncio.gather(*map(threads.run, range(50)))
        finally:
            threads.shutdown()

    assert asyncio.run(scenario()) == [2 * number for number in range(50)]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_the_work_raises_is_raised_where_it_is_waited_for_and_the_thread_goes_on(kind):
    def do(work):
        if work == "break":
            raise kind("broken")
        return work

    async def scenario():
        threads = Threads(1, "break", do)
        try:
            broken = threads.run("break")
            await asyncio.wait([broken])
            return broken.exception(), await threads.run("whole")
        finally:
            threads.shutdown()

    error, after = asyncio.run(scenario())

    assert isinstance(error, kind)
    assert after == "whole"


def test_so_many_work_at_once_and_no_more():
    pair, at_work, most, lock = threading.Barrier(2), [], [], threading.Lock()

    def do(work):
        with lock:
            at_work.append(work)
            most.append(len(at_work))
        pair.wait(10)  # nobody goes on alone
        with lock:
            at_work.remove(work)

    async def scenario():
        threads = Threads(2, "pair", do)
        try:
            await asyncio.gather(*map(threads.run, range(40)))
        finally:
            threads.shutdown()

    asyncio.run(scenario())

    assert max(most) == 2


def test_work_that_nobody_waits_for_any_more_does_no_harm():
    gate, complaints = threading.Event(), []

    async def scenario():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        threads = Threads(1, "given-up", lambda work: gate.wait(10) and work)
        try:
            given_up, stays = threads.run(1), threads.run(2)
            given_up.cancel()
            gate.set()
            return await stays
        finally:
            threads.shutdown()

    assert asyncio.run(scenario()) == 2
    assert not complaints


def test_threads_end_after_what_they_were_given():
    gate, done = threading.Event(), []

    async def scenario():
        threads = Threads(2, "ending", lambda work: gate.wait(10) and done.append(work))
        work = [threads.run(number) for number in range(5)]
        threads.shutdown()
        assert len(named("ending")) == 2
        gate.set()
        await asyncio.gather(*work)
        await until(lambda: not named("ending"), "both have ended")

    asyncio.run(scenario())

    assert sorted(done) == list(range(5))


def test_a_thread_ends_where_the_loop_it_worked_for_is_closed():
    gate = threading.Event()

    async def scenario():
        Threads(1, "orphan", lambda _: gate.wait(10)).run(None)
        await until(lambda: len(named("orphan")) == 1, "it works")

    asyncio.run(scenario())
    gate.set()
    for thread in named("orphan"):
        thread.join(10)

    assert not named("orphan")


ABANDONED = """
import asyncio, threading, time
from service.threads import Threads

begun = threading.Event()


async def main():
    Threads(2, "left", lambda _: (begun.set(), time.sleep(0.5), print("ended", flush=True))).run(None)
    await asyncio.to_thread(begun.wait)


asyncio.run(main())
"""


def test_a_process_whose_threads_were_never_shut_down_ends_after_what_they_do():
    command = [sys.executable, "-c", ABANDONED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)

    assert (done.stdout, done.stderr) == ("ended\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has a niceness of its own on Linux alone")
def test_threads_are_nicer_than_who_made_them_and_nobody_else_is():
    def niceness(_=None) -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async def scenario():
        threads, others = Threads(1, "nicer", niceness, 3), Threads(1, "as-nice", niceness)
        try:
            return await threads.run(None), await others.run(None)
        finally:
            threads.shutdown()
            others.shutdown()

    before = niceness()
    nicer, as_nice = asyncio.run(scenario())

    assert (nicer, as_nice, niceness()) == (min(19, before + 3), before, before)

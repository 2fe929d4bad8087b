"""What is said of a memory limit before the kernel says it with a kill."""

import logging
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from service.cgroup import ControlGroup, Memory
from service.config import Settings
from service.memory import (
    START_BYTES,
    cause_of_kill,
    check_after_loading,
    check_before_loading,
    problem_after_loading,
    problem_before_loading,
    release_free_memory,
)

MIB = 2**20
REQUESTS = 256 * MIB + 16 * 100_000_000  # the defaults of max_bytes_in_flight and max_pixels_in_flight


@pytest.fixture
def group(tmp_path: Path) -> ControlGroup:
    (tmp_path / "cgroup.controllers").touch()
    (tmp_path / "memory.max").write_text(f"{40 * MIB}")
    (tmp_path / "memory.current").write_text(f"{30 * MIB}")
    return ControlGroup(tmp_path, tmp_path / "none")


@pytest.mark.parametrize("workers", [1, 3])
def test_a_limit_under_which_no_process_comes_up_is_told_before_any_tries(workers):
    settings = Settings(workers=workers)

    assert problem_before_loading(settings, Memory(workers * START_BYTES, 0)) is None
    told = problem_before_loading(settings, Memory(workers * START_BYTES - 1, 0))
    assert told is not None
    assert f"{workers * START_BYTES // MIB} MiB are needed" in told
    assert "raise the limit" in told


def test_a_limit_that_requests_within_their_limits_could_break_is_told_with_the_one_that_holds():
    used = 90 * MIB

    assert problem_after_loading(Settings(), Memory(used + REQUESTS, used)) is None
    told = problem_after_loading(Settings(), Memory(used + REQUESTS - 1, used))
    assert told is not None
    assert f"raise it to {-(-(used + REQUESTS) // MIB)} MiB" in told
    assert "90 MiB are in use" in told


def test_smaller_limits_on_requests_need_less_memory():
    small = Settings(
        max_bytes_in_flight=MIB, max_body_bytes=MIB, max_pixels_in_flight=1_000_000, max_image_pixels=1_000_000
    )

    assert problem_after_loading(small, Memory(110 * MIB, 90 * MIB)) is None


def test_each_worker_may_hold_one_whole_request():
    settings = Settings(workers=20)  # 20 × 20 MiB of bodies and 20 × 50 million pixels, more than the totals

    assert problem_after_loading(settings, Memory(REQUESTS + 500 * MIB, 500 * MIB)) is not None


def test_both_checks_log_one_line_each(group, caplog):
    check_before_loading(Settings(), group)
    check_after_loading(Settings(), group)

    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]
    assert all("memory limit of 40 MiB" in record.getMessage() for record in caplog.records)


def test_where_there_is_no_limit_nothing_is_said(tmp_path, caplog):
    nowhere = ControlGroup(tmp_path / "none", tmp_path / "none")
    check_before_loading(Settings(), nowhere)
    check_after_loading(Settings(), nowhere)

    assert caplog.records == []


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (2, 3, "for the memory limit was reached"),
        (2, 2, "not by the kernel for its memory"),
        (None, None, "out of memory, perhaps"),
    ],
)
def test_a_kill_is_ascribed_to_memory_where_the_kernels_count_rose_and_only_there(before, after, words):
    assert words in cause_of_kill(before, after)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_what_was_freed_below_what_is_kept_goes_back_to_the_system():
    blocks = [bytes([number % 256]) * 4096 for number in range(20_000)]  # 80 MB, of malloc's heap
    kept = blocks[::200]
    full = resident_bytes()
    del blocks
    release_free_memory()

    assert len(kept) == 100
    assert full - resident_bytes() > 50 * MIB


FAULTS = """
import resource, threading
from service.serving import give_memory_back

give_memory_back()
faults = []


def work():
    for _ in range(40):
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        blocks = [bytearray(200_000) for _ in range(10)]
        del blocks
        faults.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)


for run in (work, lambda: [thread.start() or thread.join() for thread in [threading.Thread(target=work)]]):
    run()
print(sum(faults[20:40]), sum(faults[60:80]))
"""


def test_what_every_run_takes_anew_stays_with_the_process():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, timeout=60)

    assert max(map(int, done.stdout.split())) < 200, "of 10,000 pages that each of both threads took and freed"


LOADING = """
import asyncio, sys
from pathlib import Path
from service.app import create_app
from service.config import Settings


async def main(models, state):
    app = create_app(Settings(models=Path(models), state=Path(state), device="cpu"))
    async with app.router.lifespan_context(app):
        while not app.state.service.is_ready:
            await asyncio.sleep(0.02)
    print("onnx.reference" in sys.modules)


asyncio.run(main(*sys.argv[1:]))
"""


def test_onnx_own_evaluator_is_not_loaded_for_a_model_that_has_nothing_for_it(models, tmp_path):
    command = [sys.executable, "-c", LOADING, str(models), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)

    assert done.stdout.strip() == "False", "it takes 9 MB"

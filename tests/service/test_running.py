"""Only certified shapes ever run, whatever comes; each image gets its own answer, with the bits of its lone one."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from batching_support import Journal, submit
from hypothesis import given, settings
from hypothesis import strategies as st
from independence_support import BRIEF, SHAPES, FaultyEngine, answers, artifact_of, tiny_subject
from support import CPU, TinyModel, random_pixels

from service.batching import Batcher
from service.engine import OnnxEngine, Shape
from service.errors import InferenceFailed
from service.independence.certificate import Certificate, CertificateStore, CostRecord, ShapeRecord
from service.independence.certify import certify
from service.repository import Model
from service.running import Job, Runner

CERTIFICATE = certify(tiny_subject(engine=FaultyEngine()), CertificateStore(None), effort=BRIEF)
ARTIFACT = artifact_of(TinyModel().onnx())
IMAGES = random_pixels(20)
CERTIFIED = {(shape.batch_size, shape.threads) for shape in SHAPES}


def with_costs(costs: dict[Shape, float]) -> Certificate:
    """Return the certificate with other costs, and no other shapes than theirs."""
    records = tuple(CostRecord(shape=ShapeRecord.of(shape), seconds=cost) for shape, cost in costs.items())
    measured = CERTIFICATE.measured.model_copy(update={"costs": records})
    first, *_ = shapes = tuple(record.shape for record in records)
    return CERTIFICATE.model_copy(update={"measured": measured, "shapes": shapes, "reference": first})


def runner_on(engine, certificate: Certificate | None = CERTIFICATE) -> Runner:
    return Runner(Model("tiny", 1, ARTIFACT, engine, 0.0), certificate)


def jobs(count: int, replays: tuple[int, ...] = ()) -> list[Job]:
    return [Job(IMAGES[index], index in replays) for index in range(count)]


def assert_own_answers(found: list[np.ndarray], count: int) -> None:
    assert len(found) == count
    assert np.array_equal(np.stack(found).view(np.uint32), answers(IMAGES[:count]).view(np.uint32))


@contextmanager
def another_run_under_way(runner: Runner, engine: FaultyEngine) -> Iterator[None]:
    """Hold one run of another thread inside the engine."""
    inside, leave = threading.Event(), threading.Event()

    def wait(_images, _threads, logits):
        if threading.current_thread() is other:
            inside.set()
            assert leave.wait(30), "the test forgot to let it leave"
        return logits

    engine.fault = wait
    other = threading.Thread(target=runner.run, args=(jobs(1),))
    other.start()
    assert inside.wait(10)
    try:
        yield
    finally:
        leave.set()
        other.join()


@pytest.mark.parametrize("count", range(1, 21))
@pytest.mark.parametrize("is_degraded", [False, True], ids=["sound", "degraded"])
@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "beside another"])
def test_only_certified_shapes_run_and_each_image_gets_its_answer(count, is_degraded, is_alone):
    engine = FaultyEngine()
    runner = runner_on(engine)
    if is_degraded:
        runner.degrade()
    if is_alone:
        found = runner.run(jobs(count))
    else:
        with another_run_under_way(runner, engine):
            found = runner.run(jobs(count))

    assert_own_answers(found, count)
    allowed = {(CERTIFICATE.reference.batch_size, CERTIFICATE.reference.threads)} if is_degraded else CERTIFIED
    assert set(engine.shapes) <= allowed


def test_a_lone_image_has_all_cores_and_one_in_company_has_one():
    certificate = with_costs({Shape(1, 1): 4.0, Shape(4, 1): 9.0, Shape(1, 4): 2.0})
    engine = FaultyEngine()
    runner = runner_on(engine, certificate)

    runner.run(jobs(1))
    runner.run(jobs(2))
    with another_run_under_way(runner, engine):
        runner.run(jobs(1))

    assert engine.shapes == [(1, 4), (4, 1), (1, 4), (1, 1)]


@given(
    st.dictionaries(st.builds(Shape, st.integers(1, 8), st.sampled_from([1, 2])), st.floats(1, 9), min_size=1),
    st.integers(1, 20),
    st.sets(st.integers(0, 19)),
)
def test_whatever_is_certified_nothing_else_runs(costs, count, replays):
    engine = FaultyEngine()
    runner = runner_on(engine, with_costs(costs))

    found = runner.run(jobs(count, tuple(replays)))

    assert_own_answers(found, count)
    assert set(engine.shapes) <= {(shape.batch_size, shape.threads) for shape in costs}


def test_a_shape_that_was_only_probed_never_runs():
    costs = with_costs({Shape(1, 1): 5.0, Shape(4, 1): 0.1})
    engine = FaultyEngine()

    runner_on(engine, costs.model_copy(update={"shapes": costs.shapes[:1]})).run(jobs(8))

    assert set(engine.shapes) == {(1, 1)}


def test_a_replay_runs_alone_at_the_reference_shape():
    engine = FaultyEngine()
    runner = runner_on(engine, with_costs({Shape(2, 1): 5.0, Shape(4, 1): 1.0}))

    found = runner.run(jobs(4, replays=(1, 3)))

    assert_own_answers(found, 4)
    assert sorted(engine.shapes) == [(2, 1), (2, 1), (4, 1)]
    assert np.array_equal(runner.replay(IMAGES[0]), answers(IMAGES[:1])[0])


def test_a_batch_that_was_taken_before_a_degradation_runs_at_the_reference_shape():
    engine = FaultyEngine()
    runner = runner_on(engine, with_costs({Shape(1, 1): 5.0, Shape(8, 1): 6.0}))
    taken = runner.take(8, 1)
    runner.degrade()

    assert taken == 8
    assert runner.is_degraded
    assert_own_answers(runner.run(jobs(taken)), 8)
    assert set(engine.shapes) == {(1, 1)}
    assert runner.take(8, 1) == 1


def test_after_a_failure_a_lone_image_is_alone_again():
    engine = FaultyEngine(lambda *_: np.full((4, 3), np.nan, np.float32))
    runner = runner_on(engine, with_costs({Shape(1, 1): 4.0, Shape(1, 4): 2.0}))

    with pytest.raises(InferenceFailed, match="not finite"):
        runner.run(jobs(1))
    engine.fault = None
    runner.run(jobs(1))

    assert engine.shapes == [(1, 4), (1, 4)]


def test_without_a_certificate_what_comes_together_runs_together():
    engine = FaultyEngine()
    runner = runner_on(engine, None)

    assert_own_answers(runner.run(jobs(7)), 7)
    assert engine.shapes == [(7, 1)]
    assert [runner.take(7, 2), runner.take(1, 4)] == [4, 1]
    runner.degrade()
    assert_own_answers(runner.run(jobs(3)), 3)


REAL = OnnxEngine(TinyModel().model_bytes(), CPU)
REAL_CERTIFICATE = certify(tiny_subject(engine=REAL), CertificateStore(None), effort=BRIEF)
LONE = np.concatenate([REAL.run(image[None]) for image in IMAGES])


@settings(deadline=None, max_examples=40)
@given(
    bursts=st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=12), min_size=1, max_size=6),
    pauses=st.lists(st.sampled_from([0, 0, 0.001]), min_size=6, max_size=6),
    lanes=st.integers(1, 3),
    costs=st.lists(st.floats(0.1, 9), min_size=len(SHAPES), max_size=len(SHAPES)),
    degrade_at=st.integers(0, 8),
)
def test_whoever_comes_when_gets_the_bits_of_its_lone_answer(bursts, pauses, lanes, costs, degrade_at):
    certificate = REAL_CERTIFICATE.model_copy(
        update={"measured": with_costs(dict(zip(SHAPES, costs, strict=True))).measured}
    )
    runner = runner_on(REAL, certificate)

    async def scenario() -> list[np.ndarray]:
        limits = {"max_batch_size": 8, "max_queue_size": 200, "lanes": lanes, "take": runner.take}
        async with Batcher(runner.run, observer=Journal(), **limits) as batcher:
            callers = []
            for number, (burst, pause) in enumerate(zip(bursts, pauses, strict=False)):
                callers += [asyncio.create_task(submit(batcher, Job(IMAGES[index], index % 7 == 0))) for index in burst]
                await asyncio.sleep(pause)
                if number == degrade_at:
                    runner.degrade()
            return await asyncio.gather(*callers)

    found = asyncio.run(scenario())

    wanted = [index for burst in bursts for index in burst]
    assert np.array_equal(np.stack(found).view(np.uint32), LONE[wanted].view(np.uint32))

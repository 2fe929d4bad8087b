"""The probe finds each fault by itself, at one shape or at all, and takes nothing else for one."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from independence_support import BRIEF, SHAPES, Crowded, FaultyEngine, answers, flip
from support import random_pixels

from service.engine import Shape
from service.independence.effort import FULL, QUICK
from service.independence.probe import digest_of, fill, probe, same_bits
from service.independence.probe_images import hostile_neighbours, probe_images

FAULTY = Shape(4, 1)
SOUND = tuple(sorted(set(SHAPES) - {FAULTY}))


def find(fault=None, effort=BRIEF, shapes=SHAPES, **options):
    return probe(FaultyEngine(fault).run, shapes, random_pixels(3), effort, **options)


def by_slot(images, threads, logits):
    return flip(logits, 2) if len(images) == 4 else logits


def by_neighbour(images, threads, logits):
    """Only where all of three others are white: no batch of the probe's own images looks so."""
    white = [index for index in range(len(images)) if (images[index] == 255).all()]
    return flip(logits, ({0, 1, 2, 3} - set(white)).pop()) if len(images) == 4 and len(white) == 3 else logits


def by_fill(images, threads, logits):
    """Only where exactly one slot is filler, and it is the last."""
    black = [not image.any() for image in images]
    return flip(logits, 0) if black == [False, False, False, True] else logits


class ByRepetition:
    """The fifth time that it sees the same batch, it says something else."""

    def __init__(self):
        self.seen: dict[bytes, int] = {}

    def __call__(self, images, threads, logits):
        key = images.tobytes() if len(images) == 4 else b""
        self.seen[key] = self.seen.get(key, 0) + 1
        return flip(logits, 0) if key and self.seen[key] == 5 else logits


def by_new_thread(images, threads, logits):
    is_new = threading.current_thread() is not threading.main_thread()
    return flip(logits, 3) if is_new and len(images) == 4 else logits


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (by_slot, "slot"),
        (by_neighbour, "neighbours"),
        (by_fill, "fill level"),
        (ByRepetition(), "repetition"),
        (by_new_thread, "concurrent runs"),
    ],
    ids=["slot", "neighbours", "fill", "repetition", "thread"],
)
def test_one_fault_at_one_shape_condemns_that_shape_alone_and_is_named(fault, reason):
    found = find(fault)

    assert list(found.unsound) == [FAULTY]
    assert reason in found.unsound[FAULTY]
    assert found.classes == (SOUND,)
    assert FAULTY not in found.digests


def test_runs_that_disturb_each_other_are_found():
    assert find(Crowded()).unsound


@pytest.mark.parametrize("effort", [FULL, QUICK, BRIEF], ids=["full", "quick", "brief"])
def test_without_a_fault_all_shapes_are_one_class_and_nothing_is_cut(effort):
    found = find(effort=effort)

    assert (found.unsound, found.classes, found.cut) == ({}, (tuple(sorted(SHAPES)),), ())
    assert found.images == effort.images
    assert found.comparisons > found.images
    assert set(found.costs_s) == set(SHAPES)


@pytest.mark.parametrize("effort", [FULL, QUICK], ids=["full", "quick"])
@pytest.mark.parametrize("row", [0, 3])
def test_two_of_a_thousand_logits_are_enough(effort, row):
    def run(images, threads):
        logits = answers(images, classes=1000)
        return flip(logits, row, 997, 998) if len(images) == 4 else logits

    found = probe(run, SHAPES, random_pixels(8), effort)

    assert list(found.unsound) == [FAULTY]


def test_a_fault_in_one_in_ten_images_is_found_by_the_full_probe():
    def rare(images, threads, logits):
        return flip(logits, 1) if len(images) == 4 and int(images[1].sum()) % 10 == 0 else logits

    assert FAULTY in find(rare, effort=FULL).unsound


def test_a_lone_image_whose_bits_do_not_hold_is_unsound_too():
    count = iter(range(10**6))

    found = find(lambda images, _, logits: flip(logits, 0) if len(images) == 1 and next(count) % 7 == 6 else logits)

    assert {Shape(1, 1), Shape(1, 4)} <= set(found.unsound)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_shapes_form_classes_by_their_bits(variants):
    variant_of = dict(zip(SHAPES, variants, strict=True))

    def steady(images, threads, logits):
        return logits + np.float32(variant_of[Shape(len(images), threads)])

    found = find(steady, effort=replace(QUICK, concurrent_runs=4))

    expected = {variant: {shape for shape in SHAPES if variant_of[shape] == variant} for variant in set(variants)}
    assert found.unsound == {}
    assert sorted(map(sorted, found.classes)) == sorted(map(sorted, expected.values()))


def with_bits(fill_bits: int):
    return lambda images, *_: np.full((len(images), 3), fill_bits, np.uint32).view(np.float32)


@pytest.mark.parametrize(("usual", "other"), [(0, 0x80000000), (0x7FC00000, 0x7FC00001)], ids=["zeros", "NaNs"])
def test_equal_numbers_with_other_bits_differ_and_equal_bits_do_not(usual, other):
    usually, otherwise = with_bits(usual), with_bits(other)

    steady = find(usually)
    split = find(lambda images, *rest: (otherwise if len(images) == 4 else usually)(images, *rest))

    assert steady.classes == (tuple(sorted(SHAPES)),)
    assert sorted(map(len, split.classes)) == [1, 3]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6), st.data())
def test_same_bits_sees_every_single_bit(words, data):
    first = np.array(words, np.uint32)
    second = first.copy()
    second[data.draw(st.integers(0, len(words) - 1))] ^= np.uint32(1 << data.draw(st.integers(0, 31)))

    assert same_bits(first.view(np.float32), first.copy().view(np.float32))
    assert not same_bits(first.view(np.float32), second.view(np.float32))
    assert digest_of(first.view(np.float32)) != digest_of(second.view(np.float32))


def test_answers_of_another_number_of_classes_are_not_the_same():
    assert not same_bits(np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32))


def test_a_small_budget_cuts_images_and_says_so_but_fills_the_largest_batch():
    found = find(effort=replace(FULL, budget_s=1e-4))

    assert found.images == 4
    assert any("4 images instead of 256" in line for line in found.cut), found.cut


def test_a_fault_in_a_slot_is_found_however_small_the_budget():
    assert FAULTY in find(by_slot, effort=replace(FULL, budget_s=1e-4)).unsound


def test_progress_is_told_from_nothing_to_almost_all_and_never_goes_back():
    told: list[tuple[str, float]] = []

    find(report=lambda step, done: told.append((step, done)))

    shares = [done for _, done in told]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert 0.9 <= shares[-1] <= 1
    assert {"batch 4 on 1 thread", "batch 1 on 4 threads"} <= {step for step, _ in told}


def test_who_is_told_may_end_the_probe():
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find(report=stop)


def test_an_end_that_comes_in_one_lane_ends_all():
    """The caller's own lane would run for hours yet."""
    main = threading.current_thread()

    def run(images, threads):
        if threading.current_thread() is not main:
            raise KeyboardInterrupt
        return answers(images)

    endless = replace(BRIEF, repeats=10**9, budget_s=1e12)
    with pytest.raises(KeyboardInterrupt):
        probe(run, SHAPES, random_pixels(3), endless, costs_s=dict.fromkeys(SHAPES, 1e-6), lanes=2)


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
def test_lanes_change_nothing_that_is_found(lanes):
    alone, together = find(by_slot), find(by_slot, lanes=lanes)

    assert together.unsound == alone.unsound
    assert (together.classes, together.digests) == (alone.classes, alone.digests)


def test_the_filler_is_black_and_comes_last():
    images = random_pixels(3)

    assert np.array_equal(fill(images, 5)[:3], images)
    assert not fill(images, 5)[3:].any()
    assert fill(images, 3) is images


@pytest.mark.parametrize("count", [1, 2, 7, 64, 256])
def test_probe_images_are_the_same_each_time_and_a_quarter_of_them_real(count):
    real = random_pixels(100)
    images = probe_images(count, (8, 8, 3), real)

    assert (images.shape, images.dtype) == ((count, 8, 8, 3), np.uint8)
    assert np.array_equal(images, probe_images(count, (8, 8, 3), real))
    quarter = max(1, count // 4)
    assert np.array_equal(images[:quarter], real[:quarter])


def test_probe_images_hold_all_that_makes_rounding_visible():
    made = probe_images(64, (8, 8, 3), random_pixels(8))[8:]

    values = [set(np.unique(image).tolist()) for image in made]
    assert any(len(seen) == 1 for seen in values), "flat"
    assert any(seen == {0, 255} and np.count_nonzero(image) <= 3 for seen, image in zip(values, made, strict=True))
    assert any(seen == {0, 255} and np.count_nonzero(image) > 3 for seen, image in zip(values, made, strict=True))
    assert any(1 < len(seen) <= 4 and max(seen) <= 3 for seen in values), "faint"
    assert any(len(seen) > 100 for seen in values), "noise"


def test_hostile_neighbours_fill_the_batch():
    assert {kind.shape for kind in hostile_neighbours(3, random_pixels(1)[0]).values()} == {(3, 8, 8, 3)}

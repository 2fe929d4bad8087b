"""A receipt holds for one answer only, and its signature for every word of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from independence_support import flip
from support import random_pixels

from service.independence.receipts import Receipt, logits_digest, pixels_digest

KEY = b"a secret"
RECEIPT = Receipt(
    model="tiny",
    version=1,
    form="float",
    model_digest="m" * 64,
    certificate="c" * 64,
    answer_digest="a" * 64,
    pixels="p" * 64,
    logits="l" * 64,
)
OTHER = {"schema_version": 2, "version": 2, "form": "exact"}
SIGNED_FIELDS = sorted(set(Receipt.model_fields) - {"signature"})


def test_a_signed_receipt_is_its_keys_and_no_others():
    signed = RECEIPT.signed(KEY)

    assert signed.is_signed_by(KEY)
    assert not signed.is_signed_by(b"another")
    assert not RECEIPT.is_signed_by(KEY)


def test_a_signature_survives_json_and_is_the_same_each_time():
    signed = RECEIPT.signed(KEY)

    assert Receipt.model_validate_json(signed.model_dump_json()).is_signed_by(KEY)
    assert signed == RECEIPT.signed(KEY) == signed.signed(KEY)
    assert len(signed.signature) == 64


def test_without_a_key_there_is_no_signature():
    assert RECEIPT.signed(None).signature is None


@pytest.mark.parametrize("name", SIGNED_FIELDS)
def test_a_change_of_any_word_voids_the_signature(name):
    signed = RECEIPT.signed(KEY)
    old = getattr(signed, name)

    assert not signed.model_copy(update={name: OTHER.get(name, f"{old}x")}).is_signed_by(KEY)


@pytest.mark.parametrize("signature", ["", "0" * 64, "short"])
def test_a_signature_that_was_made_up_is_none(signature):
    assert not RECEIPT.model_copy(update={"signature": signature}).is_signed_by(KEY)


def test_a_signature_that_is_no_ascii_is_none():
    assert not RECEIPT.model_copy(update={"signature": "é" * 64}).is_signed_by(KEY)


def test_words_do_not_run_into_each_other():
    one = RECEIPT.model_copy(update={"model": "tiny1", "model_digest": "2"})
    two = RECEIPT.model_copy(update={"model": "tiny", "model_digest": "12"})

    assert one.signed(KEY).signature != two.signed(KEY).signature


@given(st.integers(0, 8 * 8 * 3 - 1), st.integers(1, 255))
def test_each_pixel_counts(place, by):
    pixels = random_pixels(1)[0]
    other = pixels.copy()
    other.reshape(-1)[place] ^= by

    assert pixels_digest(pixels) != pixels_digest(other)


@pytest.mark.parametrize("shape", [(4, 16, 3), (16, 4, 3), (8, 24, 1), (192,)])
def test_the_shape_of_the_pixels_counts(shape):
    pixels = random_pixels(1)[0]

    assert pixels_digest(pixels) != pixels_digest(pixels.reshape(shape))


def test_how_the_pixels_lie_in_memory_does_not_count():
    pixels = random_pixels(1)[0]

    assert pixels_digest(np.asfortranarray(pixels)) == pixels_digest(pixels)


def test_one_bit_of_the_logits_counts():
    logits = np.array([[1.0, -0.0, 3.0]], np.float32)

    assert logits_digest(logits[0]) != logits_digest(flip(logits, 0, 1)[0])
    assert logits_digest(logits[0]) != logits_digest(np.abs(logits[0]))
    assert logits_digest(logits[0]) == logits_digest(logits[0].copy())

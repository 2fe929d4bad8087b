"""Files of so many parts that their pixels do not bound their cost are refused; whatever cameras write is not."""

import io
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import encode, photo, png_chunk, spec_for

from service.anatomy import MOST_PARTS, MOST_SCANS, excess_of
from service.errors import TooLarge
from service.preprocessing import MOST_SIDE, Accepted, decode

RGB = spec_for("RGB")
MANY = MOST_PARTS + 1


def jpeg(**options) -> bytes:
    buffer = io.BytesIO()
    photo().convert("RGB").save(buffer, "JPEG", **options)
    return buffer.getvalue()


def with_scans(count: int) -> bytes:
    """Return a progressive JPEG whose last scan, which refines what is there, is repeated to give so many."""
    encoded = jpeg(progressive=True)
    starts = [found.start() for found in re.finditer(rb"\xff\xda", encoded)]
    last = encoded[starts[-1] : -2]
    return encoded[:-2] + last * (count - len(starts)) + encoded[-2:]


def gif(extra: bytes) -> bytes:
    encoded = encode(photo(), "GIF")
    at = encoded.index(b"\x2c", 13 + 3 * 2 ** ((encoded[10] & 7) + 1))
    return encoded[:at] + extra + encoded[at:]


JPEG, PNG = jpeg(), encode(photo(), "PNG")
EXCESSIVE = {
    "scans": (with_scans(MOST_SCANS + 1), "more than 100 scans"),
    "comments": (JPEG[:2] + b"\xff\xfe\x00\x02" * MANY + JPEG[2:], "segments"),
    "fill bytes": (JPEG[:2] + b"\xff" * MANY + JPEG[2:], "segments"),
    "chunks": (PNG[:33] + png_chunk(b"abCd", b"") * MANY + PNG[33:], "chunks"),
    "extensions": (gif(b"\x21\xfe\x01a\x00" * MANY), "blocks"),
    "pieces of one extension": (gif(b"\x21\xfe" + b"\x01a" * MANY + b"\x00"), "blocks"),
    "bytes that are no block": (gif(b"\x01" * MANY), "blocks"),
}
USUAL = {
    **{kind: encode(photo(), kind) for kind in Accepted().formats},
    "progressive": jpeg(progressive=True),
    "as many scans as may be": with_scans(MOST_SCANS),
    "a film behind the photo": JPEG + b"\xff\xda" * 200 + os.urandom(1000),
    "a film behind a progressive photo": jpeg(progressive=True) + b"\xff\xda" * 200,
    "a preview in the head": JPEG[:2] + b"\xff\xe1\x01\x92" + b"\xff\xda" * 200 + JPEG[2:],
    "a palette and a profile": gif(b"\x21\xff\x0bICCRGBG1012" + (b"\xff" + b"x" * 255) * 3000 + b"\x00"),
}


@pytest.mark.parametrize("what", EXCESSIVE)
def test_413_for_a_file_of_too_many_parts_before_pillow_sees_it(what):
    encoded, told = EXCESSIVE[what]

    with pytest.raises(TooLarge, match=told):
        decode(encoded, RGB)


@pytest.mark.parametrize("what", USUAL)
def test_usual_files_have_no_excess_and_are_decoded(what):
    assert excess_of(USUAL[what]) is None
    assert decode(USUAL[what], RGB).shape == (*RGB.size, 3)


@given(st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a"]), st.binary(max_size=200))
def test_any_bytes_are_counted_to_their_end(start, rest):
    excess_of(start + rest)


@pytest.mark.parametrize("size", [(1, MOST_SIDE + 1), (MOST_SIDE + 1, 1)])
def test_413_for_a_side_that_costs_more_than_its_pixels(size):
    with pytest.raises(TooLarge, match=f"a side may have {MOST_SIDE} pixels"):
        decode(encode(Image.new("L", size), "PNG"), RGB)


def test_the_longest_side_is_decoded():
    assert decode(encode(Image.new("L", (1, MOST_SIDE)), "PNG"), spec_for("RGB")).shape == (*RGB.size, 3)

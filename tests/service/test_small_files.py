"""A plain PNG is read past Pillow's own way through a file, to the very pixels that Pillow gives, or not at all."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import encode, png_chunk, random_pixels, spec_for

from service.errors import ServiceError
from service.preprocessing import Accepted, decode
from service.small_files import read_plain_png

SIZES = st.tuples(st.integers(1, 20), st.integers(1, 20))


def by_pillow(encoded: bytes) -> np.ndarray | None:
    """Return the pixels (height, width, channels) that Pillow gives, None where it refuses the file."""
    try:
        image = Image.open(io.BytesIO(encoded), formats=("PNG",))
        image.load()
    except Exception:
        return None
    return np.asarray(image).reshape(image.height, image.width, -1)


def picture(mode: str, height: int, width: int, seed: int, *, smooth: bool) -> Image.Image:
    """Return noise, or a gradient, for which encoders choose filters."""
    channels = 3 if mode == "RGB" else 1
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, channels))
    slope = np.add.outer(np.arange(height), np.arange(width))[:, :, np.newaxis] * 5 + noise // 64
    return Image.fromarray((slope if smooth else noise).astype(np.uint8).squeeze(2 if mode == "L" else ()), mode)


@given(st.sampled_from(["L", "RGB"]), SIZES, st.integers(0, 99), st.booleans(), st.booleans(), st.integers(0, 9))
def test_a_plain_png_has_the_pixels_that_pillow_gives(mode, size, seed, smooth, optimize, level):
    encoded = encode(picture(mode, *size, seed, smooth=smooth), "PNG", optimize=optimize, compress_level=level)

    plain = read_plain_png(encoded)
    assert plain is not None
    assert (plain.mode, plain.size) == (mode, size[::-1])
    assert np.array_equal(decode(encoded, spec_for(mode, size)), by_pillow(encoded))


WHOLE = encode(picture("RGB", 9, 7, 3, smooth=True), "PNG")


@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=3),
    st.integers(0, len(WHOLE)),
    st.binary(max_size=9),
)
def test_whatever_becomes_of_the_bytes_no_pixels_differ_from_pillows(changes, end, more):
    damaged = bytearray(WHOLE)
    for at, byte in changes:
        damaged[at] = byte
    encoded = bytes(damaged[:end]) + more

    try:
        pixels = decode(encoded, spec_for("RGB", (9, 7)), Accepted(("PNG",)))
    except ServiceError:
        return  # what is refused is refused by Pillow's way, which other tests are about
    expected = by_pillow(encoded)
    assert expected is not None
    if expected.shape == (9, 7, 3):
        assert np.array_equal(pixels, expected)


def test_pixels_cut_into_many_chunks_are_put_together():
    cut = len(b"\x89PNG\r\n\x1a\n") + 25
    length = int.from_bytes(WHOLE[cut : cut + 4])
    data = WHOLE[cut + 8 : cut + 8 + length]
    pieces = b"".join(png_chunk(b"IDAT", data[at : at + 5]) for at in range(0, len(data), 5))
    encoded = WHOLE[:cut] + pieces + WHOLE[cut + 12 + length :]

    plain = read_plain_png(encoded)
    assert plain is not None
    assert plain.stream == data
    assert np.array_equal(decode(encoded, spec_for("RGB", (9, 7))), by_pillow(WHOLE))


def interlaced() -> bytes:
    changed = bytearray(WHOLE)
    changed[28] = 1
    return changed[:8] + png_chunk(b"IHDR", bytes(changed[16:29])) + changed[33:]


@pytest.mark.parametrize(
    "encoded",
    [
        encode(Image.fromarray(random_pixels(1)[0]), "JPEG"),
        encode(Image.new("P", (7, 9)), "PNG"),
        encode(Image.new("RGBA", (7, 9)), "PNG"),
        encode(Image.new("I;16", (7, 9)), "PNG"),
        interlaced(),
        WHOLE[:33] + png_chunk(b"tRNS", bytes(6)) + WHOLE[33:],
        WHOLE[:33] + png_chunk(b"eXIf", b"MM") + WHOLE[33:],
        WHOLE[:33] + png_chunk(b"gAMA", bytes(4)) + WHOLE[33:],
        WHOLE + b"more",
        WHOLE[:-1],
        WHOLE[:40],
        WHOLE[:45] + b"?" + WHOLE[46:],
        b"",
    ],
    ids=[
        *("jpeg", "palette", "alpha", "16-bit", "interlaced", "tRNS", "eXIf", "gAMA"),
        *("more", "cut", "half", "crc", "empty"),
    ],
)
def test_what_is_not_plain_is_left_to_pillow(encoded):
    assert read_plain_png(bytes(encoded)) is None


def test_a_plain_png_is_refused_by_the_limits_of_any_other():
    with pytest.raises(ServiceError, match="over the limit of 60 pixels"):
        decode(WHOLE, spec_for("RGB", (9, 7)), Accepted(max_pixels=60))
    with pytest.raises(ServiceError, match="not an image of an accepted format"):
        decode(WHOLE, spec_for("RGB", (9, 7)), Accepted(("JPEG",)))


def test_a_plain_png_whose_stream_ends_early_is_told_of_as_any_damaged_file():
    head, end = WHOLE[:33], WHOLE[-12:]
    length = int.from_bytes(WHOLE[33:37])
    encoded = head + png_chunk(b"IDAT", WHOLE[41 : 41 + length // 2]) + end

    assert read_plain_png(encoded) is not None
    with pytest.raises(ServiceError, match="the PNG image cannot be decoded"):
        decode(encoded, spec_for("RGB", (9, 7)))

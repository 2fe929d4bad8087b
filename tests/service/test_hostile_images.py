"""Bytes that are no image, or a broken or enormous one: always pixels or a ServiceError, and judged by the header."""

import io
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import black_png, encode, photo, png, png_chunk, spec_for

from service.errors import ConfigurationError, InvalidImage, ServiceError, TooLarge, UnsupportedFormat
from service.preprocessing import Accepted, decode, open_formats
from service.small_files import QUICK_BYTES, is_quick

FORMATS = Accepted().formats
FILES = {kind: encode(photo(), kind) for kind in FORMATS}
GRAY = spec_for("L")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # said of damaged files; no errors in service either


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_image_is_invalid(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    encoded = encode(Image.fromarray(noise), kind)

    with pytest.raises((InvalidImage, UnsupportedFormat) if kind in {"WEBP", "TIFF"} else InvalidImage):
        decode(encoded[: len(encoded) // 2], GRAY)


def test_nothing_at_all_is_named_as_such():
    with pytest.raises(UnsupportedFormat, match="no bytes"):
        decode(b"", GRAY)


@pytest.mark.parametrize("text", [b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", b"\0" * 4096])
def test_what_is_no_image_is_an_unsupported_format(text):
    with pytest.raises(UnsupportedFormat, match="JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF"):
        decode(text, GRAY)


@pytest.mark.parametrize("kind", ["ICO", "PPM", "TGA", "PCX"])
def test_formats_that_pillow_knows_and_we_do_not_accept_are_refused(kind):
    with pytest.raises(UnsupportedFormat):
        decode(encode(photo(), kind), GRAY)


def test_a_format_that_is_switched_off_is_refused():
    with pytest.raises(UnsupportedFormat):
        decode(FILES["GIF"], GRAY, Accepted(formats=("PNG",)))


@pytest.mark.parametrize("side", [7072, 13_000, 20_000, 1_000_000])
def test_too_many_pixels_are_seen_in_the_header(side):
    with pytest.raises(TooLarge):  # the pixels are missing: whoever tried to decode them would say InvalidImage
        decode(png(side, side, None), GRAY)


def test_a_13000_pixel_square_is_refused_without_being_decoded():
    encoded = black_png(13_000)
    assert len(encoded) < 25_000
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            decode(encoded, GRAY)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 2**20


def test_a_limit_above_pillows_own_warning_is_kept():
    warned = png(9_500, 10_000, None)  # 95 million pixels, over Pillow's 89 million

    with pytest.raises(InvalidImage):  # let in by its size, and then found to have no pixels
        decode(warned, GRAY, Accepted(max_pixels=120_000_000))


@pytest.mark.parametrize("pixels, fits", [(24 * 16, True), (24 * 16 - 1, False)])
def test_the_pixel_limit_includes_its_last_pixel(pixels, fits):
    accepted = Accepted(max_pixels=pixels)
    if fits:
        assert decode(FILES["PNG"], GRAY, accepted).shape == (8, 8, 1)
    else:
        with pytest.raises(TooLarge, match="24 × 16"):
            decode(FILES["PNG"], GRAY, accepted)


def pixels_or_service_error(encoded: bytes) -> None:
    try:
        pixels = decode(encoded, spec_for(), Accepted(max_pixels=1_000_000))
    except ServiceError:
        return
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.uint8


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=300))
def test_any_bytes_give_pixels_or_a_service_error(encoded):
    pixels_or_service_error(encoded)


SIGNATURES = [encoded[:size] for encoded in FILES.values() for size in (4, 12, 30)]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(SIGNATURES), st.binary(max_size=200))
def test_any_bytes_after_a_real_signature_give_pixels_or_a_service_error(signature, rest):
    pixels_or_service_error(signature + rest)


@pytest.mark.parametrize("kind", FORMATS)
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.differing_executors])
@given(data=st.data())
def test_a_mutated_image_gives_pixels_or_a_service_error(kind, data):
    encoded = bytearray(FILES[kind])
    for position in data.draw(st.lists(st.integers(0, len(encoded) - 1), min_size=1, max_size=8)):
        encoded[position] = data.draw(st.integers(0, 255))
    start = data.draw(st.integers(0, len(encoded)))
    end = data.draw(st.integers(start, min(len(encoded), start + 20)))
    pixels_or_service_error(bytes(encoded[:start] + encoded[end:]))


def test_open_formats_takes_what_this_pillow_can_read():
    assert open_formats(("PNG", "JPEG")) == ("PNG", "JPEG")


def test_open_formats_refuses_a_name_that_no_pillow_knows():
    with pytest.raises(ConfigurationError, match="JPGE is not a format"):
        open_formats(("PNG", "JPGE"))


def test_the_files_above_are_whole():
    for kind, encoded in FILES.items():
        assert Image.open(io.BytesIO(encoded)).format == kind


def test_only_small_files_without_compressed_texts_are_quick():
    small = encode(photo(), "PNG")
    texts = zlib.compress(bytes(1_000_000), 9)
    assert is_quick(small)
    assert is_quick(encode(photo(), "JPEG"))
    assert not is_quick(small + bytes(QUICK_BYTES))
    with_texts = [_with_chunk(small, png_chunk(kind, texts)) for kind in (b"zTXt", b"iTXt", b"iCCP", b"tEXt", b"eXIf")]
    assert not any(map(is_quick, with_texts))
    assert is_quick(_with_chunk(small, png_chunk(b"prVt", b"zTXt")))
    assert not any(is_quick(FILES[kind]) for kind in ("WEBP", "GIF", "BMP", "TIFF", "AVIF"))


@pytest.mark.parametrize("kind", [b"IDAT", b"gAMA", b"prVt"])
def test_a_small_png_of_many_chunks_is_not_quick(kind):
    whole = encode(photo(), "PNG")
    assert is_quick(_with_chunk(whole, png_chunk(kind, b"")))
    assert not is_quick(_with_chunk(whole, 100 * png_chunk(kind, b"")))


def _with_chunk(png: bytes, chunk: bytes) -> bytes:
    end = png.index(b"IEND") - 4
    return png[:end] + chunk + png[end:]


def test_a_small_jpeg_of_many_segments_is_not_quick():
    whole = encode(photo(), "JPEG")
    assert is_quick(whole[:2] + b"\xff\xfe\x00\x02" + whole[2:])
    assert not is_quick(whole[:2] + 100 * b"\xff\xfe\x00\x02" + whole[2:])

"""Any bytes give pixels of the model's shape, or a refusal; what was once found to be hard is kept in corpus/images."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import encode, photo, spec_for

from service.errors import InvalidImage, TooLarge, UnsupportedFormat
from service.preprocessing import Accepted, decode, open_formats

KINDS = open_formats(("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"))
FILES = [encode(photo(), kind) for kind in KINDS]
ACCEPTED = Accepted(KINDS, max_pixels=100_000)
CORPUS = sorted((Path(__file__).parent / "corpus" / "images").glob("*"))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # "Corrupt EXIF data", "Truncated File Read"


def pixels_or_a_refusal(encoded: bytes) -> None:
    try:
        pixels = decode(encoded, spec_for(), ACCEPTED)
    except (InvalidImage, TooLarge, UnsupportedFormat):
        return
    assert (pixels.dtype, pixels.shape) == (np.uint8, (8, 8, 3))


@st.composite
def damaged(draw) -> bytes:
    """Return a good file with some bytes changed, a piece cut out or put in, or its end missing."""
    content = bytearray(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["set", "cut", "put", "end"]))
        if kind == "set" and content:
            content[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at : at + draw(st.integers(1, 40))]
        elif kind == "put":
            content[at:at] = draw(st.binary(max_size=20))
        else:
            del content[at:]
    return bytes(content)


@settings(max_examples=600, deadline=None)
@given(damaged())
def test_a_damaged_file_gives_pixels_or_a_refusal(encoded):
    pixels_or_a_refusal(encoded)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(FILES), st.integers(4, 60))
def test_noise_after_a_true_beginning_gives_pixels_or_a_refusal(noise, file, kept):
    pixels_or_a_refusal(file[:kept] + noise)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_what_was_hard_once_still_gives_pixels_or_a_refusal(path):
    pixels_or_a_refusal(path.read_bytes())

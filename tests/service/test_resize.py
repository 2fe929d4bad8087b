"""Resize and crop, against Pillow's own resize of the whole image followed by a crop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from support import encode, photo, spec_for

from service.preprocessing import Preprocessing, decode, encode_decoded

FILTERS = ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


def resize_then_crop(image: Image.Image, resize_to: int, size: tuple[int, int], name: str) -> np.ndarray:
    """Do what torchvision's Resize(int) and CenterCrop do, the whole image in between."""
    width, height = (int(resize_to * side / min(image.size)) for side in image.size)  # the shorter one is exact
    whole = image.resize((width, height), Image.Resampling[name.upper()])
    left, top = round((width - size[1]) / 2), round((height - size[0]) / 2)
    return np.asarray(whole.crop((left, top, left + size[1], top + size[0])))


@pytest.mark.parametrize("name", FILTERS)
def test_exact_resize_is_pillows(name):
    pixels = decode(encode(photo(), "PNG"), spec_for("RGB", (7, 11), filter=name))

    assert np.array_equal(pixels, np.asarray(photo().resize((11, 7), Image.Resampling[name.upper()])))


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    room=st.integers(0, 16),
    name=st.sampled_from(["bilinear", "hamming", "bicubic", "lanczos"]),  # nearest and box jump where a pixel ends
)
def test_shorter_side_and_centre_crop_equal_resize_then_crop(width, height, size, room, name):
    image = photo(size=(width, height))
    spec = spec_for("RGB", size, resize="shorter_side", resize_to=max(size) + room, filter=name)

    pixels = decode(encode(image, "PNG"), spec)

    expected = resize_then_crop(image, spec.resize_to, size, name)
    # The last bit of a box's edge may tip the first pass by one level; the second hands on at most Σ|weights| < 1.5 of
    # it, and rounds.
    assert np.abs(pixels.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("resize_to", [224, 256])
@pytest.mark.parametrize("side", [55, 71, 83, 95])  # of these, side * (224 / side) in floating point is below 224
def test_the_centre_crop_is_not_shifted_by_a_rounded_scale(side, resize_to):
    for size in ((side, 2 * side), (2 * side + 1, side)):
        noise = np.random.default_rng(side).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image = Image.fromarray(noise)  # neighbours differ by up to 255: a 16th of a pixel shows

        pixels = decode(encode(image, "PNG"), spec_for("RGB", (224, 224), resize="shorter_side", resize_to=resize_to))

        expected = resize_then_crop(image, resize_to, (224, 224), "bilinear")
        assert np.abs(pixels.astype(int) - expected).max() <= 1  # the last bit of a box's edge, as above


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1), (2, 50_000)])
def test_a_panorama_is_cropped_before_it_is_enlarged(size):
    spec = spec_for("RGB", (224, 224), resize="shorter_side", resize_to=256)
    strip = Image.new("RGB", size, (9, 90, 200))
    # Enlarged whole it would have 256 × 25,600,000 pixels, more memory than the machine: getting here is the proof.
    pixels = decode(encode(strip, "PNG"), spec)

    assert pixels.shape == (224, 224, 3)
    assert (pixels == (9, 90, 200)).all()


@given(
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    room=st.integers(0, 16),
    resize=st.sampled_from(["exact", "shorter_side"]),
    name=st.sampled_from(FILTERS),
    mode=st.sampled_from(["L", "RGB"]),
)
def test_decoded_pixels_can_be_written_as_a_file_that_decodes_to_them(size, room, resize, name, mode):
    cropped = {"resize": resize, "resize_to": max(size) + room if resize == "shorter_side" else None}
    spec = spec_for(mode, size, filter=name, **cropped)
    pixels = np.random.default_rng(room).integers(0, 256, (*size, spec.channels), dtype=np.uint8)

    assert np.array_equal(decode(encode_decoded(pixels, spec), spec), pixels)


def test_an_image_of_the_right_size_keeps_its_pixels():
    pixels = decode(encode(photo(), "PNG"), spec_for("RGB", (16, 24)))

    assert np.array_equal(pixels, np.asarray(photo()))
    pixels[0] = 0  # belongs to the caller, not to Pillow


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"mean": (0.0,)}, "mean and std need as many values as mode RGB has channels, 3"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
        ({"size": (0, 8)}, "size must be positive"),
        ({"resize": "shorter_side"}, "needs resize_to"),
        ({"resize": "shorter_side", "resize_to": 7}, "needs resize_to"),
        ({"filter": "cubic"}, "filter"),
        ({"crop": 8}, "Extra inputs"),
    ],
)
def test_inconsistent_preprocessing_is_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        Preprocessing(**{**spec_for().model_dump(), **wrong})

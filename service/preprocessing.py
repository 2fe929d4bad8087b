"""Bytes to pixels and back: the only user of Pillow. Pure functions; knows no model and no web.

encoded bytes ─ header: format, size ─ pixels ─ EXIF turn ─ 8 bits ─ alpha ─ mode ─ resize and crop ─ uint8 (H, W, C)

Training, evaluation and serving all decode here, so that a model meets the pixels that it was trained on.
"""

import contextlib
import io
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.anatomy import excess_of
from service.errors import NO_BYTES, ConfigurationError, InvalidImage, TooLarge, UnsupportedFormat
from service.small_files import QUICK_BYTES, PlainPng, read_plain_png

Pixels = NDArray[np.uint8]
Hold = Callable[[int], AbstractContextManager[None]]

ORIENTATION_TAG = 0x0112  # EXIF 2.32, section 4.6.4 A
# What undoes each EXIF orientation; 1 is upright and anything else is not a turn (EXIF 2.32, table 4).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DIRECT_MODES = frozenset({"1", "L", "P", "RGB", "RGBA", "LA", "PA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "HSV"})
STRIP_PIXELS = 2**20
MOST_SIDE = 2**21  # one wide, an image costs Pillow 27 bytes for each pixel: 1.3 GB if only pixels were bounded
SIXTEEN_BIT_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})


class Preprocessing(BaseModel):
    """How a model wants its pixels; stored in the manifest.

    `mean` and `std` are per channel for pixels scaled to 0–1; the graph applies them, not this module.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["L", "RGB"]
    size: tuple[int, int] = Field(description="height and width that the model takes, pixels")
    resize: Literal["exact", "shorter_side"] = Field(
        "exact", description="exact: to `size`, whatever the shape; shorter_side: to `resize_to`, then the centre crop"
    )
    resize_to: int | None = Field(None, ge=1, description="length of the shorter side before the crop, pixels")
    filter: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bilinear"
    exif: Literal["apply", "ignore"] = Field(
        "apply", description="whether a photo is turned upright first; Pillow turns TIFF in any case"
    )
    alpha: Literal["white", "black", "drop"] = Field("black", description="what lies behind transparent pixels")
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        """1 for mode L, 3 for RGB."""
        return len(self.mode)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need as many values as mode {self.mode} has channels, {self.channels}")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        if min(self.size) < 1:
            raise ValueError("size must be positive")
        if self.resize == "shorter_side" and (self.resize_to is None or self.resize_to < max(self.size)):
            raise ValueError("resize shorter_side needs resize_to, at least as large as size")
        return self


@dataclass(frozen=True, slots=True)
class Accepted:
    """Which images are taken at all: Pillow's names of formats, and the largest size by header, in pixels."""

    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
    max_pixels: int = 50_000_000


def open_formats(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of `names` that this Pillow can decode, its plug-ins loaded.

    Raises ConfigurationError for a name that no Pillow knows.
    """
    Image.init()
    known = set(Image.ID) | {"AVIF"}  # AVIF is missing from Pillow builds without libavif
    if unknown := [name for name in names if name not in known]:
        raise ConfigurationError(f"formats: {', '.join(unknown)} is not a format; known are {', '.join(sorted(known))}")
    return tuple(name for name in names if name in Image.OPEN)


def describe_decoders() -> dict[str, str]:
    """Return Pillow's version and its codecs': another one may give other pixels."""
    codecs = ("jpg", "libjpeg_turbo", "webp", "avif", "zlib", "libtiff", "jpg_2000")
    found = {name: features.version(name) for name in codecs if name in features.get_supported()}
    return {"pillow": PIL.__version__, **{name: str(version) for name, version in found.items() if version}}


def refuse_warnings() -> None:
    """Have every image refused of which Pillow warns, from now on and in all threads of this process.

    A filter that stands for good is the same for every thread; `warnings.catch_warnings` changes it for all while one
    thread decodes, and may leave another's behind.
    """
    warnings.filterwarnings("error", module=r"PIL\.")


def hold_nothing(_pixels: int) -> AbstractContextManager[None]:
    """Let any number of pixels be decoded."""
    return nullcontext()


def decode(encoded: bytes, spec: Preprocessing, accepted: Accepted = Accepted(), hold: Hold = hold_nothing) -> Pixels:
    """Return the pixels of an encoded image as its model wants them, uint8 (height, width, channels).

    `hold` gets the number of pixels by the header; its context is open while they are in memory, and what it raises
    passes through.
    Raises UnsupportedFormat, TooLarge (judged by the header, before any pixel is decoded) or InvalidImage.
    """
    plain = read_plain_png(encoded) if len(encoded) <= QUICK_BYTES and "PNG" in accepted.formats else None
    if plain is not None and _is_as_wanted(plain, spec, accepted):
        with contextlib.suppress(ValueError), hold(plain.width * plain.height):  # a damaged one is told of below
            return _as_they_are(Image.frombytes(plain.mode, plain.size, plain.stream, "zip", plain.mode, 0))
    image = _open(encoded, accepted)
    with hold(image.width * image.height):
        return _decoded(image, spec)


def _is_as_wanted(plain: PlainPng, spec: Preprocessing, accepted: Accepted) -> bool:
    """True where nothing is left to do but to decode."""
    is_of_size = plain.size == spec.size[::-1] and plain.width * plain.height <= accepted.max_pixels
    return is_of_size and plain.mode == spec.mode and spec.resize == "exact"


def _decoded(image: Image.Image, spec: Preprocessing) -> Pixels:
    try:
        image.load()
        return _to_pixels(image, spec)
    except (InvalidImage, MemoryError):
        raise
    except Warning as warning:
        raise _doubtful(warning) from warning
    except Exception as error:  # Pillow's decoders raise what their libraries do: OSError, SyntaxError, struct.error
        raise InvalidImage(f"the {image.format} image cannot be decoded: {error}") from error


def _doubtful(warning: Warning) -> InvalidImage:
    return InvalidImage(f"the image is damaged, or its metadata are: {str(warning).strip()}; save it anew")


def from_pixels(pixels: Pixels, spec: Preprocessing) -> Pixels:
    """Return `pixels`, uint8 (height, width, 1 or 3), as `decode` would give them from a lossless file of them."""
    return _to_pixels(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), spec)


def encode_png(pixels: Pixels) -> bytes:
    """Return `pixels`, uint8 (height, width, 1 or 3), as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def encode_decoded(pixels: Pixels, spec: Preprocessing) -> bytes:
    """Return a PNG file that `decode` turns into exactly `pixels`, uint8 (*spec.size, 1 or 3).

    Where the model sees a centre crop, a frame that repeats the edge lies around it, for the crop to take off.
    """
    if spec.resize == "exact":
        return encode_png(pixels)
    assert spec.resize_to is not None
    side = spec.resize_to  # a square that is not scaled, so that no filter changes a pixel
    left, top, right, bottom = (int(edge) for edge in _centre((side, side), spec))
    return encode_png(np.pad(pixels, ((top, side - bottom), (left, side - right), (0, 0)), mode="edge"))


def _open(encoded: bytes, accepted: Accepted) -> Image.Image:
    if not encoded:
        raise UnsupportedFormat(NO_BYTES)
    if excess := excess_of(encoded):
        raise TooLarge(f"the image {excess}; save it anew")
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is for all of a process and warns first; ours follows below
    try:
        image = Image.open(io.BytesIO(encoded), formats=accepted.formats)
    except UnidentifiedImageError as error:
        names = ", ".join(accepted.formats)
        raise UnsupportedFormat(f"the data is not an image of an accepted format ({names})") from error
    except Warning as warning:
        raise _doubtful(warning) from warning
    except Exception as error:  # plug-ins raise what they like at a header that is theirs and broken
        raise InvalidImage(f"the header of the image cannot be read: {error}") from error
    if max(image.size) > MOST_SIDE:
        raise TooLarge(f"the image is {image.width} × {image.height} by its header; a side may have {MOST_SIDE} pixels")
    if image.width * image.height > accepted.max_pixels:
        limit = f"{accepted.max_pixels:,} pixels"
        raise TooLarge(f"the image is {image.width} × {image.height} by its header, over the limit of {limit}")
    return image


def _to_pixels(image: Image.Image, spec: Preprocessing) -> Pixels:
    if spec.exif == "apply":
        image = _upright(image)
    image = _to_mode(_to_eight_bits(image), spec)
    return _as_they_are(_resize(image, spec))


def _as_they_are(image: Image.Image) -> Pixels:
    held = image.tobytes()  # NumPy's own copy would let go of the interpreter, which a lane then takes
    return np.frombuffer(bytearray(held), np.uint8).reshape(image.height, image.width, -1)  # (H, W) → (H, W, 1)


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION_TAG, 1))
    except Warning:
        raise
    except Exception:  # noqa: BLE001 - broken EXIF raises anything; the pixels are still good, and browsers show them
        return image
    return image if turn is None else image.transpose(turn)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BIT_MODES:
        return _in_strips(image, "L", _scale_to_eight_bits)
    if image.mode not in DIRECT_MODES:
        raise InvalidImage(f"pixels of mode {image.mode} are not supported; send 8 or 16 bits per channel")
    return image


def _scale_to_eight_bits(strip: Image.Image) -> Image.Image:
    values = np.asarray(strip).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise InvalidImage("the image has 32-bit pixels; send 8 or 16 bits per channel")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 / 255 = 257: scaled, never clipped


def _to_mode(image: Image.Image, spec: Preprocessing) -> Image.Image:
    if image.has_transparency_data and spec.alpha != "drop":
        return _in_strips(image, spec.mode, partial(_flatten, background=spec.alpha))
    if image.mode == spec.mode:
        return image
    image.info.pop("transparency", None)  # dropped, or there is none; of some palettes' Pillow would warn
    # CMYK and palettes reach gray only through RGB
    return image.convert("RGB").convert(spec.mode)


def _flatten(strip: Image.Image, background: str) -> Image.Image:
    strip = strip.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", strip.size, background), strip).convert("RGB")


def _in_strips(image: Image.Image, mode: str, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Return the image changed strip by strip: changed whole, 50 million pixels would cost most of a gigabyte."""
    result = Image.new(mode, image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        strip.info = image.info  # a palette's transparency lies there
        result.paste(change(strip).convert(mode), (0, top))
    return result


def _resize(image: Image.Image, spec: Preprocessing) -> Image.Image:
    height, width = spec.size
    box = (
        _centre(image.size, spec)
        if spec.resize == "shorter_side"
        else (0.0, 0.0, float(image.width), float(image.height))
    )
    if image.size == (width, height) and box == (0.0, 0.0, float(width), float(height)):
        return image  # resizing would copy it
    return image.resize((width, height), Image.Resampling[spec.filter.upper()], box=box)


def _centre(size: tuple[int, int], spec: Preprocessing) -> tuple[float, float, float, float]:
    """Return the part of the image that the centre crop shows, in source pixels: left, top, right, bottom.

    Resizing this part alone gives what resizing all and cropping would, without the memory that a panorama would cost.
    """
    assert spec.resize_to is not None
    resized = [side * spec.resize_to // min(size) for side in size]  # in integers, so that the shorter one is exact
    crop = (spec.size[1], spec.size[0])
    first = [round((whole - part) / 2) for whole, part in zip(resized, crop, strict=True)]
    left, top = (start * side / whole for start, side, whole in zip(first, size, resized, strict=True))
    right, bottom = (
        (start + part) * side / whole for start, part, side, whole in zip(first, crop, size, resized, strict=True)
    )
    return left, top, min(right, float(size[0])), min(bottom, float(size[1]))

"""Every accepted format and pixel mode becomes the pixels that it means; the oracles are Pillow and arithmetic."""

import io

import numpy as np
import pytest
from PIL import Image
from support import encode, photo, png, spec_for

from service.errors import InvalidImage
from service.preprocessing import decode, encode_png

LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True, "exact": True}, "BMP": {}, "TIFF": {}}
FORMATS = [*LOSSLESS, "JPEG", "GIF", "AVIF"]


def at_own_size(image: Image.Image, mode: str = "RGB", **options):
    return spec_for(mode, (image.height, image.width), **options)


def gray16(values: np.ndarray, *, colour: int = 0) -> bytes:
    """Return a 16-bit PNG of (H, W) or (H, W, 3) values."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(width, height, rows, bits=16, colour=colour)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_pixels_that_pillow_sees(kind, mode):
    encoded = encode(photo(), kind)
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB").convert(mode))

    pixels = decode(encoded, at_own_size(photo(), mode))

    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, expected.reshape(16, 24, len(mode)))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_give_back_what_was_drawn(kind, mode):
    drawn = photo(mode)

    pixels = decode(encode(drawn, kind, **LOSSLESS[kind]), at_own_size(drawn, mode))

    assert np.array_equal(pixels.squeeze(), np.asarray(drawn))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_encode_png_is_undone_by_decode(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, len(mode)), dtype=np.uint8)

    assert np.array_equal(decode(encode_png(pixels), spec_for(mode, (5, 9))), pixels)


@pytest.mark.parametrize("kind, tolerance", [("TIFF", 1), ("JPEG", 4)])  # 1: Pillow rounds products; 4: JPEG as well
@pytest.mark.parametrize(
    "ink, rgb",
    [
        ((0, 0, 0, 0), (255, 255, 255)),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 255, 127), (128, 128, 0)),
    ],
)
def test_cmyk_inks_become_their_colours_and_are_not_inverted(kind, tolerance, ink, rgb):
    options = {"quality": 100} if kind == "JPEG" else {}  # Pillow writes CMYK JPEG inverted, with an Adobe marker
    encoded = encode(Image.new("CMYK", (8, 8), ink), kind, **options)

    pixels = decode(encoded, spec_for("RGB", (8, 8))).astype(int)

    assert np.abs(pixels - rgb).max() <= tolerance


def test_cmyk_reaches_a_gray_model():
    white = encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "TIFF")

    assert (decode(white, spec_for("L")) == 255).all()


def test_16_bit_gray_png_is_scaled_not_clipped():
    values = np.arange(65536).reshape(256, 256)

    pixels = decode(gray16(values), spec_for("L", (256, 256)))[:, :, 0]

    assert np.abs(pixels - values / 257).max() <= 0.5  # the nearest level, everywhere: 65535 / 255 = 257
    assert np.array_equal(pixels.ravel()[::257], np.arange(256))


def test_16_bit_rgb_png_is_scaled_not_clipped():
    levels = np.arange(256).reshape(16, 16)
    values = np.stack([levels, 255 - levels, levels // 2], axis=-1)

    assert np.array_equal(decode(gray16(values * 257, colour=2), spec_for("RGB", (16, 16))), values)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_16_bit_tiff_of_either_byte_order_is_scaled(mode):
    values = np.arange(64, dtype=">u2" if mode == "I;16B" else "<u2").reshape(8, 8) * 257
    image = Image.frombytes(mode, (8, 8), values.tobytes())

    assert np.array_equal(decode(encode(image, "TIFF"), spec_for("L"))[:, :, 0], values // 257)


def test_32_bit_integers_are_refused():
    image = Image.fromarray(np.full((8, 8), 1 << 20, np.int32))

    with pytest.raises(InvalidImage, match="32-bit"):
        decode(encode(image, "TIFF"), spec_for("L"))


def test_floating_point_tiff_is_refused():
    with pytest.raises(InvalidImage, match="mode F"):
        decode(encode(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), spec_for("L"))


@pytest.mark.parametrize("bit, level", [(0, 0), (1, 255)])
def test_one_bit_images_are_black_and_white(bit, level):
    assert (decode(encode(Image.new("1", (8, 8), bit), "PNG"), spec_for("L")) == level).all()


def see_through(kind: str) -> bytes:
    """Return a file whose left half is opaque gray 100 and whose right half is transparent."""
    image = Image.new("LA" if kind == "LA" else "RGBA", (8, 8))
    image.paste((100, 255) if kind == "LA" else (100, 100, 100, 255), (0, 0, 4, 8))
    if kind == "palette":
        image = image.quantize(4)
    if kind == "tRNS":
        image = Image.new("L", (8, 8), 7)
        image.paste(100, (0, 0, 4, 8))
        return encode(image, "PNG", transparency=7)
    return encode(image, "PNG")


@pytest.mark.parametrize("alpha, behind", [("black", 0), ("white", 255)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "tRNS"])
def test_transparent_pixels_show_the_colour_behind_them(kind, mode, alpha, behind):
    pixels = decode(see_through(kind), spec_for(mode, alpha=alpha))

    assert (pixels[:, :4] == 100).all()
    assert (pixels[:, 4:] == behind).all()


def test_half_transparent_pixels_are_mixed():
    encoded = encode(Image.new("RGBA", (8, 8), (200, 100, 0, 128)), "PNG")
    expected = np.array([200, 100, 0]) * 128 / 255 + 255 * 127 / 255

    pixels = decode(encoded, spec_for(alpha="white"))

    assert np.abs(pixels - expected).max() <= 1  # one rounding


def test_alpha_can_be_dropped():
    encoded = encode(Image.new("RGBA", (8, 8), (200, 100, 50, 0)), "PNG")

    assert (decode(encoded, spec_for(alpha="drop")) == (200, 100, 50)).all()


def test_the_alpha_of_a_palette_can_be_dropped():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    encoded = encode(image, "PNG", transparency=bytes([255, 128]))

    assert (decode(encoded, spec_for(alpha="drop")) == (200, 100, 50)).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    encoded = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert Image.open(io.BytesIO(encoded)).n_frames == 3

    assert (decode(encoded, spec_for()) == (255, 0, 0)).all()


# What EXIF 2.32, table 4 says of row 0 and column 0, as the array that a camera stores for an upright one.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


def turned(orientation: int, kind: str, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](np.asarray(photo())))
    return encode(Image.fromarray(stored), kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", STORED)
def test_exif_turns_a_jpeg_upright(orientation):
    encoded = turned(orientation, "JPEG", quality=100, subsampling=0)

    pixels = decode(encoded, at_own_size(photo())).astype(int)

    # Quality 100 quantizes by 1: rounding of 8×8 coefficients and colours moves a level or two; a wrong turn, 200.
    assert np.abs(pixels - np.asarray(photo())).max() <= 4


@pytest.mark.parametrize("kind", LOSSLESS.keys() - {"BMP"})
@pytest.mark.parametrize("orientation", STORED)
def test_exif_turns_lossless_formats_upright(orientation, kind):
    pixels = decode(turned(orientation, kind, **LOSSLESS[kind]), at_own_size(photo()))

    assert np.array_equal(pixels, np.asarray(photo()))


def test_exif_can_be_ignored():
    stored = STORED[6](np.asarray(photo()))

    assert np.array_equal(decode(turned(6, "PNG"), spec_for("RGB", stored.shape[:2], exif="ignore")), stored)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation

    assert np.array_equal(decode(encode(photo(), "PNG", exif=exif), at_own_size(photo())), np.asarray(photo()))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow says "Corrupt EXIF data", as it does in service
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"?"]
)
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_broken_exif_still_decodes(kind, exif):
    whole, broken = encode(photo(), kind), encode(photo(), kind, exif=exif)
    assert broken != whole

    assert np.array_equal(decode(broken, at_own_size(photo())), decode(whole, at_own_size(photo())))

"""Large 16-bit and transparent images are changed strip by strip: the pixels of the whole, without its memory."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import encode, png, spec_for

import service
from service.preprocessing import STRIP_PIXELS, decode

SIZES = [(1500, 1400), (2, STRIP_PIXELS + 3), (STRIP_PIXELS + 3, 2)]  # the last strip is short; a row is a strip


def noise(size: tuple[int, int], mode: str) -> Image.Image:
    """Return independent random channels, so that a strip in the wrong place shows."""
    width, height = size
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(2) if len(mode) == 1 else pixels, mode)


def transparent(size: tuple[int, int], kind: str) -> bytes:
    match kind:
        case "RGBA" | "LA":
            return encode(noise(size, kind), "PNG", compress_level=1)
        case "palette":
            levels = bytes(range(256))
            image = noise(size, "L")
            image.putpalette(bytes(range(255, -1, -1)) + levels + levels)
            return encode(image, "PNG", compress_level=1, transparency=levels)
        case "GIF":
            return encode(noise(size, "L"), "GIF", transparency=7)
        case "L":
            return encode(noise(size, "L"), "PNG", compress_level=1, transparency=7)
        case _:
            image = noise(size, "RGB")
            return encode(image, "PNG", compress_level=1, transparency=image.getpixel((0, 1)))


def flattened_whole(encoded: bytes, mode: str, behind: str) -> np.ndarray:
    image = Image.open(io.BytesIO(encoded))
    image.load()
    assert image.has_transparency_data
    whole = Image.alpha_composite(Image.new("RGBA", image.size, behind), image.convert("RGBA"))
    return np.asarray(whole.convert("RGB").convert(mode))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind, mode", [("RGBA", "RGB"), ("LA", "L"), ("palette", "RGB"), ("L", "RGB"), ("RGB", "L")])
def test_a_transparent_image_of_many_strips_has_the_pixels_of_the_whole(size, kind, mode):
    encoded = transparent(size, kind)

    pixels = decode(encoded, spec_for(mode, size[::-1], alpha="white"))

    assert np.array_equal(pixels.squeeze(), flattened_whole(encoded, mode, "white").squeeze())


def test_a_transparent_gif_of_many_strips_has_the_pixels_of_the_whole():
    encoded = transparent(SIZES[0], "GIF")

    assert np.array_equal(decode(encoded, spec_for("RGB", (1400, 1500))), flattened_whole(encoded, "RGB", "black"))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_16_bit_image_of_many_strips_has_the_pixels_of_the_whole(size):
    width, height = size
    values = np.random.default_rng(width).integers(0, 65536, (height, width), dtype=np.uint16)
    encoded = encode(Image.fromarray(values), "PNG", compress_level=1)

    pixels = decode(encoded, spec_for("L", (height, width)))

    assert np.array_equal(pixels[:, :, 0], np.rint(values / 257))  # 65535 / 255 = 257


SIDE = 5000
ROW = b"\0" + bytes(range(200)) * (SIDE // 100)  # filter 0, then 16 bits a pixel
FILES = {  # name → the file, the mode asked for, bytes a pixel as Pillow holds it and the result
    "16 bit": (lambda: png(SIDE, SIDE, ROW * SIDE, bits=16), "L", 2 + 1),
    "gray and alpha": (lambda: png(SIDE, SIDE, ROW * SIDE, bits=8, colour=4), "L", 4 + 1),
    "colour and alpha": (lambda: png(SIDE, SIDE, (ROW + ROW[1:]) * SIDE, bits=8, colour=6), "RGB", 4 + 4),
}
# 2^20 pixels a strip, of which NumPy and Pillow hold up to four copies of up to 8 bytes a pixel; doubled.
STRIPS_BYTES = 2 * 4 * 8 * STRIP_PIXELS

# VmHWM (proc(5)) is the most memory that a process ever held; a process of its own, for it never goes back.
MEASURE = """
import re, sys
from pathlib import Path
from service.preprocessing import Preprocessing, decode

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

mode, path = sys.argv[1:]
encoded = Path(path).read_bytes()
values = (0.5,) * len(mode)
spec = Preprocessing(mode=mode, size=(8, 8), mean=values, std=values)
before = peak()
decode(encoded, spec)
print(peak() - before)
"""


@pytest.mark.parametrize("name", FILES)
def test_a_large_image_costs_its_pixels_and_the_result_and_no_copy_of_the_whole_in_between(tmp_path, name):
    make, mode, bytes_a_pixel = FILES[name]
    path = tmp_path / "large.png"
    path.write_bytes(make())
    root = Path(service.__file__).parent.parent
    command = [sys.executable, "-c", MEASURE, mode, str(path)]

    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)

    assert int(done.stdout) < bytes_a_pixel * SIDE**2 + STRIPS_BYTES

"""What Pillow only warns of is refused, in every thread of a real process, where a warning is no error by itself."""

import struct
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image
from support import encode, photo, png_chunk

pytestmark = pytest.mark.e2e

PNG = encode(photo(), "PNG")
JPEG = encode(photo(), "JPEG")
LEFT_TO_RIGHT = struct.pack("<HHII", 0x0112, 3, 1, 1)  # tag, type, count, value (TIFF 6.0, section 2)
BEYOND_THE_FILE = struct.pack("<HHII", 0x010F, 2, 4000, 5000)


def exif(*entries: bytes) -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


def tiff_with(entry: bytes) -> bytes:
    """Return a TIFF file with one entry more in its directory, which is written anew at the end."""
    file = encode(photo(), "TIFF")
    (at,) = struct.unpack("<I", file[4:8])
    (count,) = struct.unpack("<H", file[at : at + 2])
    entries = file[at + 2 : at + 2 + 12 * count]
    directory = struct.pack("<H", count + 1) + entries + entry + bytes(4)
    return file[:4] + struct.pack("<I", len(file)) + file[8:] + directory


DOUBTFUL = {
    "JPEG whose EXIF is cut": encode(photo(), "JPEG", exif=exif()[:-4] + b"\xff\xff"),
    "JPEG with a tag beyond its end": encode(photo(), "JPEG", exif=exif(LEFT_TO_RIGHT, BEYOND_THE_FILE)),
    "WebP with a tag beyond its end": encode(photo(), "WEBP", exif=exif(LEFT_TO_RIGHT, BEYOND_THE_FILE)),
    "TIFF with a tag beyond its end": tiff_with(struct.pack("<HHII", 0x806D, 2, 5000, 60000)),
    "APNG without a frame": PNG[:33] + png_chunk(b"acTL", bytes(8)) + PNG[33:],
    "APNG with two headers": PNG[:33] + 2 * png_chunk(b"acTL", struct.pack(">II", 1, 0)) + PNG[33:],
    "malformed MPO": JPEG[:2] + b"\xff\xe2\0\x0eMPF\0II*\0\xff\xff\xff\x0f" + JPEG[2:],
}


def see_through() -> bytes:
    image = photo().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return encode(image.quantize(16), "PNG")


GOOD = {
    "JPEG with EXIF": encode(photo(), "JPEG", exif=exif(LEFT_TO_RIGHT)),
    "EXIF that is none": encode(photo(), "JPEG", exif=b"?"),
    "palette with transparency": see_through(),
    "TIFF": encode(photo(), "TIFF"),
}


def ask(server, content: bytes) -> httpx.Response:
    return httpx.post(f"{server.url}/predict", content=content, timeout=30)


@pytest.mark.parametrize("content", DOUBTFUL.values(), ids=DOUBTFUL)
def test_422_for_an_image_of_which_pillow_warns(server, content):
    answer = ask(server, content)

    assert (answer.status_code, answer.json()["type"]) == (422, "urn:foldserve:problem:invalid-image")
    assert "damaged" in answer.json()["detail"]


@pytest.mark.parametrize("content", GOOD.values(), ids=GOOD)
def test_200_for_an_image_of_which_it_does_not(server, content):
    assert ask(server, content).status_code == 200


def test_threads_that_decode_at_once_refuse_the_doubtful_and_nothing_else(server):
    files = [*[(422, one) for one in DOUBTFUL.values()], *[(200, one) for one in GOOD.values()]] * 20
    with ThreadPoolExecutor(16) as pool, httpx.Client(base_url=server.url, timeout=30) as client:
        answers = pool.map(lambda one: client.post("/predict", content=one[1]).status_code, files)

        assert list(answers) == [expected for expected, _ in files]
    assert "Warning" not in server.said()

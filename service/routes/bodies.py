"""Reads the images out of a request body, under limits that hold while it arrives.

Three forms: the raw file; multipart with parts named `file`; JSON with base64. What `curl -T` and
`curl --data-binary` send by themselves (no type, octet-stream, form) is taken as a raw file.
"""

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import lru_cache

from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from service.config import Settings
from service.errors import BodyTooSlow, CallerGone, MalformedRequest, TooLarge, UnsupportedFormat
from service.routes.connection import arrived_body, before
from service.routes.encodings import check_encoding, inflate
from service.schemas import ImagesBody

RAW_TYPES = frozenset({"", "application/octet-stream", "application/x-www-form-urlencoded"})
TYPES_KEPT = 64
PART_NAME = "file"
MOST_RECEIPT_BYTES = (
    16 * 2**10
)  # twenty times a receipt; what pydantic makes of other JSON is hundreds of times its size


@dataclass(frozen=True, slots=True)
class Upload:
    """One image as it was sent; `fault` where its bytes could not be had of what was sent, which are empty then."""

    filename: str | None
    encoded: bytes
    fault: MalformedRequest | None = None


@lru_cache(TYPES_KEPT)
def is_raw(content_type: str) -> bool:
    """True where a body of this type is the image itself."""
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type in RAW_TYPES or media_type.startswith("image/")


async def read_uploads(request: Request, settings: Settings, deadline: float) -> list[Upload]:
    """Return the images of a request, at least one; `deadline` as in `read_body`.

    Raises MalformedRequest, TooLarge, BodyTooSlow, DeadlineExceeded, CallerGone or UnsupportedFormat.
    """
    content_type = request.headers.get("content-type", "")
    is_file = is_raw(content_type)
    media_type = content_type.partition(";")[0].strip().lower()
    if not is_file and media_type not in {"multipart/form-data", "application/json"}:
        raise UnsupportedFormat(
            f"content type {media_type} is not accepted; send the image itself as image/*, "
            "multipart/form-data with parts named `file`, or application/json with base64 `images`"
        )
    body = await read_body(request, settings, deadline)
    if not body:
        raise MalformedRequest("the body is empty; send an image, for instance with curl -T image.png")
    if is_file:
        return [Upload(None, body)]
    parse = _from_multipart if media_type == "multipart/form-data" else _from_json
    uploads = await parse(request, body, settings)
    if len(uploads) > settings.max_images:
        raise TooLarge(f"{len(uploads)} images in one request, the limit is {settings.max_images}")
    return uploads


def expected_bytes(request: Request, settings: Settings) -> int:
    """Return how many bytes the body will have at most: its announced length, or the limit where it announces none."""
    length = request.headers.get("content-length", "")
    is_final = length.isdecimal() and _encoding(request) == "identity"  # what is compressed may grow to the limit
    return min(int(length), settings.max_body_bytes) if is_final else settings.max_body_bytes


async def read_body(request: Request, settings: Settings, deadline: float) -> bytes:
    """Return the body, inflated; it has to arrive before `deadline`, a time of `time.monotonic` in seconds.

    Raises TooLarge, BodyTooSlow, DeadlineExceeded, CallerGone, UnsupportedFormat or MalformedRequest.
    """
    encoding = _encoding(request)
    check_encoding(encoding)
    limit = settings.max_body_bytes
    if (length := request.headers.get("content-length", "")).isdecimal() and int(length) > limit:
        raise TooLarge(f"the body has {int(length):,} bytes, the limit is {limit:,}")
    body = arrived_body(request)
    if body is None:
        body = await before(deadline, _receive_body(request, settings))
    elif len(body) > limit:
        raise TooLarge(f"the body has more than {limit:,} bytes")
    if encoding == "identity":
        return body
    return await asyncio.to_thread(inflate, body, encoding, settings.max_body_bytes)


def _encoding(request: Request) -> str:
    return request.headers.get("content-encoding", "identity").strip().lower()


async def _receive_body(request: Request, settings: Settings) -> bytes:
    limit = settings.max_body_bytes
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise TooLarge(f"the body has more than {limit:,} bytes")
    except TimeoutError:
        raise BodyTooSlow(f"the body did not arrive within {settings.body_timeout_s:g} s") from None
    except ClientDisconnect:
        raise CallerGone("the connection closed before the body was complete") from None
    return bytes(body)


async def read_receipt_and_file(request: Request, settings: Settings, deadline: float) -> tuple[str, bytes]:
    """Return the parts `receipt`, as text, and `file` of a multipart body. Raises as `read_uploads` does."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise UnsupportedFormat("send multipart/form-data with the parts `receipt` (JSON) and `file` (the image)")
    form = await _parse_multipart(request, await read_body(request, settings, deadline), settings)
    try:
        _check_names(form)
        parts = [(name, await _content(part)) for name, part in form.multi_items()]
    finally:
        await form.close()
    values = dict(parts)
    if sorted(name for name, _ in parts) != sorted({"receipt", PART_NAME}) or not values[PART_NAME]:
        raise MalformedRequest("expected exactly the parts `receipt` (JSON) and `file` (the image)")
    if (length := len(values["receipt"])) > MOST_RECEIPT_BYTES:
        raise MalformedRequest(f"receipt: {length} bytes are none; send it as /predict?receipt=true gave it")
    return values["receipt"].decode(errors="replace"), values[PART_NAME]


async def _content(part: UploadFile | str) -> bytes:
    return part.encode(errors="replace") if isinstance(part, str) else await part.read()


async def _from_multipart(request: Request, body: bytes, settings: Settings) -> list[Upload]:
    form = await _parse_multipart(request, body, settings)
    try:
        _check_names(form)
        return await _uploads_of(form)
    finally:
        await form.close()


async def _parse_multipart(request: Request, body: bytes, settings: Settings) -> FormData:
    parser = MultiPartParser(
        request.headers, _once(body), max_files=settings.max_images, max_fields=settings.max_images
    )
    parser.spool_max_size = len(body)  # stays in memory, which the body's own limit bounds; the disk may be read-only
    try:
        return await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        reason = "no boundary in the content type" if isinstance(error, KeyError) else str(error)
        if "Too many files" in reason:
            raise TooLarge(f"more than {settings.max_images} images in one request") from None
        raise MalformedRequest(f"the multipart body cannot be read: {reason}") from None


def _check_names(form: FormData) -> None:
    """Raise MalformedRequest for a name that no answer can repeat: some charsets decode to half a character."""
    names = "".join(name if isinstance(part, str) else f"{name}{part.filename}" for name, part in form.multi_items())
    if any("\ud800" <= one <= "\udfff" for one in names):
        raise MalformedRequest("a part's name or file name holds half a character; send names in UTF-8")


async def _uploads_of(form: FormData) -> list[Upload]:
    parts = [(name, part) for name, part in form.multi_items() if isinstance(part, UploadFile)]
    if unknown := sorted({name for name, _ in parts if name != PART_NAME}):
        raise MalformedRequest(f"multipart part {', '.join(unknown)} is not known; name every image part `{PART_NAME}`")
    if not parts:
        raise MalformedRequest(f"the multipart body has no file; send parts named `{PART_NAME}`, each with a file name")
    return [Upload(part.filename, await part.read()) for _, part in parts]


async def _from_json(_: Request, body: bytes, settings: Settings) -> list[Upload]:
    # Base64 has no comma and a data URL has one, so this bounds the images before any object is made of them.
    if body.count(b",") > 2 * settings.max_images:
        raise TooLarge(f"more than {settings.max_images} images in one request")
    return await asyncio.to_thread(_parse_json, body)  # 20 MiB of base64 take a while


def _parse_json(body: bytes) -> list[Upload]:
    try:
        images = ImagesBody.model_validate_json(body).images
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise MalformedRequest(f'{where}: {first["msg"]}; expected {{"images": ["<base64>", …]}}') from None
    return [_from_base64(image, index) for index, image in enumerate(images)]


def _from_base64(text: str, index: int) -> Upload:
    _, _, text = text.rpartition(",") if text.startswith("data:") else ("", "", text)  # RFC 2397, as browsers write it
    try:
        return Upload(None, base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        fault = MalformedRequest(
            f"images.{index} is not base64 (RFC 4648, section 4): no line breaks, + and / and not - and _, = to the end"
        )
        return Upload(None, b"", fault)


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body

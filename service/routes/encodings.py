"""Undoes a body's content encoding, up to a limit: a kilobyte of gzip can hold a megabyte of zeros."""

import zlib

from service.errors import MalformedRequest, TooLarge, UnsupportedFormat

# zlib's window bits: with a gzip header (RFC 1952), and with zlib's, which HTTP calls deflate (RFC 9110, 8.4.1.2).
WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}


def check_encoding(encoding: str) -> None:
    """Raise UnsupportedFormat for a content encoding that cannot be undone."""
    if encoding not in {"identity", *WINDOW_BITS}:
        raise UnsupportedFormat(
            f"content encoding {encoding} is not accepted; send gzip, deflate, or the body as it is"
        )


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """Return the content of an encoded body. Raises TooLarge when it has more than `limit` bytes, MalformedRequest."""
    stream = zlib.decompressobj(WINDOW_BITS[encoding])
    try:
        content = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise MalformedRequest(f"the body is not {encoding}: {error}") from None
    if len(content) > limit:
        raise TooLarge(f"the body has more than {limit:,} bytes once it is inflated")
    if not stream.eof or stream.unused_data:
        raise MalformedRequest(f"the {encoding} body is {'cut short' if not stream.eof else 'followed by other bytes'}")
    return content

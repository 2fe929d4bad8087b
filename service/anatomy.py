"""The parts of image files, counted in their bytes before a decoder sees them. Knows no pixels and no Pillow.

What a file costs to decode is bounded by its pixels only while its parts are few: a scan of a JPEG is a pass over all
its pixels and needs 75 bytes, and Pillow makes Python objects of each segment, chunk and block before it tells a size.
"""

import re

MOST_SCANS = 100  # as libtiff allows JPEG in TIFF (LIBTIFF_JPEG_MAX_ALLOWED_SCAN_NUMBER); encoders write about ten
MOST_PARTS = 2**14  # a file of 20 MiB in JPEG segments of 64 KiB has 320, a GIF's profile of 4 MB has as many as this

START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
SEQUENTIAL = frozenset({0xC0, 0xC1})  # frames that are not progressive (T.81, table B.1)
ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length (ITU-T T.81, table B.1)
AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # within a scan 0xFF is stuffed, or a restart (T.81, B.1.1.5)
EXTENSION, IMAGE, TRAILER = 0x21, 0x2C, 0x3B  # of a GIF (GIF89a, appendix A)


def excess_of(encoded: bytes) -> str | None:
    """Return in words what a file has too many of, or None."""
    if encoded.startswith(b"\xff\xd8\xff"):
        return _excess_of_jpeg(encoded)
    if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return _excess_of_png(encoded)
    return _excess_of_gif(encoded) if encoded.startswith(b"GIF8") else None


def _excess_of_jpeg(encoded: bytes) -> str | None:
    at, parts, scans, components = 2, 0, 0, None
    while at + 10 <= len(encoded) and encoded[at] == 0xFF and (marker := encoded[at + 1]) != END_OF_IMAGE:
        parts, scans = parts + 1, scans + (marker == START_OF_SCAN)
        if scans > MOST_SCANS:
            return f"has more than {MOST_SCANS} scans"
        if parts > MOST_PARTS:
            return f"has more than {MOST_PARTS} segments"
        if marker in SEQUENTIAL:
            components = encoded[at + 9]
        if scans == 1 and marker == START_OF_SCAN and not _may_have_many_scans(encoded, at, components):
            return None
        at = _after(encoded, at, marker)
    return None


def _may_have_many_scans(encoded: bytes, at: int, components: int | None) -> bool:
    """Return whether more scans can matter after the first, at `at`; `components` those of a sequential frame."""
    if encoded[at + 4] == components:  # it has all of them, and no decoder reads on
        return False
    return encoded.count(b"\xff\xda") > MOST_SCANS  # quick, and finds those of previews and of what follows, too


def _after(encoded: bytes, at: int, marker: int) -> int:
    """Return where the next marker of a JPEG begins."""
    if marker == 0xFF:
        return at + 1  # a fill byte
    if marker in ALONE:
        return at + 2
    end = at + 2 + int.from_bytes(encoded[at + 2 : at + 4])
    if marker != START_OF_SCAN:
        return end
    found = AFTER_SCAN.search(encoded, end)
    return len(encoded) if found is None else found.start()


def _excess_of_png(encoded: bytes) -> str | None:
    at, parts = 8, 0
    while at + 8 <= len(encoded) and (kind := encoded[at + 4 : at + 8]) != b"IEND":
        parts += kind != b"IDAT"  # of which there may be many, and each costs little
        if parts > MOST_PARTS:
            return f"has more than {MOST_PARTS} chunks beside its pixels"
        at += 12 + int.from_bytes(encoded[at : at + 4])  # length, kind, data, checksum (W3C PNG, section 5.3)
    return None


def _excess_of_gif(encoded: bytes) -> str | None:
    """Count up to the first image, for no other is read."""
    colours = encoded[10] if len(encoded) > 10 else 0
    at, parts = 13 + (3 * 2 ** ((colours & 7) + 1) if colours & 0x80 else 0), 0
    while at < len(encoded) and encoded[at] not in {IMAGE, TRAILER}:
        if encoded[at] == EXTENSION:
            at += 2
            while at < len(encoded) and encoded[at] and parts <= MOST_PARTS:  # its pieces, until an empty one
                at, parts = at + 1 + encoded[at], parts + 1
        at, parts = at + 1, parts + 1  # Pillow reads past what is no block
        if parts > MOST_PARTS:
            return f"has more than {MOST_PARTS} blocks before its first image"
    return None

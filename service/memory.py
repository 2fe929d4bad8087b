"""Is the memory limit enough? Said at the start, for the kernel ends a process that goes over it without a word."""

import contextlib
import ctypes
import logging

from service.cgroup import ControlGroup, Memory
from service.config import Settings

# Both measured, docs/deploy.md, Sizing: with the demo model a process comes up under 96 MiB and is killed under 80;
# while it is decoded, a pixel of a WebP file takes 16 bytes, of a plain JPEG 4, of the other formats something between.
START_BYTES = 96 * 2**20
DECODED_PIXEL_BYTES = 16
MIB = 2**20

logger = logging.getLogger(__name__)


def check_before_loading(settings: Settings, group: ControlGroup) -> None:
    """Log an error where the processes alone, without a model, come over the limit."""
    if (memory := group.memory()) is not None and (problem := problem_before_loading(settings, memory)):
        logger.error(problem)


def check_after_loading(settings: Settings, group: ControlGroup) -> None:
    """Log a warning where requests, all within their limits, could come over the memory limit."""
    if (memory := group.memory()) is not None and (problem := problem_after_loading(settings, memory)):
        logger.warning(problem)


def release_free_memory() -> None:
    """Have glibc return to the system what loading a model took and freed: of the small one it would keep 6 MB."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has habits of its own
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def problem_before_loading(settings: Settings, memory: Memory) -> str | None:
    """Return what to say of a limit under which no process would come up, or None."""
    needed = settings.workers * START_BYTES
    if memory.limit >= needed:
        return None
    workers = f" for {settings.workers} workers" if settings.workers > 1 else ""
    return (
        f"the memory limit of {_mib(memory.limit)} is too low: {_mib(needed)} are needed{workers} with the smallest of "
        "models. Where the kernel ends the process now, it is for that (exit status 137): raise the limit"
    )


def problem_after_loading(settings: Settings, memory: Memory) -> str | None:
    """Return what to say of a limit that requests could break, beside what is in use after loading, or None."""
    bodies = settings.workers * settings.bytes_share
    pixels = settings.workers * settings.pixels_share * DECODED_PIXEL_BYTES
    needed = memory.used + bodies + pixels
    if memory.limit >= needed:
        return None
    return (
        f"the memory limit of {_mib(memory.limit)} is low: {_mib(memory.used)} are in use, and requests may need "
        f"{_mib(bodies)} for bodies (max_bytes_in_flight) and {_mib(pixels)} for images that are decoded "
        "(max_pixels_in_flight). The kernel ends a process that goes over the limit, without a word (exit status 137): "
        f"raise it to {_mib(needed)}, or lower these two and max_body_bytes and max_image_pixels with them"
    )


def cause_of_kill(kills_before: int | None, kills_after: int | None) -> str:
    """Return what to add to "was killed by SIGKILL", by how often the kernel had killed here for memory by then."""
    if kills_before is None or kills_after is None:
        return " (out of memory, perhaps)"
    if kills_after > kills_before:
        return ", by the kernel, for the memory limit was reached: raise it, or lower what requests may hold"
    return ", and not by the kernel for its memory"


def _mib(count: int) -> str:
    return f"{-(-count // MIB)} MiB"

"""A listening socket and a uvicorn server around the app, and how the process ends."""

import contextlib
import ctypes
import logging
import math
import os
import signal
import socket

import uvicorn

from service.app import create_app
from service.config import Settings
from service.errors import AddressUnavailable

M_MMAP_THRESHOLD = -3  # mallopt(3)
MMAP_THRESHOLD_BYTES = 2**20

logger = logging.getLogger(__name__)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Raises AddressUnavailable when the address cannot be had, and whatever ended the service for good.
    """
    listener = _listen(settings)
    failures: list[BaseException] = []

    def give_up(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(settings, on_failure=give_up)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s),
        )
    )
    _give_memory_back()
    signal.signal(signal.SIGTERM, _ignore)  # uvicorn raises it again once it has drained; by then it is done with
    host, port = listener.getsockname()[:2]
    logger.info("listening on http://%s:%d (API at /docs); loading %s", host, port, settings.models)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn drains first and raises it again after
        server.run(sockets=[listener])
    if app.state.service.is_stuck:
        logging.shutdown()
        os._exit(1)  # a thread that hangs in native code can be ended no other way
    if failures:
        raise failures[0]
    logger.info("drained and stopped")


def _ignore(*_: object) -> None:
    pass


def _give_memory_back() -> None:
    """Let glibc return large buffers to the system when they are freed.

    By default it raises its threshold to what was freed last, and after a few large images keeps up to 94 MB.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library has habits of its own
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(2048)  # the kernel caps it; overload is answered by the queue, not by refused connections
    except OSError as error:
        listener.close()
        where = f"{settings.host}:{settings.port}"
        raise AddressUnavailable(f"cannot listen on {where}: {error.strerror}; choose another with --port") from None
    return listener

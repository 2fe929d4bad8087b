"""What is known of the bytes of a connection: when the last one came, a body that is here, what nobody has read."""

import asyncio
import fcntl
import socket
import sys
import termios
import weakref

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

TCP_INFO_BYTES = 56  # of linux/tcp.h's tcp_info, up to and with tcpi_last_data_recv, milliseconds


def seconds_since_last_byte(transport: asyncio.Transport) -> float:
    """Return how long ago the kernel got the last byte for this connection: while the event loop is busy, it waits."""
    connection: socket.socket | None = transport.get_extra_info("socket")
    try:
        told = b"" if connection is None else connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
    except (OSError, ValueError):  # closed meanwhile, or no TCP
        return 0.0
    return int.from_bytes(told[-4:], sys.byteorder) / 1000 if len(told) == TCP_INFO_BYTES else 0.0


def take_body(reference: "weakref.ref[RequestResponseCycle]") -> bytes | None:
    """Take the body out where all of it is here: a kept connection would hold it until the next request.

    The cycle lives while its request is served. It holds the scope, and the scope this: without the weak reference the
    body of a request that never asks for it would stay until the garbage collector runs.
    """
    cycle = reference()
    if cycle is None or cycle.more_body or cycle.disconnected:
        return None
    body, cycle.body = bytes(cycle.body), bytearray()
    return body


def unread_bytes(transport: asyncio.Transport) -> int:
    """Return how many bytes the other side has not taken, here and in the kernel, which alone shows a slow reader."""
    connection: socket.socket | None = transport.get_extra_info("socket")
    try:
        told = b"" if connection is None else fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:  # closed meanwhile
        told = b""
    return transport.get_write_buffer_size() + int.from_bytes(told, sys.byteorder)

"""Many callers at once out of one thread: prebuilt bytes on plain sockets, each call timed by the caller's own clock.

A thread for each caller would take the cores from the server that is measured on the same machine.
"""

import contextlib
import selectors
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass

PATIENCE_S = 60.0
PIECE = 65536


@dataclass(slots=True)
class Call:
    """One call: what is left to send, when its last byte was handed over, and the status of its answer; 0 for none."""

    connection: socket.socket
    left: memoryview
    sent_at: float = 0.0
    status: int = 0
    waited_s: float = 0.0


def ask(port: int, request: bytes, count: int, *, patience_s: float = PATIENCE_S) -> list[Call]:
    """Send a request from so many callers at once; they hang up once all are answered, or `patience_s` after the start.

    `waited_s` is from a request's last byte to the first byte of its answer.
    """
    end = time.monotonic() + patience_s
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        made = [Call(stack.enter_context(socket.socket()), memoryview(request)) for _ in range(count)]
        for call in made:
            call.connection.setblocking(False)
            call.connection.connect_ex(("127.0.0.1", port))
            selector.register(call.connection, selectors.EVENT_WRITE, call)
        waiting = count
        while waiting and (left_s := end - time.monotonic()) > 0:
            for key, events in selector.select(left_s):
                if events & selectors.EVENT_WRITE:
                    _send(selector, key.data)
                else:
                    waiting -= _receive(selector, key.data)
    return made


def _send(selector: selectors.BaseSelector, call: Call) -> None:
    with contextlib.suppress(BlockingIOError):
        call.left = call.left[call.connection.send(call.left[:PIECE]) :]
    if not call.left:
        call.sent_at = time.monotonic()
        selector.modify(call.connection, selectors.EVENT_READ, call)


def _receive(selector: selectors.BaseSelector, call: Call) -> bool:
    try:
        answer = call.connection.recv(PIECE)
    except BlockingIOError:
        return False
    except OSError:  # reset
        answer = b""
    call.waited_s = time.monotonic() - call.sent_at
    call.status = int(answer[9:12]) if answer.startswith(b"HTTP/") else 0
    selector.unregister(call.connection)
    return True

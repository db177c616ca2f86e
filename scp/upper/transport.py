"""What carries PDUs: a socket, or TLS on it (PS3.15 Annex B), each with the same few operations, in bounded time.

One thread uses a transport at a time.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from typing import Protocol

TICK_S = 0.25  # seconds after which an operation that waits returns, so that its caller looks at deadlines
GRACE_S = 1.0  # seconds in which the peer closes first, as PS3.8 9.2 has it after A-ABORT and A-ASSOCIATE-RJ (Sta13)
LINGER_S = 2.0  # seconds for the peer to read an A-ABORT or A-ASSOCIATE-RJ before the connection is closed
TLS_WRITE = 1 << 14  # bytes of a TLS record, which one write is; there is no gathering write, small buffers are joined
QUICKACK = getattr(socket, "TCP_QUICKACK", None)  # Linux only


class Transport(Protocol):
    """A connection as bytes. Operations raise BlockingIOError where nothing could be done for TICK_S, and OSError."""

    def handshake(self) -> None:
        """Agree with the peer before the first byte; to be called again after BlockingIOError."""

    def receive(self, view: memoryview, wait: bool) -> int:
        """Receive what there is into `view`; its bytes, 0 at the end. Unless `wait`, BlockingIOError comes at once."""

    def send(self, parts: Sequence[memoryview]) -> int:
        """Send the first bytes of `parts`; how many."""

    def close(self, *, linger: bool = False) -> None:
        """End the connection; with `linger` only after the peer had LINGER_S to read what was sent. Never raises."""


class Plain:
    """TCP. The kernel's timeouts make one system call of a receive."""

    def __init__(self, sock: socket.socket) -> None:
        """Raises OSError where the peer is gone already."""
        self._sock = sock
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        timeval = struct.pack("ll", 0, int(TICK_S * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    def handshake(self) -> None:
        """There is none."""

    def receive(self, view: memoryview, wait: bool) -> int:
        """See Transport."""
        if QUICKACK is not None:  # a sender that waits for an ACK before its next segment gets it now
            self._sock.setsockopt(socket.IPPROTO_TCP, QUICKACK, 1)
        return self._sock.recv_into(view, 0, 0 if wait else socket.MSG_DONTWAIT)

    def send(self, parts: Sequence[memoryview]) -> int:
        """See Transport."""
        return self._sock.sendmsg(parts)

    def close(self, *, linger: bool = False) -> None:
        """See Transport."""
        _close(self._sock, linger)


class Tls:
    """TLS, on a socket that never blocks: what OpenSSL has to wait for is waited for here, for TICK_S in all.

    Bytes of a record that is not complete are no progress: who sends them one by one is as silent as who sends none.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_name: str | None = None) -> None:
        """`server_name` is what the acceptor is called, None where we are the acceptor. Raises OSError."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self._sock = context.wrap_socket(
            sock, server_side=server_name is None, server_hostname=server_name, do_handshake_on_connect=False
        )
        self._poll = select.poll()
        self._poll.register(self._sock.fileno())

    def handshake(self) -> None:
        """See Transport."""
        until = time.monotonic() + TICK_S
        try:
            self._sock.do_handshake()
        except ssl.SSLWantReadError:
            self._wait(select.POLLIN, until)
        except ssl.SSLWantWriteError:
            self._wait(select.POLLOUT, until)
        else:
            return
        raise BlockingIOError

    def receive(self, view: memoryview, wait: bool) -> int:
        """See Transport."""
        if QUICKACK is not None:
            self._sock.setsockopt(socket.IPPROTO_TCP, QUICKACK, 1)
        until = time.monotonic() + TICK_S
        while True:
            try:
                return self._sock.recv_into(view)
            except ssl.SSLWantReadError:
                if not wait or not self._wait(select.POLLIN, until):
                    raise BlockingIOError from None
            except ssl.SSLWantWriteError:
                if not self._wait(select.POLLOUT, until):
                    raise BlockingIOError from None

    def send(self, parts: Sequence[memoryview]) -> int:
        """See Transport. After BlockingIOError it has to be called with the same bytes."""
        data, until = _joined(parts), time.monotonic() + TICK_S
        while True:
            try:
                return self._sock.send(data)
            except ssl.SSLWantWriteError:
                if not self._wait(select.POLLOUT, until):
                    raise BlockingIOError from None
            except ssl.SSLWantReadError:
                if not self._wait(select.POLLIN, until):
                    raise BlockingIOError from None

    def close(self, *, linger: bool = False) -> None:
        """See Transport; says close_notify, and does not wait for the peer's."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: no handshake was made
            self._sock.unwrap()
        _close(self._sock, linger)

    def _wait(self, event: int, until: float) -> bool:
        """Whether it came to that in time; the time is of the monotonic clock."""
        left_s = until - time.monotonic()
        if left_s <= 0:
            return False
        self._poll.modify(self._sock.fileno(), event)
        return bool(self._poll.poll(1000 * left_s))


def _joined(parts: Sequence[memoryview]) -> bytes | memoryview:
    """The first buffers as one, up to TLS_WRITE bytes."""
    if len(parts) == 1 or len(parts[0]) >= TLS_WRITE:
        return parts[0][:TLS_WRITE]
    some, size = [], 0
    for part in parts:
        some.append(part[: TLS_WRITE - size])
        size += len(some[-1])
        if size >= TLS_WRITE:
            break
    return b"".join(some)


def _close(sock: socket.socket, linger: bool) -> None:
    with contextlib.suppress(OSError):  # it may be closed from the other side
        if linger:
            _drain(sock)
    sock.close()


def _drain(sock: socket.socket) -> None:
    """Read on until the peer closes: unread bytes would make the kernel reset the connection and our last words."""
    if _closed(sock, GRACE_S):  # a requestor that meets the end together with our answer may miss the answer
        return
    sock.shutdown(socket.SHUT_WR)
    _closed(sock, LINGER_S)


def _closed(sock: socket.socket, within_s: float) -> bool:
    """Whether the peer closes in time; what it still sends is thrown away. Raises OSError."""
    deadline = time.monotonic() + within_s
    while (left := deadline - time.monotonic()) > 0:
        sock.settimeout(left)
        try:
            if not sock.recv(1 << 16):
                return True
        except TimeoutError:
            break
    return False

"""HTTP as the benchmark asks any server: requests made before, heads barely read, bodies counted and let go.

The client shares the processors with the servers, and what it takes is in every figure: it has to be small.
"""

from __future__ import annotations

import re
import socket
from types import TracebackType

RECEIVED = 1 << 20  # bytes that are read at once
_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})")
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
_LAST_CHUNK = b"\r\n0\r\n\r\n"


class Link:
    """One client of a server: a connection, made again where the server has closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None
        self._buffer = memoryview(bytearray(RECEIVED))

    def __enter__(self) -> Link:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def request(self, path: str, accept: str) -> bytes:
        """A GET, encoded."""
        return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nAccept: {accept}\r\n\r\n".encode()

    def ask(self, request: bytes) -> int:
        """Send it, and read the answer to its end; returns the bytes after the head. Its status has to be 200."""
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=300)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(request)
        head, size = self._head(self._socket)
        status = _STATUS.match(head)
        assert status and status[1] == b"200", (request, head, bytes(self._buffer[:size]))
        length = _LENGTH.search(head)
        if length is not None:
            while size < int(length[1]):
                size += self._more(self._socket)
        else:
            size = self._to_end(self._socket, size, chunked=_CHUNKED.search(head) is not None)
        if _CLOSE.search(head):
            self.close()
        return size

    def _head(self, link: socket.socket) -> tuple[bytes, int]:
        """The head of the answer, and how many bytes of the body came with it: the first of the buffer."""
        got = 0
        while (end := bytes(self._buffer[: min(got, 1 << 14)]).find(b"\r\n\r\n")) < 0:
            if not (more := link.recv_into(self._buffer[got:])):
                raise ConnectionError("the server closed instead of answering")
            got += more
        head, rest = bytes(self._buffer[: end + 2]), got - end - 4
        self._buffer[:rest] = bytes(self._buffer[end + 4 : got])
        return head, rest

    def _more(self, link: socket.socket) -> int:
        if not (got := link.recv_into(self._buffer)):
            raise ConnectionError("the server closed in the midst of an answer")
        return got

    def _to_end(self, link: socket.socket, size: int, *, chunked: bool) -> int:
        """Up to the last chunk, or until the server closes."""
        tail = bytes(self._buffer[max(0, size - len(_LAST_CHUNK)) : size])
        while not (chunked and tail.endswith(_LAST_CHUNK)):
            if not (got := link.recv_into(self._buffer)):
                assert not chunked, "the server closed in the midst of an answer"
                self.close()
                return size
            size += got
            tail = (tail + bytes(self._buffer[max(0, got - len(_LAST_CHUNK)) : got]))[-len(_LAST_CHUNK) :]
        return size

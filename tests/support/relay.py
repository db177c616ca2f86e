"""A way to a TCP port of this host that can be cut, with every connection over it, and joined again."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Relay:
    """Listens on a port of its own; `cut` has it refuse whoever connects."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._to = 0
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.port = 0

    def join(self, to: int = 0) -> None:
        """Listen (again), and pass everything on to port `to`, by default the one of before."""
        self._to = to or self._to
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """End every connection, and take no other one."""
        listener, self._listener = self._listener, None
        with self._lock:
            ended = [*self._open, *([listener] if listener else [])]
            self._open.clear()
        for one in ended:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                with self._lock:
                    self._open |= {near, far}
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

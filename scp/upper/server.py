"""The port: accepts connections, one thread each, and lets them end (PS3.8 9.1.2)."""

from __future__ import annotations

import logging
import socket
import threading
import time

from sphere.conf.errors import SettingsError
from sphere.conf.settings import Settings
from sphere.scp.peers import plain_address
from sphere.scp.upper.association import Acceptor, Association
from sphere.scp.upper.connection import TICK_S, Connection
from sphere.scp.upper.dataset import Budget

log = logging.getLogger(__name__)

BACKLOG = 1024  # connections waiting to be accepted; the kernel may keep fewer (net.core.somaxconn)
CONNECTIONS_PER_ASSOCIATION = 4  # connections per association allowed: further ones are closed unread
ARRIVING_MEMORY = 16 << 20  # bytes of arriving data sets beyond the first buffer of each association


class Server:
    """One receiver's listening socket and its associations; other receivers may listen on the same TCP `port`."""

    def __init__(self, settings: Settings, acceptor: Acceptor) -> None:
        """Bind and listen; raises SettingsError when the port cannot be had."""
        self._acceptor = acceptor
        self._max_associations = settings.dimse.max_associations
        self._budget = Budget(ARRIVING_MEMORY)
        self._lock = threading.Lock()
        self._open: set[Association] = set()
        self._stopping = False
        self._socket = _listen(settings.dimse.host, settings.dimse.port)
        self.port = int(self._socket.getsockname()[1])

    def serve(self) -> None:
        """Accept until `stop`."""
        while not self._stopping:
            try:
                sock, address = self._socket.accept()
            except OSError as error:
                if not self._stopping:
                    log.error("accept failed: %s", error.strerror)
                    time.sleep(0.1)  # out of file descriptors: some association will end
                continue
            self._begin(sock, plain_address(str(address[0])))
        self._socket.close()

    def stop(self) -> None:
        """Close the port; running associations go on."""
        self._stopping = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes `serve`
        except OSError as error:
            log.debug("port already closed: %s", error.strerror)

    def drain(self, seconds: float) -> None:
        """Wait up to `seconds` for the running associations, then abort those that are left."""
        if not self._wait(seconds):
            with self._lock:
                for association in self._open:
                    association.stop()
            self._wait(2 * TICK_S + 1)

    def _wait(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._open and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self._open

    def _begin(self, sock: socket.socket, address: str) -> None:
        if len(self._open) >= CONNECTIONS_PER_ASSOCIATION * self._max_associations:
            log.warning("connection closed unread address=%s open=%d", address, len(self._open))
            sock.close()
            return
        try:
            connection = Connection(sock, budget=self._budget, max_pdu=self._acceptor.max_pdu)
        except OSError as error:  # the peer is gone already
            log.warning("connection lost address=%s: %s", address, error.strerror)
            sock.close()
            return
        association = Association(connection, address, self._acceptor)
        with self._lock:
            self._open.add(association)
        try:
            threading.Thread(target=self._run, args=(association,), daemon=True).start()
        except RuntimeError as error:  # no room for another thread
            log.error("connection closed unread address=%s: %s", address, error)
            connection.close()
            with self._lock:
                self._open.discard(association)

    def _run(self, association: Association) -> None:
        try:
            association.run()
        finally:
            with self._lock:
                self._open.discard(association)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG, reuse_port=True)
    except OSError as error:
        reason = f"{error.strerror}; choose another host or port"
        raise SettingsError(f"dimse: cannot listen on {host}:{port}: {reason}") from None

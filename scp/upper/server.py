"""The port: accepts connections, one thread each, and lets them end (PS3.8 9.1.2)."""

from __future__ import annotations

import logging
import selectors
import socket
import ssl
import threading
import time
from typing import cast

from sphere.conf.errors import SettingsError
from sphere.conf.settings import Settings
from sphere.scp.peers import plain_address
from sphere.scp.upper.association import Acceptor, Association
from sphere.scp.upper.connection import Connection
from sphere.scp.upper.dataset import Budget
from sphere.scp.upper.tls import acceptor_context
from sphere.scp.upper.transport import TICK_S, Plain, Tls

log = logging.getLogger(__name__)

BACKLOG = 1024  # connections waiting to be accepted; the kernel may keep fewer (net.core.somaxconn)
CONNECTIONS_PER_ASSOCIATION = 4  # connections per association allowed: further ones are closed unread
ARRIVING_MEMORY = 16 << 20  # bytes of arriving data sets and requests beyond what each connection has of its own


class Server:
    """One receiver's listening sockets and its associations; other receivers may listen on the same TCP ports.

    `port` is that of dimse.port.
    """

    def __init__(self, settings: Settings, acceptor: Acceptor) -> None:
        """Bind and listen; raises SettingsError when a port cannot be had, or the TLS files cannot be used."""
        self._acceptor = acceptor
        self._max_associations = settings.dimse.max_associations
        self._budget = Budget(ARRIVING_MEMORY)
        self._lock = threading.Lock()
        self._open: set[Association] = set()
        self._stopping = False
        dimse, tls = settings.dimse, acceptor_context(settings.dimse)
        instead = tls if dimse.tls_port == dimse.port else None
        self._listening = [(_listen(dimse.host, dimse.port), instead)]
        if tls is not None and instead is None:
            self._listening.append((_listen(dimse.host, dimse.tls_port), tls))
        self.port = int(self._listening[0][0].getsockname()[1])

    def serve(self) -> None:
        """Accept until `stop`."""
        with selectors.DefaultSelector() as selector:
            for listener, tls in self._listening:
                listener.setblocking(False)
                selector.register(listener, selectors.EVENT_READ, tls)
            while not self._stopping:
                for key, _ in selector.select():
                    self._accept(cast("socket.socket", key.fileobj), key.data)
        for listener, _ in self._listening:
            listener.close()

    def _accept(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        try:
            sock, address = listener.accept()
        except BlockingIOError:
            return  # another receiver, or the peer itself, was faster
        except OSError as error:
            if not self._stopping:
                log.error("accept failed: %s", error.strerror)
                time.sleep(0.1)  # out of file descriptors: some association will end
            return
        self._begin(sock, plain_address(str(address[0])), tls)

    def stop(self) -> None:
        """Close the port; running associations go on."""
        self._stopping = True
        for listener, _ in self._listening:
            try:
                listener.shutdown(socket.SHUT_RDWR)  # wakes `serve`
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

    def _begin(self, sock: socket.socket, address: str, tls: ssl.SSLContext | None) -> None:
        if self._is_crowded(address):
            log.warning("connection closed unread address=%s open=%d", address, len(self._open))
            sock.close()
            return
        try:
            transport = Plain(sock) if tls is None else Tls(sock, tls)
            connection = Connection(transport, budget=self._budget, max_pdu=self._acceptor.max_pdu)
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

    def _is_crowded(self, address: str) -> bool:
        """Whether there is no room for a further connection. Half of it is all that one address gets for what is no
        association: who opens connections and says nothing leaves the rest to others."""
        most = CONNECTIONS_PER_ASSOCIATION * self._max_associations
        if not most // 2 <= len(self._open) < most:
            return len(self._open) >= most
        with self._lock:
            return sum(one.address == address and not one.accepted for one in self._open) >= most // 2

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

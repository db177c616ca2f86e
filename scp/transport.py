"""The TCP side of the receivers: one port for several processes, and no memory for those who only claim.

What pynetdicom does not do and an open port needs: SO_REUSEPORT and a long backlog, TCP_NODELAY and an immediate ACK
(a DCMTK sender with Nagle's algorithm on otherwise waits 45 ms per instance), a bound on the length that a PDU may
claim, a deadline for a whole PDU, and large data sets kept in a file while they arrive.
"""

from __future__ import annotations

import logging
import math
import queue
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from socketserver import BaseServer
from typing import IO, Any

from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import DIMSEMessage
from pynetdicom.pdu import A_ABORT_RQ
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import AssociationSocket, RequestHandler, ThreadedAssociationServer

from sphere.conf.settings import Settings
from sphere.ingest.members import FileRange

log = logging.getLogger(__name__)

BACKLOG = 256  # connections waiting to be accepted
CONTROL_PDU = 1 << 20  # bytes; an A-ASSOCIATE-RQ may be longer than any P-DATA-TF that we announce
MAX_COMMAND = 1 << 16  # bytes of a command set; real ones have some hundred
MAX_PENDING = 16  # messages sent ahead of our answers; without an asynchronous window 1 is allowed (PS3.7 D.3.3.3)
CONNECTIONS_PER_ASSOCIATION = 4  # sockets per association allowed; further ones are closed unread
QUICKACK = getattr(socket, "TCP_QUICKACK", None)  # Linux only
PROVIDER, INVALID_PARAMETER = 0x02, 0x06  # source and reason of an A-ABORT (PS3.8 9.3.8)


class ArrivingDataSet(BytesIO):
    """The data set of one message while its fragments come: in memory up to `memory` bytes, then in a file.

    The file has no name, so that nothing of it outlives this process. When the disk fails, `error` says so and the
    rest is read and dropped: the message still ends, and can be answered.
    """

    def __init__(self, *, memory: int, folder: Path) -> None:
        super().__init__()
        self._memory = memory
        self._folder = folder
        self._file: IO[bytes] | None = None
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Append `data`; never raises for a disk that is full."""
        self.size += len(data)
        if self.error is not None:
            return len(data)
        try:
            if self._file is None and self.size > self._memory:
                self._move_to_file()
            return self._file.write(data) if self._file else super().write(data)
        except OSError as error:
            self.error = error
            return len(data)

    def content(self) -> memoryview | FileRange:
        """All that was written, without a copy: a view of the memory, or a file that is there until `discard`."""
        if self._file is None:
            return self.getbuffer()
        self._file.flush()
        return FileRange(Path(f"/dev/fd/{self._file.fileno()}"), 0, self.size)

    def discard(self) -> None:
        """Give the file's room back; memory goes with this object."""
        if self._file is not None:
            self._file.close()

    def _move_to_file(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  closed with this object
        self._file.write(self.getbuffer())
        self.seek(0)
        self.truncate()


class _Requests(queue.Queue[Any]):
    """Messages to be served. pynetdicom drops one that cannot be, and leaves its sender waiting: here it is refused."""

    def __init__(self, refuse: Callable[[str], None]) -> None:
        super().__init__()
        self._refuse = refuse

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Add (context id, message); None for the message says that the connection has ended."""
        if item[1] is not None and not item[1].is_valid_request:
            self._refuse("a message that is no request, or lacks what it must have")
        else:
            super().put(item, block, timeout)


class BoundedDimse(DIMSEServiceProvider):
    """Puts messages together from P-DATA; whoever sends without end is aborted."""

    def __init__(self, assoc: Association, *, memory: int, folder: Path) -> None:
        super().__init__(assoc)
        self._memory = memory
        self._folder = folder
        self.msg_queue = _Requests(self._abort)

    def receive_primitive(self, primitive: P_DATA) -> None:
        """Take one P-DATA primitive (PS3.8 8.3)."""
        if self.message is None:
            self.message = DIMSEMessage()
            self.message.data_set = ArrivingDataSet(memory=self._memory, folder=self._folder)
        super().receive_primitive(primitive)
        if self.message and self.message.encoded_command_set.tell() > MAX_COMMAND:
            self._abort("a command set without end")
        elif self.msg_queue.qsize() > MAX_PENDING:
            self._abort("messages without waiting for answers")

    def _abort(self, reason: str) -> None:
        log.warning("association %s aborted: %s", self.assoc.name, reason)
        self.dul.event_queue.put("Evt19")  # invalid PDU: A-ABORT by the provider (PS3.8 9.2)

    def abandon(self) -> None:
        """The connection has ended: drop a message that was not complete."""
        if self.message is not None and isinstance(self.message.data_set, ArrivingDataSet):
            self.message.data_set.discard()


class BoundedSocket(AssociationSocket):
    """Reads PDUs of a bounded length that come within a bounded time, and acknowledges their segments at once."""

    def __init__(self, assoc: Association, *, client_socket: socket.socket, pdu_limit: int) -> None:
        super().__init__(assoc, client_socket=client_socket)
        self._pdu_limit = pdu_limit

    def recv(self, nr_bytes: int) -> bytearray:
        """`nr_bytes` from the peer, fewer when it closed; raises OSError when they are too many or too slow."""
        if nr_bytes > self._pdu_limit:
            self._refuse(nr_bytes)
        sock, limit = self._socket_and_limit()
        data = bytearray(nr_bytes)
        view, filled, deadline = memoryview(data), 0, time.monotonic() + (limit or math.inf)
        while filled < nr_bytes:
            count = sock.recv_into(view[filled:])
            if not count or time.monotonic() > deadline:
                return data[:filled]
            filled += count
            if QUICKACK is not None:
                sock.setsockopt(socket.IPPROTO_TCP, QUICKACK, 1)
        return data

    def _socket_and_limit(self) -> tuple[socket.socket, float | None]:
        """The socket, its timeout set to the seconds that the peer may take for a PDU in this state."""
        if self.socket is None:
            raise ConnectionError("the connection is closed")
        limit: float | None = self.assoc.network_timeout if self.assoc.is_established else self.assoc.acse_timeout
        if self.socket.gettimeout() != limit:
            self.socket.settimeout(limit)
        return self.socket, limit

    def _refuse(self, claimed: int) -> None:
        log.warning(
            "association %s aborted: a PDU claims %d bytes, limit %d", self.assoc.name, claimed, self._pdu_limit
        )
        abort = A_ABORT_RQ()
        abort.source, abort.reason_diagnostic = PROVIDER, INVALID_PARAMETER
        self.send(abort.encode())
        raise ConnectionAbortedError("PDU too long")


class ReceiverRequest(RequestHandler):
    """Builds the association of one connection."""

    server: ReceiverServer

    def _create_association(self) -> Association:
        assoc = super()._create_association()
        assoc.dul.event_queue.get_nowait()  # the plain socket's Evt5 (connection indication); ours raises its own
        assoc.dul.socket = BoundedSocket(assoc, client_socket=self.request, pdu_limit=self.server.pdu_limit)
        assoc.dimse = BoundedDimse(assoc, memory=self.server.memory, folder=self.server.folder)
        return assoc


class ReceiverServer(ThreadedAssociationServer):
    """Accepts associations on a port that other receiver processes listen on, too."""

    request_queue_size = BACKLOG
    daemon_threads = True

    def __init__(
        self, ae: ApplicationEntity, settings: Settings, contexts: list[PresentationContext], handlers: list[Any]
    ) -> None:
        """Bind and listen; raises OSError when the port cannot be had."""
        self.pdu_limit = max(settings.dimse.max_pdu, CONTROL_PDU)
        self.memory = settings.storage.memory_mib << 20
        self.folder = settings.archive.state_dir / "incoming"
        self._artim_s = settings.dimse.artim_s
        self._max_connections = CONNECTIONS_PER_ASSOCIATION * settings.dimse.max_associations
        address = (settings.dimse.host, settings.dimse.port)
        super().__init__(ae, address, ae.ae_title, contexts, None, handlers, ReceiverRequest)

    @property
    def port(self) -> int:
        """The TCP port that is listened on."""
        return int(self.server_address[1])

    def server_bind(self) -> None:
        """Bind, sharing the port with the other receivers of this archive."""
        assert self.socket is not None
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        """One accepted connection; raises OSError."""
        request, address = super().get_request()
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        request.settimeout(self._artim_s)
        return request, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room to hear what the connection wants."""
        return len(self.active_associations) < self._max_connections

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note that a connection could not be served."""
        log.error("connection failed: %s", getattr(sys.exc_info()[0], "__name__", ""))

    def stop_accepting(self) -> None:
        """Close the port; running associations go on. To be called while another thread is in `serve_forever`."""
        BaseServer.shutdown(self)  # AssociationServer's own also unlists the server from its AE
        self.server_close()

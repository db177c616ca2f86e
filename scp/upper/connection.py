"""PDUs from a socket, received into memory that is used again, and bytes sent, all in bounded time (PS3.8 9.3)."""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Sequence

from sphere.scp.upper import protocol
from sphere.scp.upper.dataset import Budget
from sphere.scp.upper.protocol import Ended, TooSlow, Violation
from sphere.scp.upper.tls import why
from sphere.scp.upper.transport import Transport

CONTROL_PDU = 5 << 16  # bytes; 128 contexts with all 60 transfer syntaxes of PS3.6 take 220 kB, user information 64 kB
SMALL_PDU = 1 << 15  # bytes of a PDU before an association for which no memory of the budget is needed
BUFFER = 1 << 20  # bytes of memory to receive into; beyond the first CONTROL_PDU or P-DATA-TF they are of the budget
BUDGET_S = 0.05  # seconds between looks whether there is memory again
SLACK = 1024  # bytes by which a P-DATA-TF PDU may be longer than announced: some senders count otherwise
SEND_PARTS = 512  # buffers of one send; the kernel takes 1024 (IOV_MAX)


class Connection:
    """The receive buffer is anonymous memory: only pages that were used count. A first part of it is the connection's
    own, the rest is taken from `budget` by a data set that needs it, and kept until nothing comes for a moment.
    Until `begin`, nothing is received beyond the PDU that is asked for, and one over SMALL_PDU waits for `budget`.

    Bodies of PDUs are views of it. They stay valid while `keep` is above 0: it counts the data sets that wait for
    their last fragment or to be stored. Then further buffers are taken from `budget`; where that is used up, `pdu`
    returns only after `keep` fell, which `spill` has to bring about.
    """

    def __init__(self, transport: Transport, *, budget: Budget, max_pdu: int) -> None:
        self._transport = transport
        self._budget = budget
        self._max_pdu = max_pdu + SLACK
        self._own = max(CONTROL_PDU, self._max_pdu) + mmap.PAGESIZE
        self._whole = max(self._own, BUFFER + mmap.PAGESIZE)
        self._size = self._own  # bytes of the buffer that may be used
        self._view = memoryview(mmap.mmap(-1, self._whole))
        self._taken = 0  # bytes of budget for further buffers
        self._asked = 0  # bytes of budget for the PDU before the association
        self._begun = False
        self._start = self._fill = 0  # what is received and not yet handed out
        self.keep = 0
        self.stopping = False  # set by another thread: to be ended at the next tick

    def handshake(self, within_s: float) -> None:
        """Agree on TLS, where there is some; raises Ended, and TooSlow after `within_s` seconds."""
        deadline = _deadline(within_s)
        while True:
            try:
                self._transport.handshake()
            except BlockingIOError:
                if self.stopping or time.monotonic() > deadline:
                    raise TooSlow("the TLS handshake takes too long") from None
            except OSError as error:
                raise Ended(f"no TLS ({why(error)})") from None
            else:
                return

    def pdu(self, *, first_s: float, rest_s: float, wait: bool = True) -> tuple[int, memoryview] | None:
        """Type and body of the next PDU; None where `wait` is False and it is not complete.

        `first_s` are the seconds until its first byte is there, `rest_s` those from then to its last. Raises Ended,
        and Violation when the PDU is of no known type, too long or too slow, or when we are `stopping`.
        """
        if self.stopping:
            raise Violation("the receiver stops", reason=protocol.UNSPECIFIED)
        if not self._receive(protocol.PDU_HEADER.size, first_s, rest_s, wait):
            return None
        kind, length = protocol.PDU_HEADER.unpack_from(self._view, self._start)
        if kind not in protocol.TYPES:
            raise Violation(f"PDU type 0x{kind:02X}", reason=protocol.UNRECOGNIZED_PDU)
        limit = self._max_pdu if kind == protocol.P_DATA_TF else CONTROL_PDU
        if length > limit:
            raise Violation(f"a PDU of {length} bytes, limit {limit}", reason=protocol.INVALID_PARAMETER)
        size = protocol.PDU_HEADER.size + length
        if not self._begun and length > SMALL_PDU:
            self._ask(length, rest_s)
        if not self._receive(size, rest_s, rest_s, wait):
            return None
        begin = self._start + protocol.PDU_HEADER.size
        self._start += size
        return kind, self._view[begin : self._start]

    def at_hand(self) -> bool:
        """Whether the next PDU has come whole."""
        size, head = self._fill - self._start, protocol.PDU_HEADER.size
        return size >= head and size >= head + protocol.PDU_HEADER.unpack_from(self._view, self._start)[1]

    def crowded(self) -> bool:
        """Whether views have to be given up before more can be received."""
        if self.keep == 0 or self._fits():
            return False
        if self._size < self._whole and self._budget.take(self._whole - self._size):
            self._size = self._whole
            if self._fits():
                return False
        if not self._budget.take(self._size):
            return True
        self._taken += self._size
        self._renew()
        return False

    def begin(self) -> None:
        """The association is accepted: PDUs may come as they like."""
        self._begun = True
        self._budget.give(self._asked)
        self._asked = 0

    def _fits(self) -> bool:
        return self._fill + self._max_pdu + protocol.PDU_HEADER.size <= self._size

    def _ask(self, size: int, within_s: float) -> None:
        deadline = _deadline(within_s)
        while not self._budget.take(size):
            if self.stopping or time.monotonic() > deadline:
                raise TooSlow("there is no memory for its request")
            time.sleep(BUDGET_S)
        self._asked += size

    def send(self, data: bytes, within_s: float) -> None:
        """Send all of `data`; raises Ended when the peer is gone or takes longer than `within_s` seconds."""
        self.send_parts((data,), within_s)

    def send_parts(self, parts: Sequence[bytes | memoryview], within_s: float) -> None:
        """`send` of several buffers, at most SEND_PARTS, without joining them."""
        deadline = _deadline(within_s)
        left = [memoryview(part) for part in parts if len(part)]
        size = sum(map(len, left))
        while left:
            try:
                if (sent := self._transport.send(left)) == size:
                    return
                size -= sent
                _advance(left, sent)
            except BlockingIOError:
                if self.stopping or time.monotonic() > deadline:
                    raise Ended("the peer does not read") from None
            except OSError as error:
                raise Ended(f"connection lost ({why(error)})") from None

    def close(self, *, linger: bool = False) -> None:
        """End the connection; with `linger` only after the peer had LINGER_S seconds to read what was sent."""
        self._transport.close(linger=linger)
        self._give_back()
        self._budget.give(self._asked + self._size - self._own)
        self._asked, self._size = 0, self._own

    def _receive(self, size: int, first_s: float, rest_s: float, wait: bool) -> bool:
        """Whether `size` bytes of the next PDU are there; if `wait`, they are, or Ended or Violation is raised."""
        if self._start == self._fill and not self.keep:
            self._start = self._fill = 0
            self._give_back()
        elif self._start + size > self._size:
            self._renew()
        if self._fill - self._start >= size:
            return True
        deadline = _deadline(rest_s if self._fill > self._start else first_s)
        while self._fill - self._start < size:
            began = self._fill > self._start
            if not self._fill_up(deadline, wait, self._size if self._begun else self._start + size):
                return False
            if not began:
                deadline = _deadline(rest_s)
            elif time.monotonic() > deadline and self._fill - self._start < size:
                raise TooSlow("a PDU takes too long")
        return True

    def _fill_up(self, deadline: float, wait: bool, end: int) -> bool:
        """Receive once what there is, up to byte `end` of the buffer; False where nothing is and it may not wait."""
        while True:
            try:
                count = self._transport.receive(self._view[self._fill : end], wait)
            except BlockingIOError:
                if not wait:
                    return False
                self._shrink()
                if self.stopping:
                    raise Violation("the receiver stops", reason=protocol.UNSPECIFIED) from None
                if time.monotonic() > deadline:
                    raise TooSlow("the peer is silent") from None
                continue
            except OSError as error:
                raise Ended(f"connection lost ({why(error)})") from None
            if not count:
                raise Ended("closed by the peer")
            self._fill += count
            return True

    def _renew(self) -> None:
        """Bring what is not yet handed out to the front: of a new buffer if views of this one are kept."""
        left = self._fill - self._start
        rest = self._view[self._start : self._fill]
        if self.keep:
            self._view = memoryview(mmap.mmap(-1, self._whole))
        else:
            self._give_back()
        self._view[:left] = rest
        self._start, self._fill = 0, left

    def _shrink(self) -> None:
        """Nothing comes: let others have the memory, where nothing is in it."""
        if self._size > self._own and not self.keep and not self._fill:
            memory = self._view.obj
            assert isinstance(memory, mmap.mmap)
            memory.madvise(mmap.MADV_DONTNEED)
            self._budget.give(self._size - self._own)
            self._size = self._own

    def _give_back(self) -> None:
        if self._taken:
            self._budget.give(self._taken)
            self._taken = 0


def _advance(views: list[memoryview], sent: int) -> None:
    """Take the first `sent` bytes off."""
    done = 0
    while done < len(views) and sent >= len(views[done]):
        sent -= len(views[done])
        done += 1
    del views[:done]
    if sent:
        views[0] = views[0][sent:]


def _deadline(seconds: float) -> float:
    """The monotonic time in `seconds`; 0: never."""
    return time.monotonic() + seconds if seconds else math.inf

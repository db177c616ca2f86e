"""The N-EVENT-REPORT of a transaction: what it says, and its way to the requester (PS3.4 J.3.3)."""

from __future__ import annotations

import fcntl
import logging
import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from pydicom.uid import UID

from sphere.conf.errors import PeerError, SphereError, StorageError
from sphere.conf.logs import hashed
from sphere.conf.peers import Peer
from sphere.conf.private import make_private
from sphere.conf.settings import Settings
from sphere.scp.commitment.information import write_information
from sphere.scp.commitment.queues import BACK_OFF_S, Outcome, Queues
from sphere.scp.commitment.transactions import Reference, Transaction, Transactions, Waiting
from sphere.scp.commitment.verify import COMMITTED, Verifier
from sphere.scp.contexts import ENCODABLE, STORAGE_COMMITMENT
from sphere.scp.peers import CallingPolicy
from sphere.scp.upper.association import Association
from sphere.scp.upper.command import N_EVENT_REPORT_RQ, Command
from sphere.scp.upper.messages import Message
from sphere.scp.upper.outgoing import Outgoing
from sphere.scp.upper.protocol import Ended, Released, Violation
from sphere.scp.upper.requestor import Proposed, connect

log = logging.getLogger(__name__)

WELL_KNOWN = "1.2.840.10008.1.20.1.1"  # Storage Commitment Push Model SOP Instance (PS3.4 J.3.5)
SUCCESS = 0x0000
ALL_COMMITTED, SOME_FAILED = 1, 2  # event types
DUPLICATE_TRANSACTION = 0x0131  # Failure Reason
HERE_S = 20.0  # seconds after which a report is no longer for the association of its request
RELEASE_S = 0.5  # seconds that a requester has to release that association, if it wants the report on another
GRACE_S = 30.0  # seconds after which a request is reported by whoever sees it: its receiver died
AT_ONCE = 8  # requesters that are told at the same time
LOOK_S = 1.0  # seconds between looks at what is due


class Reporter:
    """Verifies and reports; one per receiver process, of which one at a time works off what is due."""

    def __init__(self, settings: Settings, folder: Path, transactions: Transactions, verifier: Verifier) -> None:
        self._settings = settings
        self._calling = CallingPolicy(settings.peers)
        self._lock = folder / "reporter.lock"
        self._transactions = transactions
        self._verifier = verifier
        self._wake = threading.Event()
        self._queues = Queues(self._report, self._give_up, most=AT_ONCE)
        self._stopped = False

    def report_here(self, transaction: Transaction, association: Association, request: Message) -> None:
        """Report on the association of the request, if the requester keeps it open and wants nothing else meanwhile."""
        try:
            verdicts = self._verdicts_meanwhile(transaction, association, request)
            if verdicts is not None:
                told = event_report(
                    transaction, verdicts, self._settings.archive.ae_title, request.context.transfer_syntax
                )
                if _is_done(association.ask(request.context, *told), transaction):
                    self._done(transaction)
                    return
        except (Released, Ended, Violation):
            log.debug("association over before its report transaction=%s", hashed(transaction.uid))
        except SphereError as error:
            log.warning("report put off transaction=%s: %s", hashed(transaction.uid), error)
        try:
            self._transactions.again(transaction, after_s=0, tries=transaction.tries)
        except StorageError as error:  # it is due after GRACE_S as it is
            log.error("report put off transaction=%s: %s", hashed(transaction.uid), error)
        self._wake.set()

    def run(self) -> None:
        """Report what is due until `stop`; waits while another process does. Nothing else ends it."""
        while not self._stopped:
            try:
                make_private(self._lock.parent)
                with self._lock.open("a") as lock:
                    self._run(lock)
            except Exception as error:  # noqa: BLE001  a disk that is full, or a defect: requests were accepted
                log.error("reports put off: %s", error if isinstance(error, OSError) else type(error).__name__)
                self._wake.wait(LOOK_S)

    def _run(self, lock: IO[str]) -> None:
        while not self._stopped:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(LOOK_S)
                continue
            self._wake.clear()
            self._queues.look(self._transactions.waiting())
            self._wake.wait(LOOK_S)

    def stop(self) -> None:
        """End `run` soon; what is left is reported by the next receiver."""
        self._stopped = True
        self._wake.set()

    def _verdicts_meanwhile(
        self, transaction: Transaction, association: Association, request: Message
    ) -> Mapping[Reference, int] | None:
        """The verdicts; None when the requester went away, wants something else, or they take too long."""
        started = time.monotonic()
        verdicts = {}
        for reference, verdict in self._verifier.check(transaction.references):
            verdicts[reference] = verdict
            if time.monotonic() > started + HERE_S or not association.waits(request):
                return None
        while association.waits(request):
            if time.monotonic() > started + RELEASE_S:
                return verdicts
            time.sleep(0.02)
        return None

    def _report(self, waiting: Waiting) -> Outcome:
        """Over an association of our own."""
        transaction = None if self._stopped else self._transactions.read(waiting)
        if transaction is None:
            return Outcome()
        reachable = True
        try:
            verdicts = dict(self._verifier.check(transaction.references))
            if self._sent(transaction, verdicts):
                return Outcome(after_s=self._done(transaction))
            reason = "it was not taken"
        except PeerError as error:
            reason, reachable = str(error), False
        except SphereError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001  a defect of ours must not end the reports of others
            reason = f"internal error ({type(error).__name__})"
        return Outcome(reachable, self._put_off(transaction, reason))

    def _is_over(self, received: float) -> bool:
        return time.time() - received > 3600 * self._settings.dimse.commitment_h

    def _give_up(self, waiting: Waiting) -> None:
        """Drop a report whose time is over, as its requester was asked just now and did not answer."""
        if self._is_over(waiting.received) and (transaction := self._transactions.read(waiting)) is not None:
            self._put_off(transaction, "its requester does not answer")

    def _done(self, transaction: Transaction) -> float:
        """It was reported; seconds for which it is not to be reported again: without end where its file stays."""
        try:
            self._transactions.done(transaction)
        except StorageError as error:
            log.error("reported, and reported again by the next receiver: %s", error)
            return math.inf
        return 0.0

    def _put_off(self, transaction: Transaction, reason: str) -> float:
        """Have it reported later; in how many seconds."""
        if self._is_over(transaction.received):
            log.error("report given up transaction=%s: %s", hashed(transaction.uid), reason)
            return self._done(transaction)
        after_s = BACK_OFF_S[min(transaction.tries, len(BACK_OFF_S) - 1)]
        log.warning("report put off transaction=%s after_s=%.0f: %s", hashed(transaction.uid), after_s, reason)
        try:
            self._transactions.again(transaction, after_s=after_s, tries=transaction.tries + 1)
        except StorageError as error:  # this process remembers it, and the next one tries at once
            log.error("%s", error)
        return after_s

    def _sent(self, transaction: Transaction, verdicts: Mapping[Reference, int]) -> bool:
        proposed = Proposed(STORAGE_COMMITMENT, tuple(map(str, ENCODABLE[:2])), as_scp=True)
        with connect(self._peer(transaction), self._settings, [proposed]) as association:
            context = association.user_contexts[0]
            told = event_report(transaction, verdicts, self._settings.archive.ae_title, context.transfer_syntax)
            return _is_done(association.ask(context, *told), transaction)

    def _peer(self, transaction: Transaction) -> Peer:
        """The requester among the peers; raises PeerError."""
        named = [peer for peer in self._settings.peers if peer.ae_title.strip() == transaction.requester]
        if not named:
            raise PeerError(
                f"no peer of the settings has AE title {transaction.requester!r}: where it listens is unknown"
            )
        return self._calling.peer(transaction.requester, transaction.address) or named[0]


def event_report(
    transaction: Transaction, verdicts: Mapping[Reference, int], ae_title: str, syntax: UID
) -> tuple[dict[str, Any], Outgoing]:
    """Command set and data set of the report (PS3.4 Table J.3-2)."""
    if transaction.duplicate:
        verdicts = dict.fromkeys(transaction.references, DUPLICATE_TRANSACTION)
    kept = [one for one, verdict in verdicts.items() if verdict == COMMITTED]
    failed = [(one, verdict) for one, verdict in verdicts.items() if verdict != COMMITTED]
    command = {
        "AffectedSOPClassUID": STORAGE_COMMITMENT,
        "CommandField": N_EVENT_REPORT_RQ,
        "AffectedSOPInstanceUID": WELL_KNOWN,
        "EventTypeID": SOME_FAILED if failed else ALL_COMMITTED,
    }
    log.info("commitment transaction=%s kept=%d failed=%d", hashed(transaction.uid), len(kept), len(failed))
    return command, Outgoing.of(write_information(transaction.uid, ae_title, kept, failed, syntax))


def _is_done(response: Command, transaction: Transaction) -> bool:
    if response["Status"] != SUCCESS:
        log.warning("report refused transaction=%s status=0x%04X", hashed(transaction.uid), response["Status"])
    return bool(response["Status"] == SUCCESS)

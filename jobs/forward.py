"""Forwarding: what came is pushed to peers, at least once, study by study, again and again until it is there."""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timezone

from sphere.catalog.queries import Queries, open_queries
from sphere.catalog.service import StoredInstance
from sphere.conf.errors import LockHeld, SphereError
from sphere.conf.peers import Peer
from sphere.conf.settings import Settings
from sphere.ingest.spool import open_readable
from sphere.jobs.forward_queue import Entry, Queue
from sphere.scp.retrieve.deliver import Delivery
from sphere.scp.retrieve.outbound import SUCCESS, WARNINGS, groups, preferred_by
from sphere.scp.retrieve.reading import reading
from sphere.scp.retrieve.transcoder import Transcoder
from sphere.scp.upper.requestor import connect

log = logging.getLogger(__name__)

PIECE = 500  # instances looked up, sent and recorded at a time


def run_forwarder(settings: Settings, stop: threading.Event) -> None:
    """Take up what comes, and send what is due, until `stop`."""
    queue = Queue(settings)
    with (
        open_queries(settings) as queries,
        closing(Transcoder()) as transcoder,
        closing(Forwarder(settings, queue, queries, transcoder)) as forwarder,
    ):
        opened = False
        while not stop.is_set():
            try:
                if not opened:
                    queue.open()
                    opened = True
                queue.take_up()
                forwarder.send_due(stop)
            except LockHeld as error:
                log.info("forwarding waits: %s", error)
            except SphereError as error:  # the catalog or the storage is away: later
                log.error("forwarding: %s", error)
            stop.wait(settings.forwarding.every_s)


class Forwarder:
    """Sends the entries of a queue: each destination has a thread, so that one that is slow or gone holds up nobody."""

    def __init__(self, settings: Settings, queue: Queue, queries: Queries, transcoder: Transcoder) -> None:
        self._settings = settings
        self._queue = queue
        self._queries = queries
        read = reading(open_readable(settings))
        self._delivery: Delivery[StoredInstance] = Delivery(
            settings=settings, read=read, converter=transcoder, connect=connect, origin={}
        )
        self._peers = {peer.name: peer for peer in settings.peers}
        self._forwards = {forward.name: forward for forward in settings.forwards}
        self._senders = ThreadPoolExecutor(max(1, len(self._peers)), thread_name_prefix="forward")
        self._serving: dict[str, Future[None]] = {}  # by name of the destination

    def close(self) -> None:
        """Wait for what is being sent, which ends soon after `stop`."""
        self._senders.shutdown()

    def send_due(self, stop: threading.Event) -> None:
        """Begin with what is due at each destination that is not being served; raises what ended one the last time."""
        for destination in [name for name, serving in self._serving.items() if serving.done()]:
            self._serving.pop(destination).result()
        waiting = {self._forwards[one.forward].to for one in self._queue.waiting if one.forward in self._forwards}
        for destination in sorted(waiting):
            if destination not in self._serving:
                self._serving[destination] = self._senders.submit(self._serve, destination, stop)

    def _serve(self, destination: str, stop: threading.Event) -> None:
        """Try every entry that is due, the oldest first; those behind one of their study that waits, wait with it."""
        held: set[tuple[str, str]] = set()
        mine = {forward.name for forward in self._forwards.values() if forward.to == destination}
        for entry in [one for one in self._queue.waiting if one.forward in mine]:
            if stop.is_set():
                return
            due = entry.next_at is None or entry.next_at <= datetime.now(timezone.utc)
            if due and entry.line not in held:
                self._send(entry, stop)
                self._queue.record([entry])
            if entry.state == "waiting":
                held.add(entry.line)

    def _send(self, entry: Entry, stop: threading.Event) -> None:
        """One attempt; changes `entry`. What is left of it is due again later."""
        forward = self._forwards[entry.forward]
        peer = self._peers[forward.to]
        left, error = deque(entry.instances), ""
        unsent: list[str] = []
        while left and not stop.is_set():
            piece = [left.popleft() for _ in range(min(PIECE, len(left)))]
            missing, error = self._send_piece(peer, piece, error)
            unsent += missing
            if len(missing) == len(piece):  # nothing goes through: no use in asking for the rest now
                break
        unsent += left
        if unsent:
            settings = self._settings.forwarding
            entry.failed(unsent, error, retry_s=settings.retry_s, retry_max_s=settings.retry_max_s)
            log.warning("forward %s to %s: %d left: %s", entry.forward, peer.name, len(unsent), error)
        else:
            entry.done()
            log.info("forward %s to %s: %d sent", entry.forward, peer.name, entry.sent)

    def _send_piece(self, peer: Peer, uids: list[str], error: str) -> tuple[list[str], str]:
        """The SOP Instance UIDs that did not arrive, in their order, and the last reason why."""
        stored = {one.SOPInstanceUID: one for one in self._queries.lookup_instances(sop=uids)}
        arrived: set[str] = set()
        found = [stored[uid] for uid in uids if uid in stored]
        for proposed, group in groups(found, preferred=preferred_by(peer)):
            for outcome in self._delivery.to_peer(peer, proposed, group):
                if outcome.status is not None and (outcome.status == SUCCESS or outcome.status in WARNINGS):
                    arrived.add(outcome.instance.SOPInstanceUID)
                else:
                    error = outcome.reason
        gone = [uid for uid in uids if uid not in stored]
        if gone:  # removed since: there is nothing left to send
            log.warning("forward to %s: %d instances are no longer here", peer.name, len(gone))
        return [uid for uid in uids if uid in stored and uid not in arrived], error

"""Storage Commitment of a receiver, put together: handlers of requests, and the thread that reports."""

from __future__ import annotations

import threading
from types import TracebackType

from sphere.conf.settings import Settings
from sphere.ingest.storage.base import Readable
from sphere.scp.commitment.handlers import CommitmentHandlers
from sphere.scp.commitment.report import Reporter
from sphere.scp.commitment.transactions import Transactions
from sphere.scp.commitment.verify import Catalog, Verifier

FOLDER = "commitment"  # below archive.state_dir


class Commitment:
    """One per receiver process; reports while it is entered."""

    def __init__(self, settings: Settings, catalog: Catalog, storage: Readable) -> None:
        folder = settings.archive.state_dir / FOLDER
        transactions = Transactions(folder)
        self._reporter = Reporter(settings, folder, transactions, Verifier(catalog, storage))
        self.handlers = CommitmentHandlers(transactions, self._reporter)
        self._thread = threading.Thread(target=self._reporter.run, daemon=True, name="commitment")

    def __enter__(self) -> Commitment:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._reporter.stop()
        self._thread.join(2.0)  # it may be with a peer that does not answer

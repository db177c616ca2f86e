"""N-ACTION of Storage Commitment: parse, keep, answer; the report follows (PS3.4 J.3.2)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from sphere.conf.errors import QueryError, SphereError
from sphere.scp.commitment.information import read_information
from sphere.scp.commitment.report import GRACE_S, SUCCESS, WELL_KNOWN, Reporter
from sphere.scp.commitment.transactions import Transaction, Transactions
from sphere.scp.contexts import STORAGE_COMMITMENT
from sphere.scp.decode import MAX_IDENTIFIER
from sphere.scp.upper.association import Association, Response, Service
from sphere.scp.upper.command import N_ACTION_RQ
from sphere.scp.upper.messages import Message

MAX_REFERENCES = 50_000  # of one request; 4 MiB have room for some 40,000
REQUEST = 1  # action type: Request Storage Commitment
CLASS_NOT_SUPPORTED = 0x0122  # PS3.7 C.5.6
NO_SUCH_INSTANCE = 0x0112  # PS3.7 C.5.13
NO_SUCH_ACTION = 0x0123  # PS3.7 C.5.10
INVALID_ARGUMENT = 0x0115  # PS3.7 C.5.11
MAX_COMMENT = 64  # characters of an Error Comment, LO (PS3.7 Table E.2-1)


class CommitmentHandlers:
    """One per receiver process."""

    def __init__(self, transactions: Transactions, reporter: Reporter) -> None:
        self._transactions = transactions
        self._reporter = reporter

    def services(self) -> Mapping[int, Service]:
        """By the command field of the request."""
        return {N_ACTION_RQ: self.on_action}

    def on_action(self, message: Message, association: Association) -> Iterator[Response]:
        """N-ACTION (PS3.7 10.1.4). Success means that the request outlives this process."""
        refused = _refused(message)
        if refused is not None:
            yield refused
            return
        try:
            transaction = self._transactions.accept(_transaction(message, association))
        except SphereError as error:
            status = INVALID_ARGUMENT if isinstance(error, QueryError) else error.dimse
            yield Response(status, {"ErrorComment": str(error)[:MAX_COMMENT]})
            return
        association.tally["commitments"] += 1
        yield Response(SUCCESS, {"ActionTypeID": REQUEST})
        self._reporter.report_here(transaction, association, message)


def _refused(message: Message) -> Response | None:
    command = message.command
    if message.context.abstract_syntax != STORAGE_COMMITMENT:
        return Response(CLASS_NOT_SUPPORTED)
    if command.get("RequestedSOPInstanceUID") != WELL_KNOWN:
        return Response(NO_SUCH_INSTANCE)
    if command.get("ActionTypeID") != REQUEST:
        return Response(NO_SUCH_ACTION)
    if message.dataset is None or message.dataset.size > MAX_IDENTIFIER:
        return Response(INVALID_ARGUMENT, {"ErrorComment": "references are needed, of at most 4 MiB"})
    return None


def _transaction(message: Message, association: Association) -> Transaction:
    """What is asked for; raises QueryError where the data set does not say."""
    assert message.dataset is not None
    uid, references = read_information(message.dataset.tobytes(), message.context.transfer_syntax)
    if len(references) > MAX_REFERENCES:
        raise QueryError(f"more than {MAX_REFERENCES} references")
    now = time.time()
    return Transaction(
        uid=uid, requester=association.calling, address=association.address, references=references, received=now,
        due=now + GRACE_S,
    )  # fmt: skip

"""What happens with one C-FIND, whatever upper layer brought it (PS3.4 Annex C)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pydicom.dataset import Dataset
from pydicom.uid import UID

from sphere.catalog.cancel import Cancelled, never
from sphere.catalog.identifier import elements, plain_elements
from sphere.catalog.query import NO_FEATURES, Features, Model, Query, parse_elements
from sphere.conf.errors import QueryError, SphereError
from sphere.conf.settings import Snapshot
from sphere.scp.decode import SMALL, decode_identifier

if TYPE_CHECKING:
    from sphere.catalog.asof import AsOf
    from sphere.catalog.service import Match

log = logging.getLogger(__name__)

PENDING, PENDING_WARNING = 0xFF00, 0xFF01  # PS3.4 Table C.4-1
CANCELLED = 0xFE00
UNABLE = 0xC000
MAX_COMMENT = 64  # characters of an Error Comment, LO (PS3.7 Table E.2-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FindRequest:
    """A complete C-FIND-RQ, with what was negotiated for its SOP class."""

    model: Model
    identifier: bytes  # encoded in `transfer_syntax`
    transfer_syntax: UID
    features: Features = NO_FEATURES
    called_ae: str = ""


@dataclass(frozen=True, slots=True)
class FindAnswer:
    """One C-FIND-RSP; the final Success is not among them. Where `more` is set, the next one is at hand."""

    status: int
    match: Match | None = None
    comment: str = ""
    offending: tuple[int, ...] = ()
    more: bool = False

    @property
    def identifier(self) -> Dataset | None:
        """The identifier of the response."""
        return self.match.identifier() if self.match is not None else None


class Finder(Protocol):
    """What the catalog's query service does for us."""

    def find(
        self, query: Query, *, as_of: AsOf | None = None, ae_title: str = "", cancelled: Cancelled = never
    ) -> Iterator[Match]:
        """The matches, of an earlier catalog with `as_of`, until `cancelled`; raises QueryError, CatalogError."""


class FindService:
    """Answers queries from the catalog; those to an AE title of `snapshots` from an earlier state of it."""

    def __init__(self, finder: Finder, snapshots: Sequence[Snapshot] = ()) -> None:
        self._finder = finder
        self._as_of = {snapshot.ae_title.strip(): snapshot.as_of for snapshot in snapshots}

    def answers(self, request: FindRequest, *, cancelled: Cancelled) -> Iterator[FindAnswer]:
        """Every response but the final Success; never raises. Ends early, and says so, when `cancelled`."""
        try:
            query = _query(request)
            for match in self._matches(query, request.called_ae, cancelled):
                if cancelled():
                    break
                yield FindAnswer(PENDING, match, more=match.more)
            if cancelled():
                yield FindAnswer(CANCELLED)
        except QueryError as error:
            yield _failure(error.dimse, str(error), error.offending)
        except SphereError as error:
            yield _failure(error.dimse, str(error))
        except Exception as error:  # noqa: BLE001  a defect of ours must be answered, and not end the association
            yield internal_error(error)

    def _matches(self, query: Query, called: str, cancelled: Cancelled) -> Iterator[Match]:
        as_of = self._as_of.get(called)
        if as_of is None:
            return self._finder.find(query, cancelled=cancelled)
        return self._finder.find(query, as_of=as_of, ae_title=called, cancelled=cancelled)


def _query(request: FindRequest) -> Query:
    """The query that the identifier's bytes are; raises QueryError where they are none."""
    syntax = request.transfer_syntax
    try:
        found = None
        if syntax.is_little_endian and not syntax.is_deflated and len(request.identifier) <= SMALL:
            found = plain_elements(request.identifier, explicit=not syntax.is_implicit_VR)
        if found is None:
            found = elements(decode_identifier(request.identifier, syntax))
        return parse_elements(found, model=request.model, features=request.features)
    except QueryError:
        raise
    except Exception as error:  # noqa: BLE001  pydicom converts values late, and raises whatever they make of it
        raise QueryError(f"identifier cannot be decoded ({type(error).__name__})") from None


def internal_error(error: Exception) -> FindAnswer:
    """The last answer of a query that met a defect of ours; what the error says may name a patient."""
    return _failure(UNABLE, f"internal error ({type(error).__name__})")


def _failure(status: int, reason: str, offending: tuple[int, ...] = ()) -> FindAnswer:
    log.error("query failed status=0x%04X offending=%s", status, ",".join(f"{tag:08X}" for tag in offending))
    return FindAnswer(status, None, reason[:MAX_COMMENT], offending)

"""Every error that SPHERE raises on purpose, each with the status it becomes on a wire.

``dimse`` is the DIMSE status (PS3.7 Annex C, PS3.4 B.2.3 and C.4.1.1.4), ``http`` the HTTP status, ``exit_status``
what the command line ends with. A message says what was wrong, where, and what to do about it.
"""

from __future__ import annotations

from enum import Enum


class SphereError(Exception):
    """Something that SPHERE can name; the message is meant for the person who reads it."""

    dimse: int = 0x0110  # Processing failure (PS3.7 C.5.9)
    http: int = 500
    exit_status: int = 1


class SettingsError(SphereError):
    """A settings file or variable that cannot be used; names the key, the file and the nearest known key."""

    exit_status = 2


class StorageError(SphereError):
    """Bytes could not be written or read back."""

    dimse, http = 0xA700, 507  # Refused: out of resources (PS3.4 B.2.3)


class StorageFull(StorageError):
    """The storage has no room left."""


class StorageAway(StorageError):
    """The storage does not answer, as was seen just now: asking again at once is no use."""


class StorageMissing(StorageError):
    """A file that should be on the storage is not there."""

    dimse, http = 0x0110, 404


class BundleDamaged(StorageError):
    """A bundle does not hold what its journal or its own tar headers promise."""

    dimse, http = 0x0110, 500


class CatalogError(SphereError):
    """The Delta catalog is missing, damaged or of another schema version."""


class LockHeld(SphereError):
    """Another process is writing the catalog; the message says which."""

    dimse, http = 0x0110, 503


class QueryError(SphereError):
    """An identifier or a query that breaks the rules of PS3.4 C.4.1; ``offending`` lists the tags at fault."""

    dimse, http = 0xA900, 400  # Identifier does not match SOP Class (PS3.4 Table C.4-1)
    exit_status = 2  # wrong by itself, whatever the archive has

    def __init__(self, message: str, *, offending: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.offending = offending


class StatementError(QueryError):
    """A statement of SQL that does not only ask, or that Spark cannot answer; an answer that a format cannot hold."""

    exit_status = 1


class Refused(SphereError):
    """An instance that the settings do not let in; ``dimse`` is the failure status that they name."""

    dimse, http = 0x0124, 403  # Refused: not authorized (PS3.7 C.5.24)

    def __init__(self, message: str, *, status: int = 0x0124) -> None:
        super().__init__(message)
        self.dimse = status


class NotThere(SphereError):
    """Something was named that the archive does not have."""

    dimse, http = 0x0112, 404  # No such SOP Instance (PS3.7 C.5.8)


class BytesGone(SphereError):
    """What is to come back is gone for good: its bytes were taken out of the bundles."""

    dimse, http = 0x0112, 410


class Overtaken(SphereError):
    """Another version is there than the one that a change was meant for."""

    http = 409


class TooLarge(SphereError):
    """More bytes came than the settings let in."""

    dimse, http = 0xA700, 413


class BadRequest(SphereError):
    """A request that breaks the rules of an interface of this archive; the message names the parameter."""

    http, exit_status = 400, 2


class PeerError(SphereError):
    """A peer could not be reached, refused the association or answered with a failure."""

    http = 502


class JobFailed(SphereError):
    """A batch job stopped; what it had not finished will be done by the next run."""


class ExternalMissing(SphereError):
    """A program that SPHERE does not ship (Java) is missing; the message names the package."""

    exit_status = 2


class RejectReason(str, Enum):
    """Why bytes could not become a row of ``instances``: the ``reason`` of the quarantine table."""

    EMPTY = "EMPTY"  # no bytes at all
    NOT_DICOM = "NOT_DICOM"  # no data element could be recognised
    TRUNCATED = "TRUNCATED"  # the header stops before the identifying UIDs
    MALFORMED = "MALFORMED"  # the header cannot be followed up to the identifying UIDs
    MISSING_UID = "MISSING_UID"  # SOPInstanceUID, StudyInstanceUID or SeriesInstanceUID absent or empty
    BAD_UID = "BAD_UID"  # an identifying UID is not a UID (PS3.5 9.1)
    MEDIA_DIRECTORY = "MEDIA_DIRECTORY"  # a DICOMDIR: media bookkeeping, not an instance of a study (PS3.3 F)
    TRANSFER_SYNTAX = "TRANSFER_SYNTAX"  # a transfer syntax whose header encoding is unknown
    INFLATE_LIMIT = "INFLATE_LIMIT"  # a deflated header larger than the limit
    TOO_LARGE = "TOO_LARGE"  # a header larger than the limit
    INTERNAL = "INTERNAL"  # the reader itself failed: a defect of SPHERE, kept with its detail

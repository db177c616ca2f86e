"""The journal record: what is known of one member of a bundle the moment it is durable."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

_NO_COLLECTIONS = b',"collections":[]}'
ERASED_LINE = b'{"erased":true'
"""How the journal line of a member begins whose bytes are gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberRecord:
    """One stored member.

    ``bundle`` is the tar's path below the storage root. The member is a complete DICOM Part 10 file in bytes
    ``[offset, offset + length)`` of the tar; its data set, as it arrived, begins ``dataset_offset`` bytes into it.
    ``sha256`` (hexadecimal) is that of those data set bytes, so that the same instance sent twice has one digest
    whatever File Meta Information was put before it. UIDs are "" where the bytes did not give them.
    """

    bundle: str
    offset: int
    length: int
    dataset_offset: int
    SOPInstanceUID: str
    SOPClassUID: str
    StudyInstanceUID: str
    SeriesInstanceUID: str
    TransferSyntaxUID: str
    sha256: str
    received_at: datetime  # UTC, microseconds
    source_aet: str  # calling AE title; "" for an import
    origin: str  # "dimse:<AE title>@<address>", "web:<name>@<address>" or "import:<path>"
    collections: tuple[str, ...] = ()  # that rules tagged it with; left out of the line where there are none

    def to_json(self) -> bytes:
        """One JSON line, without the line feed; received_at as RFC 3339 in UTC."""
        line = orjson.dumps(self, option=orjson.OPT_UTC_Z)
        return line if self.collections else line.removesuffix(_NO_COLLECTIONS) + b"}"

    @classmethod
    def from_json(cls, line: bytes) -> MemberRecord:
        """The record of one JSON line; raises ValueError or TypeError when it is not one."""
        fields: dict[str, Any] = orjson.loads(line)
        return cls.from_fields(fields)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> MemberRecord:
        """The record of fields as JSON has them; raises KeyError, ValueError or TypeError when they are not one."""
        fields["received_at"] = datetime.fromisoformat(fields["received_at"].replace("Z", "+00:00"))
        fields["collections"] = tuple(fields.get("collections", ()))
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Erased:
    """A member of which nothing is left but its place: its bytes went at compaction, and what was said of it.

    ``line`` is the length in bytes of its journal line without the line feed: that of the record that stood there, so
    that no line of the journal moves.
    """

    bundle: str
    offset: int
    length: int
    line: int

    def to_json(self) -> bytes:
        """The journal line, filled up with spaces."""
        said = {"erased": True, "bundle": self.bundle, "offset": self.offset, "length": self.length}
        return orjson.dumps(said).ljust(self.line)

    @classmethod
    def from_json(cls, line: bytes) -> Erased:
        """The member of one journal line; raises ValueError, KeyError or TypeError where it is not one."""
        fields: dict[str, Any] = orjson.loads(line)
        if fields.pop("erased") is not True:
            raise ValueError("a line that does not say what it is")
        return cls(**fields, line=len(line))


Member = MemberRecord | Erased
"""What one line of a journal says."""

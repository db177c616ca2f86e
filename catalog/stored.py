"""Where an instance is, as queries answer it: for who does without the libraries that answer them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredInstance:
    """Where the bytes of an instance are: a DICOM Part 10 file in bytes [offset, offset + length) of its bundle."""

    StudyInstanceUID: str
    SeriesInstanceUID: str
    SOPInstanceUID: str
    SOPClassUID: str
    transfer_syntax_uid: str
    bundle: str
    offset: int
    length: int
    dataset_offset: int
    pixel_offset: int | None
    sha256: str

    @property
    def dataset_length(self) -> int:
        """Bytes of its data set."""
        return self.length - self.dataset_offset

"""Headers to rows: a tolerant reader of DICOM headers that never looks at pixels and never fails on any bytes."""

from sphere.ingest.header.alike import Identifier
from sphere.ingest.header.identity import Identity, identify
from sphere.ingest.header.layout import Rejected
from sphere.ingest.header.reader import Header, HeaderReader, dataset_json
from sphere.ingest.header.rows import RowBuilder

__all__ = ["Header", "HeaderReader", "Identifier", "Identity", "Rejected", "RowBuilder", "dataset_json", "identify"]

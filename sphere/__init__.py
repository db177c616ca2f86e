"""SPHERE, a research PACS: DICOM in, bundles on HDFS, a Delta Lake catalog, DIMSE and Spark SQL out.

archive = sphere.open("sphere.toml")
archive.find("STUDY", {"PatientName": "DOE*"}, return_keys=["StudyDate"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphere.archive import Archive, open

__all__ = ["Archive", "__version__", "open"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load the API when it is first used: set-up reads this package before its dependencies are there."""
    if name in ("Archive", "open"):
        from sphere import archive

        return getattr(archive, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

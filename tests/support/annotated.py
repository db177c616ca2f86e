"""The files of annotations."""

from __future__ import annotations

from pathlib import Path

from sphere.catalog.annotations import FILES
from sphere.conf.settings import Settings


def files(settings: Settings) -> list[Path]:
    """Everything below the folder of files, hidden ones too."""
    root = Path(settings.storage.root.removeprefix("file://")) / FILES
    return sorted(path for path in root.rglob("*") if path.is_file())

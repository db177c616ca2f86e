"""Fixtures that several unit tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from sphere.cli import main
from tests.support.upper import bench, bench_with

__all__ = ["bench", "bench_with"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The settings file that `sphere init` wrote for a new archive."""
    assert CliRunner().invoke(main, ["init", str(tmp_path / "archive")]).exit_code == 0
    return tmp_path / "archive" / "sphere.toml"

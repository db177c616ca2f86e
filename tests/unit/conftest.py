"""Fixtures that several unit tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from sphere.cli import main
from sphere.conf.settings import Settings
from tests.support.oidc import far_client
from tests.support.upper import bench, bench_with

__all__ = ["bench", "bench_with"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The settings file that `sphere init` wrote for a new archive."""
    assert CliRunner().invoke(main, ["init", str(tmp_path / "archive")]).exit_code == 0
    return tmp_path / "archive" / "sphere.toml"


@pytest.fixture(scope="module")
def far(settings: Settings) -> Iterator[TestClient]:
    """A client from elsewhere, of an archive whose `settings` the module says."""
    with far_client(settings) as client:
        yield client

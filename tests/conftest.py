"""Fixtures that all tests share. Data: the corpus where it exists, pydicom's packaged files, generated series."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
from hypothesis import settings as effort
from pynetdicom import _config as of_pynetdicom

from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from tests.support.browser import browsed, browser, page
from tests.support.examples import LONG, examples
from tests.support.hdfs import expendable_hdfs_cluster, hdfs_cluster
from tests.support.spark import spark

pytest_plugins = ["tests.support.lanes"]

# one cluster and one Spark for all tests of a process; what pages are tested with
__all__ = ["browsed", "browser", "expendable_hdfs_cluster", "hdfs_cluster", "page", "spark"]

# Nobody reads what pynetdicom would log of identifiers, which took most of the time of its clients.
of_pynetdicom.LOG_REQUEST_IDENTIFIERS = of_pynetdicom.LOG_RESPONSE_IDENTIFIERS = False

# What a test does not say itself of the examples that it draws. How long one takes is no failure: machines are busy.
effort.register_profile("sphere", effort(), max_examples=examples(100), deadline=None,
                        derandomize=effort().derandomize and not LONG)  # fmt: skip
effort.load_profile("sphere")

CORPUS = Path(os.environ.get("SPHERE_TEST_CORPUS") or Path(__file__).parent.parent / "../shared/data/dicom")


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The folder of real DICOM files (SPHERE_TEST_CORPUS); the test is skipped where there is none."""
    if not (CORPUS / "INDEX.csv").exists():
        pytest.skip("no corpus: set SPHERE_TEST_CORPUS to a folder with an INDEX.csv")
    return CORPUS.resolve()


@pytest.fixture(scope="session")
def corpus_index(corpus: Path) -> list[dict[str, str]]:
    """The rows of INDEX.csv."""
    with (corpus / "INDEX.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a new archive on local disk, small enough for a test machine."""
    return from_dict(
        {
            "spark": {"master": "local[2]", "shuffle_partitions": 2},
            "dimse": {"port": 0, "workers": 1},
            "extract": {"every_s": 0, "lock_wait_s": 0},
        },
        base=tmp_path,
    )

"""One Spark session for all tests of a process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from pyspark.sql import SparkSession

from sphere.conf.errors import ExternalMissing
from sphere.conf.loading import from_dict
from sphere.jobs.session import spark_session

# Started and stopped for a few seconds of work: what the just-in-time compilers could gain is not worth their start,
# which took half of the CPU time of a first statement. For this session and every program that a test starts.
os.environ.setdefault("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """Spark with Delta on two cores; it does not depend on any archive."""
    spark_settings = {"master": "local[2]", "shuffle_partitions": 2, "driver_memory": "1g"}
    settings = from_dict({"spark": spark_settings}, base=tmp_path_factory.mktemp("spark"))
    try:
        session = spark_session(settings, app_name="tests")
    except ExternalMissing as error:
        if os.environ.get("SPHERE_REQUIRE_ALL") == "1":
            raise
        pytest.skip(str(error))
    yield session
    session.stop()

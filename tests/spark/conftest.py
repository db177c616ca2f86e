"""What the tests with Spark share."""

from tests.support.hdfs import hdfs_cluster
from tests.support.spark import spark

__all__ = ["hdfs_cluster", "spark"]

"""What the tests with other people's programs share."""

from tests.support.hdfs import hdfs_cluster
from tests.support.spark import spark

__all__ = ["hdfs_cluster", "spark"]

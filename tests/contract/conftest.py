"""The storages that every contract runs on."""

from tests.support.hdfs import hdfs_cluster

__all__ = ["hdfs_cluster"]

"""What the tests of faults share."""

from tests.support.spark import spark

__all__ = ["spark"]

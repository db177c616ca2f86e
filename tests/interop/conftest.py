"""What the tests with other people's programs share."""

from tests.support.spark import spark

__all__ = ["spark"]

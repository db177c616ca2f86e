"""Fixtures that several unit tests share."""

from __future__ import annotations

from tests.support.upper import bench, bench_with

__all__ = ["bench", "bench_with"]

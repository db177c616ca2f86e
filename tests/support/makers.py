"""The process that stays ready to make indexes, as tests see it."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

from sphere.catalog.query import Query
from sphere.catalog.service import QueryService
from tests.support.catalog import Row, instance

WITHIN_S = 60.0
_others: set[int] = set()


def leave_out_others() -> None:
    """Do not count those of archives that other tests of this process still serve."""
    _others.update(maker.pid for maker in makers())


def makers() -> list[psutil.Process]:
    """Those that this process or a child of it started, and that live."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            command = child.cmdline()
        except psutil.Error:
            continue
        if child.pid not in _others and "sphere.catalog.index_process" in command and command[-1].isdigit():
            found.append(child)
    return found


def eventually(holds: Callable[[], object]) -> None:
    """Return once it holds; fails where that takes longer than it may on a loaded machine."""
    until = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.02)


def rows(studies: int) -> list[Row]:
    """A catalog of so many studies, of one instance and one patient each."""
    return [
        instance(study, StudyInstanceUID=f"9.{study}", SeriesInstanceUID=f"9.{study}.1", PatientID=f"P{study}")
        for study in range(studies)
    ]


def count(service: QueryService) -> int:
    """Studies in the answers."""
    return service.count(Query.build("STUDY"))

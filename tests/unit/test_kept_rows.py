"""Sorted answers put aside: the same rows page by page, out of DuckDB before the first is given, two at a time."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import duckdb
import pytest

from sphere.catalog import kept_rows
from sphere.catalog import service as service_module
from sphere.catalog.cancel import never
from sphere.catalog.kept_rows import AT_ONCE, PAGE, kept, turn
from sphere.catalog.query import Query
from sphere.catalog.schema import Level
from sphere.catalog.service import QueryService
from sphere.conf.errors import CatalogError
from tests.bench import hospital_catalog

pytestmark = pytest.mark.unit

SQL = """
    SELECT i, 'text ' || i, DATE '2024-01-01' + (i % 300)::INT,
        TIMESTAMPTZ '2024-01-01 00:00:00+00' + INTERVAL (i) SECOND, [i, NULL]::DOUBLE[], TIME '10:00:00.5',
        (i / 3)::DECIMAL(9, 3), if(i % 2 = 0, NULL, i)
    FROM range(?) t(i) ORDER BY i DESC
"""


@pytest.mark.parametrize("count", [0, 1, PAGE - 1, PAGE, PAGE + 1, 40 * PAGE])
def test_the_rows_of_the_cursor_page_by_page(tmp_path: Path, count: int) -> None:
    with duckdb.connect() as db:
        expected = db.execute(SQL, [count]).fetchall()
        cursor = db.cursor().execute(SQL, [count])
        ended: list[int] = []
        pages = list(kept(cursor, tmp_path, never, lambda: ended.append(len(ended))))
        assert [row for page in pages for row in page] == expected
        assert {len(page) for page in pages[:-1]} <= {PAGE}
        assert ended == [0]
        assert list(tmp_path.iterdir()) == []


def test_cancelled_while_it_is_put_aside_and_while_it_is_given(tmp_path: Path) -> None:
    with duckdb.connect() as db:
        calls: list[None] = []
        cursor = db.cursor().execute(SQL, [40 * PAGE])
        assert list(kept(cursor, tmp_path, lambda: calls.append(None) or len(calls) > 5)) == []
        assert len(cursor.fetchall()) == 35 * PAGE - PAGE, "the rest was not asked for"
        gone = threading.Event()
        pages = kept(db.cursor().execute(SQL, [40 * PAGE]), tmp_path, gone.is_set)
        next(pages)
        gone.set()
        assert list(pages) == []


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(SpooledTemporaryFile[bytes]):
        def rollover(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kept_rows, "SpooledTemporaryFile", Full)
    with duckdb.connect() as db, pytest.raises(CatalogError, match=r"cannot be kept in .*No space left"):
        list(kept(db.cursor().execute(SQL, [40 * PAGE]), tmp_path))


def test_few_sort_at_once() -> None:
    with ExitStack() as stack:
        over = [stack.enter_context(turn(never)) for _ in range(AT_ONCE)]
        looked: list[None] = []
        with turn(lambda: looked.append(None) or len(looked) > 1) as none:
            none()  # cancelled: it never had one
        assert len(looked) == 2, "it waited until then"
        over[0]()
        over[0]()
        stack.enter_context(turn(never))
    with ExitStack() as stack:
        for _ in range(AT_ONCE):
            stack.enter_context(turn(never))  # all were given back


def test_duckdb_has_given_all_before_the_first_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, hospital = hospital_catalog.kept(tmp_path, 200)
    cursors: list[duckdb.DuckDBPyConnection] = []

    def noted(cursor: duckdb.DuckDBPyConnection, *arguments: Any) -> Iterator[list[Any]]:
        cursors.append(cursor)
        return kept(cursor, *arguments)

    monkeypatch.setattr(service_module, "kept", noted)
    asked: list[tuple[Level, tuple[str, ...], int]] = [
        ("IMAGE", ("PatientName", "StudyDescription", "InstanceNumber"), hospital.instances),
        ("SERIES", ("PatientName", "StudyDescription", "SeriesDescription"), len(hospital.study_of)),
    ]
    with QueryService(settings) as service:
        for level, keys, count in asked:
            query = Query.build(level, {"PatientName": "*"}, return_keys=keys, relational=True)
            expected = [one.identifier() for one in service.find(query)]
            assert len(expected) == count > 2 * PAGE
            cursors.clear()
            opened = [service.find(query) for _ in range(AT_ONCE + 2)]
            first = [next(answers).identifier() for answers in opened]
            assert [cursor.fetchmany(1) for cursor in cursors] == [[]] * len(opened), level
            for one, answers in zip(first, opened, strict=True):
                assert [one, *(rest.identifier() for rest in answers)] == expected

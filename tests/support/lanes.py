"""How the tests are spread over pytest-xdist's workers (`make test`); a plain `pytest` is one lane and is as it was.

There is one HDFS per run, so every test that uses it stays on one worker, with half of those that use a Spark session,
of which there are two: one worker with all of them would end long after the others. A module's own fixtures are made
once too: the tests that use one stay together. Other slow tests go one by one to whichever worker is free, and the
quick ones by module. What takes longest starts first, so that the workers end at about the same time.

Every worker collects the tests for itself and all must find the same names: a parameter that is different in each run
(a time, a process id, the order of a set) needs a name of its own (`ids=`).
"""

from __future__ import annotations

import gc
from pathlib import PurePath

import pytest

_SHARED = ("spark", "hdfs_cluster")  # session fixtures
_SPARK = ("compact_kill", "extract_kill", "recent_spark", "doors_spark", "web_queries")
"""Modules that use a Spark session and no HDFS, as dear as the others that use either."""
_SLOW = ("faults", "spark", "hdfs", "interop", "web")  # markers, the slowest first
_LONG = ("web_openapi", "collections", "web_delete", "index_refresh", "web_search", "index", "index_maker", "private",
         "jobs_known_patients", "rows_damaged", "deleted", "recent", "web_store", "web_serving", "asof")  # fmt: skip
"""Modules of unit tests that take longest, 10 to 80 s of one core: they start before the others."""


def pytest_configure(config: pytest.Config) -> None:
    """In a worker, look for no garbage while modules and tests are read in: a sixth of that, for none."""
    if hasattr(config, "workerinput"):
        gc.disable()


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a worker, give every test its lane; what is shared by many first, then slow tests, else in their own order."""
    if not hasattr(config, "workerinput"):
        return
    for item in items:
        name = lane(item)
        if name:
            item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=lambda item: (lane(item) not in ("spark", "shared"), _rank(item), _place(item)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to run where xdist forgot the lanes, as it does with pytest 9.2 (its issue 1386).

    Of what thousands of tests and all modules are, the garbage collector looks at nothing again: it took a tenth of the
    CPU time of unit tests.
    """
    if not hasattr(session.config, "workerinput"):
        return
    if not all("@" in item.nodeid for item in session.items if lane(item)):
        raise pytest.UsageError("this pytest-xdist does not group tests with this pytest: pip install 'pytest<9.2'")
    gc.collect()
    gc.freeze()
    gc.enable()


def lane(item: pytest.Item) -> str:
    """The group that `item` runs in, on one worker; "" for a test that may go anywhere."""
    if any(name in item.fixturenames for name in _SHARED):  # type: ignore[attr-defined]  what pytest collects has them
        return "spark" if _module(item) in _SPARK else "shared"
    return _module(item) if _uses_module_fixture(item) or _rank(item) == len(_SLOW) else ""


def _module(item: pytest.Item) -> str:
    return PurePath(item.nodeid.partition("::")[0]).stem.removeprefix("test_")


def _place(item: pytest.Item) -> int:
    """The place of a unit test's module among those that take long."""
    name = _module(item)
    return _LONG.index(name) if _rank(item) == len(_SLOW) and name in _LONG else len(_LONG)


def _rank(item: pytest.Item) -> int:
    """The place of a test's slowest marker; unit tests come last, whatever else they are."""
    if item.get_closest_marker("unit"):
        return len(_SLOW)
    return next((place for place, marker in enumerate(_SLOW) if item.get_closest_marker(marker)), len(_SLOW))


def _uses_module_fixture(item: pytest.Item) -> bool:
    definitions = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]  no public way to their scopes
    return any(found[-1].scope == "module" for found in definitions.values())

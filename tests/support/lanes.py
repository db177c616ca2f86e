"""How the tests are spread over pytest-xdist's workers (`make test`); a plain `pytest` is one lane and is as it was.

There is one Spark session and one HDFS per run, so every test that uses either stays on one worker. A module's own
fixtures are made once too: the tests that use one stay together. Other slow tests go one by one to whichever worker
is free, and the quick ones by module. What takes longest starts first, so that the workers end at about the same time.

Every worker collects the tests for itself and all must find the same names: a parameter that is different in each run
(a time, a process id, the order of a set) needs a name of its own (`ids=`).
"""

from __future__ import annotations

from pathlib import PurePath

import pytest

_SHARED = ("spark", "hdfs_cluster")  # session fixtures of which a run has one
_SLOW = ("faults", "spark", "hdfs", "interop", "web")  # markers, the slowest first


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a worker, give every test its lane; the shared one first, then slow tests, else in their own order."""
    if not hasattr(config, "workerinput"):
        return
    for item in items:
        name = lane(item)
        if name:
            item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=lambda item: (lane(item) != "shared", _rank(item)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to run where xdist forgot the lanes, as it does with pytest 9.2 (its issue 1386)."""
    if hasattr(session.config, "workerinput") and not all("@" in item.nodeid for item in session.items if lane(item)):
        raise pytest.UsageError("this pytest-xdist does not group tests with this pytest: pip install 'pytest<9.2'")


def lane(item: pytest.Item) -> str:
    """The group that `item` runs in, on one worker; "" for a test that may go anywhere."""
    if any(name in item.fixturenames for name in _SHARED):  # type: ignore[attr-defined]  what pytest collects has them
        return "shared"
    if _uses_module_fixture(item) or _rank(item) == len(_SLOW):
        return PurePath(item.nodeid.partition("::")[0]).stem.removeprefix("test_")
    return ""


def _rank(item: pytest.Item) -> int:
    """The place of a test's slowest marker; unit tests come last, whatever else they are."""
    if item.get_closest_marker("unit"):
        return len(_SLOW)
    return next((place for place, marker in enumerate(_SLOW) if item.get_closest_marker(marker)), len(_SLOW))


def _uses_module_fixture(item: pytest.Item) -> bool:
    definitions = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]  no public way to their scopes
    return any(found[-1].scope == "module" for found in definitions.values())

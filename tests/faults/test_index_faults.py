"""The process that makes indexes, killed at any moment: the answers are those of the newest version, if later."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sphere.catalog import index_maker
from sphere.catalog.query import Query
from sphere.catalog.service import QueryService
from sphere.conf.settings import Settings
from tests.bench.query_client import association, question
from tests.support.catalog import archive, write_catalog
from tests.support.makers import WITHIN_S, count, eventually, leave_out_others, makers, rows
from tests.support.serving import running_supervisor

pytestmark = pytest.mark.faults

KILLS = 10
LATEST_S = 0.6  # from a commit to the kill: a refresh of so little is made by then


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Settings, QueryService]]:
    """One that serves, with the maker ready."""
    leave_out_others()
    monkeypatch.setattr(index_maker, "HOLD_S", 0.0)
    settings = archive(tmp_path)
    write_catalog(settings, rows(3))
    with QueryService(settings, apart=True) as opened:
        assert count(opened) == 3
        eventually(makers)
        yield settings, opened


def test_it_is_killed_at_any_moment(service: tuple[Settings, QueryService]) -> None:
    settings, asked = service
    chance, killed = random.Random(11), 0
    for studies in range(4, 4 + KILLS):
        write_catalog(settings, rows(studies))
        for maker in makers():
            timer = threading.Timer(chance.uniform(0.0, LATEST_S), maker.kill)
            timer.start()
            seen = set[int]()
            eventually(lambda seen=seen, studies=studies: (seen.add(count(asked)), studies in seen)[1])
            timer.join()
            assert seen <= {studies - 1, studies}, "the version before, or this one"
            psutil.wait_procs([maker], timeout=WITHIN_S)
            killed += 1
        eventually(lambda studies=studies: count(asked) == studies)  # by whoever makes it where there was no maker
    assert killed > KILLS // 2
    found = {str(one.identifier().StudyInstanceUID) for one in asked.find(Query.build("STUDY"))}
    assert found == {f"9.{study}" for study in range(3 + KILLS)}
    left = list((settings.archive.state_dir / "index").glob("*.building"))
    assert len(left) <= 1, "what it leaves, the next one removes"


def test_it_ends_with_who_serves_however_that_ends(tmp_path: Path) -> None:
    leave_out_others()
    write_catalog(archive(tmp_path), rows(3))
    with running_supervisor(tmp_path, workers=2, web=True) as serving:
        for _ in range(8):  # by either receiver
            with association(serving.port, "SPHERE") as asked:
                assert asked.ask(question("STUDY", {"StudyInstanceUID": ""})).answers == 3
        eventually(makers)
        [maker] = makers()
        serving.process.kill()
        serving.process.wait()
        assert psutil.wait_procs([maker], timeout=WITHIN_S)[1] == []

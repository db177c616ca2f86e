"""SIGTERM during an extraction of `sphere serve`: it is its main thread that stops."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sphere import children

pytestmark = pytest.mark.unit


def test_who_tells_of_progress_does_not_stop_in_the_place_of_the_extraction(tmp_path: Path) -> None:
    """Its thread would end by a traceback, and what the signal is to raise would be taken for raised."""
    stop, at_work = threading.Event(), threading.Event()
    failed: list[BaseException] = []
    went_on = []

    class Archive:
        def extract(self, on_step: Callable[..., None]) -> str:
            on_step("headers", 0, 2)
            stop.set()  # as the handler does first

            def watch() -> None:
                try:
                    on_step("headers", 1, 2)
                except BaseException as error:  # noqa: BLE001
                    failed.append(error)

            thread = threading.Thread(target=watch)
            thread.start()
            thread.join()
            went_on.append(at_work.is_set())  # as it asks then
            on_step("instances")
            return "never"

    with pytest.raises(children._Stopping):
        children._extract(Archive(), tmp_path, stop, at_work)  # type: ignore[arg-type]
    assert failed == []
    assert went_on == [True]
    assert not at_work.is_set()

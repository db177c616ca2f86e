"""How far a Spark job is: asked from Spark, shown on a terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyspark import SparkContext
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

POLL_S = 0.2
"""Seconds between two questions to Spark."""


@contextmanager
def watched(context: SparkContext, tell: Callable[[float], None]) -> Iterator[None]:
    """While the block runs a Spark job, tell now and then which part of its tasks is done, from 0 to 1."""
    over = threading.Event()

    def watch() -> None:
        tracker = None
        while not over.wait(POLL_S):
            tracker = tracker or context.statusTracker()
            stages = [info for stage in tracker.getActiveStageIds() if (info := tracker.getStageInfo(stage))]
            tasks = sum(stage.numTasks for stage in stages)
            if tasks:
                tell(sum(stage.numCompletedTasks for stage in stages) / tasks)

    thread = threading.Thread(target=watch, name="spark-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def step_bar() -> Iterator[Callable[..., None]]:
    """An `on_step` for jobs that shows a bar on standard error, and nothing where that is not a terminal.

    It is called with a step's name, and where a step counts its members, with how many are done and how many there are.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    display = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
    with display as progress:
        task = progress.add_task("starting", total=None)

        def on_step(name: str, done: int | None = None, total: int | None = None) -> None:
            progress.update(task, description=name, completed=done or 0, total=total)

        yield on_step

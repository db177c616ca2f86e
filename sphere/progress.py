"""Progress of long work on a terminal, and nothing but the final line elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sphere.ingest.media import Imported, find_files
from sphere.output import printable


@dataclass
class Counts:
    """How an import ended."""

    stored: int = 0
    skipped: int = 0
    failed: int = 0
    bytes: int = 0


def bar() -> Progress:
    """A progress display on standard error, silent where that is not a terminal."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )  # fmt: skip
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)


def import_progress(results: Iterable[Imported], paths: Iterable[Path]) -> Counts:
    """Count results as they come, name each failure on standard error, and show a bar on a terminal."""
    counts = Counts()
    with bar() as progress:
        total = None if progress.disable else sum(1 for _ in find_files(paths))
        task = progress.add_task("import", total=total, rate="")
        for result in results:
            _count(result, counts, progress.console)
            elapsed = progress.tasks[task].elapsed or 1e-9
            progress.update(task, advance=1, rate=f"{counts.bytes / 1e6 / elapsed:.0f} MB/s")
    return counts


def _count(result: Imported, counts: Counts, console: Console) -> None:
    if result.record is not None:
        counts.stored += 1
        counts.bytes += result.record.length
    elif result.skipped:
        counts.skipped += 1
    else:
        counts.failed += 1
        message = printable(f"{result.path}: {result.error}")
        if sys.stderr.isatty():
            console.print(message, markup=False, highlight=False)
        else:
            click.echo(message, err=True)

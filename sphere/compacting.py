"""Compaction as a person asks for it: the job, and its record in the audit journal."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta

from sphere.caller import who_calls
from sphere.catalog.audit import AuditJournal
from sphere.conf.settings import Settings
from sphere.ingest.storage import open_storage
from sphere.jobs.compact import run
from sphere.jobs.compact_report import CompactReport


def compact(
    settings: Settings,
    *,
    after: timedelta | None = None,
    dry_run: bool = False,
    vacuum: timedelta | None = None,
    on_step: Callable[..., None] | None = None,
) -> CompactReport:
    """What sphere.jobs.compact.run does, recorded: who, how many instances and bytes, and how it ended. A dry run is
    not recorded."""
    if dry_run:
        return run(settings, after=after, dry_run=True, vacuum=vacuum, on_step=on_step)
    storage = open_storage(settings.storage.root, user=settings.storage.user)
    began, report, outcome = time.monotonic(), CompactReport(), "failed"
    with closing(AuditJournal(storage, settings.archive.state_dir / "audit.jsonl")) as journal:
        try:
            report = run(settings, after=after, vacuum=vacuum, on_step=on_step)
            outcome = "incomplete" if report.failures else "done"
        finally:
            journal.add(
                who=who_calls(),
                method="COMPACT",
                path="bundles" if vacuum is None else "bundles,catalog",
                outcome=outcome,
                entities=report.instances,
                failed=len(report.failures),
                bytes=report.bytes,
                seconds=round(time.monotonic() - began, 3),
            )
    return report

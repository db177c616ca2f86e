"""`sphere store PEER`: send files, folders, or what a query finds in the archive."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pyarrow as pa

from sphere.conf.errors import PeerError, StorageError
from sphere.conf.loading import load, load_archive
from sphere.conf.peers import Peer
from sphere.conf.settings import Settings
from sphere.dimse_commands import name_failure, split_keys
from sphere.output import PathArgument, printable, write_rows
from sphere.peer_argument import Named, peer_argument
from sphere.progress import bar

if TYPE_CHECKING:
    from sphere.catalog.query import Query
    from sphere.catalog.service import StoredInstance
    from sphere.scp.client import StoreResult
    from sphere.scp.client.sent import SentJournal
    from sphere.scp.retrieve.outbound import Converter


@click.command()
@peer_argument()
@click.argument("paths", metavar="[PATH]...", nargs=-1, type=PathArgument())
@click.option(
    "--where", multiple=True, metavar="KEYWORD=VALUE",
    help="Send what the archive has of this, instead of files: keys as of `find`, of any level.",
)  # fmt: skip
@click.option("--all", "everything", is_flag=True, help="Send all that the archive has.")
@click.option("--as-is", is_flag=True, help="Send nothing in another transfer syntax than it has.")
@click.option("--tries", type=click.IntRange(min=1), default=3, show_default=True, help="Times to try.")
@click.option("--again", is_flag=True, help="Send also what an earlier call, which did not get to its end, has sent.")
@click.pass_context
def store(
    ctx: click.Context,
    peer: Named,
    paths: tuple[Path, ...],
    where: tuple[str, ...],
    everything: bool,
    as_is: bool,
    tries: int,
    again: bool,
) -> None:
    """Send files and folders, or instances of the archive, to a peer (C-STORE).

    PEER is a name of [[peers]] in the settings, or AET@HOST:PORT. Everything goes byte for byte where the peer accepts
    its transfer syntax, else uncompressed. A call that is interrupted, or leaves something unsent, goes on where it
    stopped when it is given again. What failed is listed at the end, with the reason, and the exit status is 1.

    \b
    Examples:
      sphere store ward scans/
      sphere store SPHERE@127.0.0.1:11112 one.dcm two.dcm
      sphere store ward --where StudyDate=20240101- --where Modality=CT
    """
    from sphere.finding import every_instance, instances_matching
    from sphere.scp.client.sent import SentJournal
    from sphere.scp.identifier import parse_keys
    from sphere.scp.retrieve.transcoder import Transcoder

    if bool(paths) + bool(where) + everything != 1:
        raise click.UsageError("say what to send: either PATH..., or --where KEYWORD=VALUE, or --all")
    settings = load(ctx.obj) if paths else load_archive(ctx.obj)
    target = peer.resolve(settings)
    query = instances_matching(parse_keys(split_keys(where))) if where else every_instance()
    asked = [str(path.resolve()) for path in paths] or [f"where {key}" for key in where]
    with SentJournal(settings.archive.state_dir, target, asked) as journal, closing(Transcoder()) as transcoder:
        if again:
            journal.forget()
        source = _Source(settings, target, journal, None if as_is else transcoder, tries)
        report = _Report(journal)
        results = source.files(paths) if paths else source.archived(query)
        _run(results, report, source, total=_count(paths))
        if not report.failures:
            journal.done()
    _conclude(report, source.skipped)


@dataclass
class _Source:
    """What is to be sent, without what an earlier call has sent."""

    settings: Settings
    peer: Peer
    journal: SentJournal
    converter: Converter | None
    tries: int
    skipped: int = 0
    keys: dict[str, str] = field(default_factory=dict)  # of instances that are under way

    def files(self, paths: tuple[Path, ...]) -> Iterator[tuple[str, StoreResult]]:
        """Each file's key of the journal, and what became of it."""
        from sphere.ingest.media import find_files
        from sphere.scp import client
        from sphere.scp.client.sent import file_key

        new = (path for path in find_files(paths) if self._is_new(file_key(path)))
        options = {"converter": self.converter, "tries": self.tries}
        for result in client.store(self.peer, new, settings=self.settings, **options):  # type: ignore[arg-type]
            yield file_key(Path(result.source)), result

    def archived(self, query: Query) -> Iterator[tuple[str, StoreResult]]:
        """The same of instances of the archive."""
        from sphere.catalog.queries import open_queries
        from sphere.finding import find_instances
        from sphere.ingest.spool import open_readable
        from sphere.scp import client

        storage = open_readable(self.settings)
        options = {"converter": self.converter, "tries": self.tries}
        with open_queries(self.settings) as service:
            new = (one for one in find_instances(service, query) if self._is_new(self._key(one)))
            for result in client.store_instances(
                self.peer, new, storage, settings=self.settings, **options  # type: ignore[arg-type]
            ):  # fmt: skip
                yield self.keys.pop(str(result.source), ""), result

    def _key(self, instance: StoredInstance) -> str:
        from sphere.scp.client.sent import instance_key

        key = self.keys[instance.SOPInstanceUID] = instance_key(instance)
        return key

    def _is_new(self, key: str) -> bool:
        known = self.journal.has(key)
        self.skipped += known
        return not known


@dataclass
class _Report:
    """How it went."""

    journal: SentJournal
    sent: int = 0
    size: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    resumable: bool = True

    def note(self, key: str, result: StoreResult) -> None:
        """Count a result, and keep in mind what was sent."""
        if not result.stored:
            self.failures.append({"what": printable(str(result.source)), "why": result.error})
            return
        self.sent += 1
        self.size += result.size
        if result.error:
            name_failure(printable(f"{result.source}: stored, {result.error}"))
        if self.resumable and key:
            try:
                self.journal.add(key)
            except StorageError as error:
                self.resumable = False
                name_failure(f"{error}; this call cannot be resumed")


def _run(
    results: Iterator[tuple[str, StoreResult]], report: _Report, source: _Source, *, total: int | None
) -> None:  # fmt: skip
    with bar() as progress:
        task = progress.add_task("store", total=total, rate="")
        try:
            for key, result in results:
                report.note(key, result)
                rate = f"{report.size / 1e6 / (time.monotonic() - report.started):.0f} MB/s"
                done = report.sent + len(report.failures) + source.skipped
                progress.update(task, completed=done, rate=rate)
        except PeerError as error:  # the peer is gone: what was not tried is still to be sent
            report.failures.append({"what": "everything else", "why": str(error)})


def _count(paths: tuple[Path, ...]) -> int | None:
    from sphere.ingest.media import find_files

    return sum(1 for _ in find_files(paths)) if paths and sys.stderr.isatty() else None


def _conclude(report: _Report, skipped: int) -> None:
    seconds = time.monotonic() - report.started
    before = f", {skipped} sent by an earlier call" if skipped else ""
    click.echo(
        f"{report.sent} sent, {len(report.failures)} failed{before} ({report.size / 1e6:.1f} MB in {seconds:.1f} s)"
    )
    if report.failures:
        write_rows(pa.Table.from_pylist(report.failures), format="table", output=None)
    sys.exit(1 if report.failures else 0)

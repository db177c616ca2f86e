"""`sphere move|get PEER`: have a peer send instances, elsewhere or into the archive."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, TextIO, get_args

import click
import pyarrow as pa

from sphere.catalog.schema import Level
from sphere.conf.errors import PeerError
from sphere.conf.loading import load, load_archive
from sphere.conf.peers import Peer
from sphere.conf.settings import Settings
from sphere.dimse_commands import name_failure, split_keys
from sphere.option_values import check_ae_title
from sphere.output import write_rows
from sphere.peer_argument import Named, peer_argument
from sphere.progress import bar

if TYPE_CHECKING:
    from sphere.scp.client.pull import Outcome, Target
    from sphere.scp.client.retrieve import Lands, Progress


_OPTIONS = (
    peer_argument(),
    click.option(
        "--level", type=click.Choice(get_args(Level)), default="STUDY", show_default=True, help="QueryRetrieveLevel."
    ),
    click.option(
        "-k", "--key", "keys", multiple=True, metavar="KEYWORD=VALUE",
        help="Unique key, or any key to be looked up by C-FIND first.",
    ),
    click.option(
        "--from", "list_file", type=click.File(), metavar="FILE",
        help="One request a line: UIDs from the study down to the level, separated by commas or blanks (PATIENT: a"
        " PatientID); - is stdin.",
    ),
    click.option("--existing", is_flag=True, help="Skip what the archive already has (asks the peer what it has)."),
    click.option("--pause", type=click.FloatRange(min=0), default=0.0, metavar="S", help="Seconds between requests."),
    click.option("--tries", type=click.IntRange(min=1), default=3, show_default=True, help="Times to ask."),
    click.pass_context,
)  # fmt: skip


def _options(function: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@click.command()
@click.option("--to", "destination", required=True, metavar="AET", callback=check_ae_title,
              help="AE title, known to the peer, to send to.")  # fmt: skip
@_options
def move(
    ctx: click.Context, peer: Named, destination: str, level: Level, keys: tuple[str, ...], list_file: TextIO | None,
    existing: bool, pause: float, tries: int,
) -> None:  # fmt: skip
    """Have a peer send instances to an AE title that it knows (C-MOVE).

    PEER is a name of [[peers]] in the settings, or AET@HOST:PORT. What failed is listed at the end, with the reason,
    and the exit status is 1.

    \b
    Examples:
      sphere move ward --to SPHERE -k StudyInstanceUID=1.2.3
      sphere move ward --to SPHERE -k PatientID=4711 -k StudyDate=20240101-
      sphere move ward --to SPHERE --from studies.txt --existing --pause 2
      sphere move ward --to SPHERE --level SERIES -k StudyInstanceUID=1.2.3 -k SeriesInstanceUID=1.2.3.4
    """
    from sphere.scp import client

    settings = load_archive(ctx.obj) if existing else load(ctx.obj)
    source = peer.resolve(settings)

    def ask(target: Target) -> Iterator[Progress]:
        return client.move(
            source, target.keys, settings=settings, destination=destination, level=target.level,
            model="PATIENT_ROOT" if target.level == "PATIENT" else "STUDY_ROOT",
        )  # fmt: skip

    targets = _targets(source, settings, keys, list_file, level)
    narrowed = _narrowed(targets, source, settings, existing, classes=False)
    sys.exit(1 if _run("move", narrowed, len(targets), ask, pause, tries) else 0)


@click.command()
@_options
def get(
    ctx: click.Context, peer: Named, level: Level, keys: tuple[str, ...], list_file: TextIO | None, existing: bool,
    pause: float, tries: int,
) -> None:  # fmt: skip
    """Bring instances from a peer straight into the archive (C-GET).

    PEER is a name of [[peers]] in the settings, or AET@HOST:PORT. Each instance is durable before it is answered; then
    `sphere extract` catalogues it. What failed is listed at the end, with the reason, and the exit status is 1.

    \b
    Examples:
      sphere get ward -k StudyInstanceUID=1.2.3
      sphere get ward --level PATIENT -k PatientID=4711
      sphere get ward --from studies.txt --existing --pause 2
    """
    from sphere.scp import client

    settings = load_archive(ctx.obj)
    source = peer.resolve(settings)
    targets = _targets(source, settings, keys, list_file, level)
    with _archive_store(settings) as store:

        def ask(target: Target) -> Iterator[Progress]:
            return client.get(
                source, target.keys, settings=settings, store=store, level=target.level,
                model="PATIENT_ROOT" if target.level == "PATIENT" else "STUDY_ROOT", sop_classes=target.sop_classes,
            )  # fmt: skip

        narrowed = _narrowed(targets, source, settings, existing, classes=True)
        failed = _run("get", narrowed, len(targets), ask, pause, tries)
    sys.exit(1 if failed else 0)


@contextmanager
def _archive_store(settings: Settings) -> Iterator[Lands]:
    from sphere.catalog.known import KnownInstances
    from sphere.catalog.queries import LateQueries
    from sphere.ingest.spool import open_writer
    from sphere.scp.policy import Policy
    from sphere.scp.store import StoreService

    policy = Policy(settings)
    with closing(open_writer(settings)) as writer, LateQueries(settings) as finder:
        known = KnownInstances(settings, finder)
        yield StoreService(writer, policy, known, on_conflict=settings.ingest.on_conflict)


def _targets(
    peer: Peer, settings: Settings, keys: tuple[str, ...], list_file: TextIO | None, level: Level
) -> list[Target]:
    from sphere.scp.client.pull import find_targets, read_targets

    if bool(keys) == (list_file is not None):
        raise click.UsageError("say what to retrieve: either -k KEYWORD=VALUE, or --from FILE")
    if list_file is not None:
        return read_targets(list_file, level)
    return find_targets(peer, split_keys(keys), level, settings=settings)


def _narrowed(
    targets: list[Target], peer: Peer, settings: Settings, existing: bool, *, classes: bool
) -> Iterator[list[Target]]:
    """The requests for each target: less what is here with `existing`, with its SOP classes for `classes`.

    Where the peer does not say what it has, the target stays as it is.
    """
    from sphere.scp.client.pull import Inventory, missing

    inventory = Inventory(peer, settings)
    for target in targets:
        if not (existing or classes):
            yield [target]
            continue
        try:
            there = inventory.instances(target)
        except PeerError as error:
            name_failure(f"{target}: cannot ask what is there: {error}")
            there = {}
        here = _here(settings, {uid for uids in there.values() for uid in uids}) if existing else set()
        yield missing(target, there, here)


def _here(settings: Settings, uids: set[str]) -> set[str]:
    """Those of `uids` that the archive has, catalogued or not."""
    from sphere.catalog.queries import open_queries

    if not uids:
        return set()
    with open_queries(settings) as service:
        return {one.SOPInstanceUID for one in service.lookup_instances(sop=sorted(uids))}


def _run(
    verb: str,
    narrowed: Iterator[list[Target]],
    total: int,
    ask: Callable[[Target], Iterator[Progress]],
    pause: float,
    tries: int,
) -> bool:
    """Work through the requests and report; whether any failed."""
    from sphere.scp.client.pull import failures, retrieve

    outcomes: list[Outcome] = []
    skipped = 0
    with bar() as progress:
        task = progress.add_task(verb, total=total, rate="")
        for number, requests in enumerate(narrowed):
            if number and pause:
                time.sleep(pause)
            skipped += not requests
            for target in requests:
                outcomes.append(
                    retrieve(
                        target, ask, tries=tries,
                        on_progress=lambda now: progress.update(task, rate=f"{now.completed} instances"),
                    )
                )  # fmt: skip
            progress.update(task, advance=1)
    rows = failures(outcomes)
    done = sum(outcome.completed + outcome.warning for outcome in outcomes)
    lost = sum(outcome.failed for outcome in outcomes)
    click.echo(f"{total} asked for, {skipped} already here: {done} instances sent, {lost} failed")
    if rows:
        write_rows(pa.Table.from_pylist(rows), format="table", output=None)
    return bool(rows)

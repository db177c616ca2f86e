"""`sphere delete` and `sphere undelete`: instances that are shown no more, and again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sphere.conf.loading import load_archive
from sphere.option_values import check_uids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sphere.catalog.service import StoredInstance

F = TypeVar("F", bound=Callable[..., Any])


def _chosen(function: F) -> F:
    """The options that name studies, series and instances; each may be given several times."""
    for option, name, what in (
        ("--instance", "sop", "An instance."),
        ("--series", "series", "All of a series."),
        ("--study", "study", "All of a study."),
    ):
        function = click.option(option, name, multiple=True, metavar="UID", callback=check_uids, help=what)(function)
    return function


@click.command()
@_chosen
@click.option("--where", multiple=True, metavar="KEYWORD=VALUE",
              help="What matches, instead of UIDs: keys as of `find`, of any level; all must hold.")  # fmt: skip
@click.option("--reason", default="", help="Why, for the record.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def delete(ctx: click.Context, /, where: tuple[str, ...], reason: str, yes: bool, **uids: Sequence[str]) -> None:
    """Show studies, series and instances no more; their bytes stay until compaction.

    No service shows them from now on, and no table after the next extraction. What comes again with the UID of a
    deleted instance is refused. Says what it is about to delete, and asks; without a terminal it needs --yes. Files
    that are linked to it (`sphere annotate`) stay, and are shown to admins only: it says how many there are.

    \b
    Examples:
      sphere delete --study 1.2.3 --reason "consent withdrawn"
      sphere delete --series 1.2.3.4 --instance 1.2.3.5.6
      sphere delete --where PatientID=4711 --where StudyDate=20240101- --yes
    """
    from sphere import deleting
    from sphere.catalog.queries import open_queries
    from sphere.dimse_commands import split_keys
    from sphere.scp.identifier import parse_keys

    if bool(where) == any(uids.values()):
        raise click.UsageError("say what to delete: either --study, --series, --instance, or --where KEYWORD=VALUE")
    settings = load_archive(ctx.obj)
    with open_queries(settings) as queries:
        if where:
            found = deleting.choose_matching(queries, parse_keys(split_keys(where)))
        else:
            found = deleting.choose(queries, uids)
        if not found:
            click.echo("nothing matches")
            return
        click.echo(_counted(found))
        if not yes:
            _ask()
        done = deleting.delete(settings, found, reason=reason)
        click.echo(f"{done} deleted; the tables follow with the next sphere extract, sphere undelete shows them again")
        if count := deleting.annotations_of(settings, queries, found):
            click.echo(
                f"{count} annotations refer to what was deleted: only admins are shown them, and their files stay, "
                "also after sphere compact; sphere annotate list --uid UID names them, sphere annotate delete ID "
                "deletes one"
            )


@click.command()
@_chosen
@click.option("--remaining", is_flag=True, help="Only those that are not erased yet.")
@click.pass_context
def undelete(ctx: click.Context, /, remaining: bool, **uids: Sequence[str]) -> None:
    """Show deleted studies, series and instances again.

    At once, or where an extraction has taken them out of the tables, after the next one. Where `sphere compact` has
    erased some of them nothing is shown again, unless --remaining chooses the others.

    \b
    Examples:
      sphere undelete --study 1.2.3
      sphere undelete --instance 1.2.3.5.6
      sphere undelete --study 1.2.3 --remaining
    """
    from sphere import deleting

    if not any(uids.values()):
        raise click.UsageError("say what to show again: --study, --series or --instance")
    settings = load_archive(ctx.obj)
    found = deleting.choose_deleted(settings, uids)
    done = deleting.undelete(settings, [one for one in found if not (remaining and one.erased)])
    click.echo(f"{done} are shown again; those that had left the tables, after the next sphere extract")


def _ask() -> None:
    if not _is_terminal():
        raise click.UsageError("there is no terminal to ask on: --yes deletes them")
    click.confirm("Delete them?", abort=True)


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _counted(found: Sequence[StoredInstance]) -> str:
    series = {(one.StudyInstanceUID, one.SeriesInstanceUID) for one in found}
    studies = {study for study, _ in series}
    size = sum(one.length for one in found)
    return f"{len(found)} instances of {len(series)} series in {len(studies)} studies ({size / 1e6:.1f} MB)"

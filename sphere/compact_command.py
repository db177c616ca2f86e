"""`sphere compact`: the bytes of what was deleted go."""

from __future__ import annotations

import re
import sys
from datetime import timedelta

import click

from sphere.conf.loading import load_archive

_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


def _span(_: click.Context, option: click.Parameter, text: str | None) -> timedelta | None:
    """A time such as 12h, 7d, 4w; 0 is none."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,5})([hdw])|0", text)
    if not found:
        raise click.BadParameter(f"{text[:80]!r} is not a time such as 12h, 7d, 4w, or 0", param=option)
    return timedelta(**{_UNITS[found[2]]: int(found[1])}) if found[2] else timedelta()


@click.command()
@click.option(
    "--after", metavar="SPAN", callback=_span, help="Erase what was deleted so long ago (default: compact.after_days)."
)
@click.option(
    "--vacuum",
    metavar="SPAN",
    callback=_span,
    help="Also remove what only versions of the tables need that were replaced so long ago, with the headers of erased "
    "instances in them. These versions can no longer be asked (as of, snapshots).",
)
@click.option("--dry-run", is_flag=True, help="Change nothing, say what would go.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
@click.pass_context
def compact(
    ctx: click.Context, after: timedelta | None, vacuum: timedelta | None, dry_run: bool, as_json: bool
) -> None:
    """Erase the bytes of what was deleted a while ago. It cannot be undone, and `sphere undelete` refuses it.

    Bundles are written anew without them and put in the place of the old ones; no other instance moves. They stay
    deleted: what comes again with their UIDs is refused. Safe to interrupt and to repeat. What could not be done is
    named, and the exit status is 1.

    \b
    Examples:
      sphere compact --dry-run
      sphere compact
      sphere compact --after 0 --vacuum 30d
    """
    from sphere.archive import Archive
    from sphere.jobs.progress import step_bar

    archive = Archive(load_archive(ctx.obj))
    with step_bar() as on_step:
        report = archive.compact(after=after, dry_run=dry_run, vacuum=vacuum, on_step=on_step)
    for where, why in report.failures.items():
        click.echo(why if where in why else f"{where}: {why}", err=True)
    click.echo(report.to_json() if as_json else str(report))
    sys.exit(1 if report.failures else 0)

"""`sphere cohort`: named lists of studies, series or patients that a researcher can be granted."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, cast

import click

from sphere.conf.loading import load_archive

if TYPE_CHECKING:
    from sphere.catalog.cohorts import Cohorts, Kind

COLUMNS = {"study": "StudyInstanceUID", "series": "SeriesInstanceUID", "patient": "PatientID"}


@click.group()
def cohort() -> None:
    """Named lists of studies, series or patients, for `sphere token create --role researcher --cohort`.

    \b
    Examples:
      sphere cohort create lungs studies.txt
      sphere cohort list
      sphere cohort delete lungs
    """


@cohort.command()
@click.argument("name")
@click.argument("file", type=click.File("r"))
@click.option("--of", "kind", type=click.Choice(list(COLUMNS)), default="study", show_default=True,
              help="What the lines name: StudyInstanceUIDs, SeriesInstanceUIDs or PatientIDs.")  # fmt: skip
@click.pass_context
def create(ctx: click.Context, name: str, file: IO[str], kind: str) -> None:
    """Make a cohort of the lines of FILE (- for standard input); one of that name is replaced.

    The list stays as it is: a study of it that gets further instances has them in the cohort too, a study that would
    match whatever the list was made by has not. A line that is a column's name is passed over, as CSV begins with one.

    \b
    Examples:
      sphere cohort create lungs studies.txt
      sphere sql "SELECT StudyInstanceUID FROM studies WHERE StudyDescription LIKE '%LUNG%'" --format csv \\
        | sphere cohort create lungs -
      sphere cohort create trial patients.txt --of patient
    """
    lines = [line.strip() for line in file if line.strip() not in COLUMNS.values()]
    made = _cohorts(ctx).create(name, cast("Kind", kind), lines, file.name)
    click.echo(f"{made.name}: {len(made.members)} of {made.kind}")


@cohort.command("list")
@click.pass_context
def list_(ctx: click.Context) -> None:
    """Every cohort: its name, what it lists and how many, when it was made and of what.

    \b
    Example:
      sphere cohort list
    """
    for one in _cohorts(ctx).all():
        click.echo(f"{one.name}  {len(one.members)} of {one.kind}  made {one.made} of {one.origin}")


@cohort.command()
@click.argument("name")
@click.pass_context
def delete(ctx: click.Context, name: str) -> None:
    """Forget a cohort; who was granted it sees nothing of it any more, within seconds.

    \b
    Example:
      sphere cohort delete lungs
    """
    _cohorts(ctx).delete(name)
    click.echo(f"{name} is no cohort any more")


def _cohorts(ctx: click.Context) -> Cohorts:
    from sphere.catalog.cohorts import Cohorts
    from sphere.ingest.storage import open_storage

    settings = load_archive(ctx.obj)
    return Cohorts(open_storage(settings.storage.root, user=settings.storage.user))

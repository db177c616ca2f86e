"""`sphere annotate`: files linked to studies, series and instances, of this archive or of a server."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pyarrow as pa

from sphere.caller import who_calls
from sphere.conf.errors import NotThere, SettingsError, SphereError
from sphere.conf.loading import load_archive
from sphere.option_values import check_uid
from sphere.output import Format, format_options, write_rows

if TYPE_CHECKING:
    from sphere.annotating import Annotating

SHOWN = ("id", "version", "level", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "type", "author", "name",
         "media_type", "size", "at")  # fmt: skip
LEVELS = click.Choice(["study", "series", "instance"])
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group()
@click.option("--server", default="", metavar="URL", help="Ask this server (http://HOST:PORT), not the archive itself.")
@click.option("--token", default="", envvar="SPHERE_TOKEN", help="Token for the server (default: $SPHERE_TOKEN).")
@click.pass_context
def annotate(ctx: click.Context, server: str, token: str) -> None:
    """Link files of any type to studies, series and instances.

    \b
    Examples:
      sphere annotate add mask.nii.gz --uid 1.2.3 --type mask
      sphere annotate list --uid 1.2.3
      sphere annotate --server https://pacs:8080 get 1f2e... -o mask.nii.gz
    """
    ctx.meta["server"] = server, token


@annotate.command()
@click.argument("file", type=FILE)
@click.option("--uid", required=True, callback=check_uid, help="Of the study, series or instance.")
@click.option("--level", type=LEVELS, help="What the UID is of; needed with --allow-unknown.")
@click.option("--allow-unknown", is_flag=True, help="Also where the archive does not have it.")
@click.option("--type", default="", help="What kind of annotation it is.")
@click.option("--author", help="Whom it is by (default: who calls).")
@click.option("--name", help="What the file is called (default: its name).")
@click.option("--media-type", default="application/octet-stream", show_default=True, help="Its media type.")
@click.option("--description", default="", help="Free text.")
@click.pass_context
def add(
    ctx: click.Context, /, file: Path, uid: str, level: str | None, allow_unknown: bool, media_type: str, **said: Any
) -> None:
    """Link a file, and print the id of the annotation.

    \b
    Example:
      sphere annotate add report.pdf --uid 1.2.3 --type report --media-type application/pdf
    """
    said = {"name": file.name, **{name: value for name, value in said.items() if value}}
    with _annotating(ctx) as there:
        made = there.add(file, uid, level or "", allow_unknown=allow_unknown, media_type=media_type, said=said)
    click.echo(made["id"])


@annotate.command("list")
@click.option("--uid", default="", callback=check_uid,
              help="Of a study, series or instance: what is linked to it or to something in it.")  # fmt: skip
@click.option("--level", type=LEVELS, help="Linked to one of these only.")
@click.option("--type", default="", help="Of this type only.")
@click.option("--author", default="", help="By this author only.")
@click.option("--limit", type=click.IntRange(min=1, max=1000), default=1000, show_default=True, help="At most so many.")
@format_options
@click.pass_context
def list_(ctx: click.Context, /, format_: Format, output: Path | None, level: str | None, **asked: Any) -> None:
    """List annotations, the oldest first.

    \b
    Example:
      sphere annotate list --uid 1.2.3 --type mask --format json
    """
    with _annotating(ctx) as there:
        rows = there.find(level=level or "", **asked)
    columns = {name: [row.get(name) for row in rows] for name in SHOWN}
    integers = ("version", "size")
    arrays = {name: pa.array(v, pa.int64() if name in integers else pa.string()) for name, v in columns.items()}
    write_rows(pa.table(arrays), format=format_, output=output)


@annotate.command()
@click.argument("id")
@click.option("--version", type=click.IntRange(min=1), help="An earlier version (default: the newest).")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write (default: what it is called).")
@click.pass_context
def get(ctx: click.Context, id: str, version: int | None, output: Path | None) -> None:
    """Write the file of an annotation, checked against the digest that was recorded.

    \b
    Example:
      sphere annotate get 1f2e3d4c5b6a79880f1e2d3c4b5a6978 -o mask.nii.gz
    """
    with _annotating(ctx) as there:
        row = there.describe(id, version)
        path = output or Path(row["name"])
        if output is None and path.exists():
            raise SettingsError(f"{path} exists already; name another file with -o")
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        digest = hashlib.sha256()
        try:
            with partial.open("wb") as file:
                for piece in there.read(row):
                    digest.update(piece)
                    file.write(piece)
            if digest.hexdigest() != row["sha256"]:
                raise SphereError(f"what came of {id} does not have the digest that was recorded; try again")
            partial.replace(path)
        except OSError as error:
            raise SettingsError(f"{path} cannot be written: {error.strerror}") from None
        finally:
            partial.unlink(missing_ok=True)
    click.echo(f"{path}: version {row['version']}, {row['size']} bytes")


@annotate.command()
@click.argument("id")
@click.argument("file", type=FILE)
@click.option("--onto", type=click.IntRange(min=1), help="Only if this is the newest version.")
@click.option("--media-type", default="application/octet-stream", show_default=True, help="Its media type.")
@click.option("--description", default="", help="Free text (default: as before).")
@click.pass_context
def version(ctx: click.Context, id: str, file: Path, onto: int | None, media_type: str, description: str) -> None:
    """Give an annotation a new version; those before stay in its history.

    \b
    Example:
      sphere annotate version 1f2e3d4c5b6a79880f1e2d3c4b5a6978 mask.nii.gz --onto 1
    """
    said = {"description": description} if description else {}
    with _annotating(ctx) as there:
        made = there.change(id, file, onto, media_type=media_type, said=said)
    click.echo(f"{made['id']} is at version {made['version']}")


@annotate.command()
@click.argument("id")
@click.option("--onto", type=click.IntRange(min=1), help="Only if this is the newest version.")
@click.pass_context
def delete(ctx: click.Context, id: str, onto: int | None) -> None:
    """Show an annotation no more; its versions can still be had by their numbers.

    \b
    Example:
      sphere annotate delete 1f2e3d4c5b6a79880f1e2d3c4b5a6978
    """
    with _annotating(ctx) as there:
        there.delete(id, onto)
    click.echo(f"{id} is listed no more")


@contextmanager
def _annotating(ctx: click.Context) -> Iterator[Annotating]:
    from sphere.annotating import Here, There

    server, token = ctx.meta["server"]
    one: Annotating = There(server, token) if server else Here(load_archive(ctx.obj), who_calls())
    try:
        yield one
    except FileNotFoundError as error:
        raise NotThere(str(error)) from None
    finally:
        one.close()

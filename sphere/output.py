"""How rows are shown: a table for people, csv, json or parquet for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar, get_args

import click
import orjson

if TYPE_CHECKING:  # the command line is read by every child of `sphere serve`, and is to stay small
    import pyarrow as pa

Format = Literal["table", "csv", "json", "parquet"]
Command = TypeVar("Command", bound=Callable[..., Any])


def format_options(command: Command) -> Command:
    """The options --format and -o of every verb that writes rows; they come as `format_` and `output`."""
    choice = click.Choice(list(get_args(Format)))
    file = click.Path(dir_okay=False, path_type=Path)
    command = click.option("-o", "--output", type=file, help="Write to this file.")(command)
    help_ = "How rows are written."
    return click.option("--format", "format_", type=choice, default="table", show_default=True, help=help_)(command)


def write_rows(table: pa.Table, *, format: Format, output: Path | None) -> None:
    """Write an Arrow table to a file, or to standard output where `output` is None.

    json is one array of objects; parquet needs `output` (click.UsageError otherwise).
    """
    if format == "parquet":
        if output is None:
            raise click.UsageError("--format parquet needs -o FILE")
        import pyarrow.parquet as pq

        pq.write_table(table, output)
        return
    text = {"table": as_table, "csv": as_csv, "json": as_json}[format](table)
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")


def as_csv(table: pa.Table) -> str:
    """RFC 4180 text with a header line; lists as JSON, nulls empty."""
    stream: IO[str] = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(table.column_names)
    writer.writerows([_plain(value) for value in row.values()] for row in table.to_pylist())
    stream.seek(0)
    return stream.read()


def as_json(table: pa.Table) -> str:
    """A JSON array of objects, one a row; dates and times as RFC 3339 text."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
    return orjson.dumps(table.to_pylist(), default=str, option=options).decode()


def as_table(table: pa.Table) -> str:
    """A table of text, as wide as it needs to be, with the number of rows under it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in table.column_names:
        grid.add_column(Text(name), overflow="fold")
    for row in table.to_pylist():
        grid.add_row(*(Text(printable(_plain(value), keep="\n\t")) for value in row.values()))
    console = Console(file=io.StringIO(), width=10_000, color_system=None)
    console.print(grid)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    count = f"({table.num_rows} row{'' if table.num_rows == 1 else 's'})"
    return "\n".join([*lines, count]) + "\n"


def printable(text: str, *, keep: str = "") -> str:
    """The text with escapes for what a terminal would obey instead of show; `keep` are control characters to leave."""
    return "".join(
        one if one.isprintable() or one in keep else one.encode("unicode_escape").decode("ascii") for one in text
    )


class PathArgument(click.Path):
    """A path that may be anything but empty, which Python takes for the current folder; it is given as a `Path`."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in ("", b""):
            self.fail("is empty", param, ctx)
        return super().convert(value, param, ctx)


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | dict):
        return orjson.dumps(value, default=str).decode()
    return str(value)

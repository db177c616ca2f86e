"""How rows are shown: a table for people, csv, json or parquet for programs."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date, datetime, time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar, get_args

import click
import orjson

from sphere.conf.errors import StatementError

if TYPE_CHECKING:  # the command line is read by every child of `sphere serve`, and is to stay small
    import pyarrow as pa

Format = Literal["table", "csv", "json", "parquet"]
Command = TypeVar("Command", bound=Callable[..., Any])


def format_options(command: Command) -> Command:
    """The options --format and -o of every verb that writes rows; they come as `format_` and `output`."""
    choice = click.Choice(list(get_args(Format)))
    file = click.Path(dir_okay=False, path_type=Path)
    command = click.option("-o", "--output", type=file, help="Write to this file.")(command)
    help_ = (
        "How rows are written. In json binary is base64, a map an object, decimals, NaN and Infinity are text; "
        "json and parquet want column names that differ."
    )
    return click.option("--format", "format_", type=choice, default="table", show_default=True, help=help_)(command)


def write_rows(table: pa.Table, *, format: Format, output: Path | None) -> None:
    """Write an Arrow table to a file, or to standard output where `output` is None.

    json is one array of objects; parquet needs `output` (click.UsageError otherwise). Raises StatementError where json
    or parquet would have columns of one name, of which readers see one.
    """
    if format in ("json", "parquet"):
        _check_names(table)
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
    """RFC 4180 text with a header line; lists, maps and structs as JSON, nulls empty."""
    stream: IO[str] = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(table.column_names)
    writer.writerows([_plain(value) for value in row] for row in _rows(table))
    stream.seek(0)
    return stream.read()


def as_json(table: pa.Table) -> str:
    """A JSON array of objects, one a row, values as `in_json` says."""
    rows = [dict(zip(table.column_names, row, strict=True)) for row in _rows(table)]
    return orjson.dumps(rows, option=orjson.OPT_INDENT_2 | _JSON).decode()


_JSON = orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE


def in_json(value: Any, type_: pa.DataType) -> Any:
    """A value of an Arrow table as JSON has it, nothing of it lost: bytes as base64, maps as objects, decimals and what
    JSON does not know (NaN, Infinity, spans) as text; dates and times are left, as orjson writes RFC 3339."""
    from pyarrow import types

    if value is None:
        return None
    if types.is_map(type_):
        return {_name(in_json(key, type_.key_type)): in_json(one, type_.item_type) for key, one in value}
    if types.is_struct(type_):
        return {field.name: in_json(value[field.name], field.type) for field in type_}
    if types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_):
        return [in_json(one, type_.value_type) for one in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, float):
        return value if math.isfinite(value) else {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
    return value if isinstance(value, bool | int | str | date | datetime | time) else str(value)


def _name(key: Any) -> str:
    """The key of a map as the name of a member."""
    return key if isinstance(key, str) else orjson.dumps(key, option=orjson.OPT_UTC_Z).decode().strip('"')


def _rows(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    """Its rows, by the places of columns: two may have one name."""
    columns = [[in_json(value, column.type) for value in column.to_pylist()] for column in table.columns]
    return zip(*columns, strict=True)


def _check_names(table: pa.Table) -> None:
    twice = [name for name, times in Counter(table.column_names).items() if times > 1]
    if twice:
        raise StatementError(f"several columns are called {', '.join(twice)}: give each a name of its own (AS)")


def as_table(table: pa.Table) -> str:
    """A table of text, as wide as it needs to be, with the number of rows under it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in table.column_names:
        grid.add_column(Text(name), overflow="fold")
    for row in _rows(table):
        grid.add_row(*(Text(printable(_plain(value), keep="\n\t")) for value in row))
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
        return orjson.dumps(value, option=orjson.OPT_UTC_Z).decode()
    return str(value)

"""`sphere echo PEER` and `sphere find [PEER]`: SPHERE as a service class user, or asked itself."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import click
import pyarrow as pa
from pydicom.dataset import Dataset

from sphere.catalog.arrow import strings
from sphere.catalog.query import Features, Model
from sphere.catalog.schema import Level
from sphere.conf.loading import load, load_archive
from sphere.finding import find_here, find_there, part_of
from sphere.option_values import check_as_of, check_timezone
from sphere.output import Format, format_options, write_rows
from sphere.peer_argument import Named, peer_argument

MODELS: dict[str, Model] = {
    "patient": "PATIENT_ROOT",
    "study": "STUDY_ROOT",
    "patient-study": "PATIENT_STUDY_ONLY",
}
SAME = (0x00080005, 0x00080052)  # SpecificCharacterSet (text is decoded), QueryRetrieveLevel (it was asked for)


@click.command()
@peer_argument()
@click.pass_context
def echo(ctx: click.Context, peer: Named) -> None:
    """Ask a peer whether it answers (C-ECHO).

    PEER is a name of [[peers]] in the settings, or AET@HOST:PORT.

    \b
    Examples:
      sphere echo ward
      sphere echo SPHERE@127.0.0.1:11112
      sphere echo PACS@pacs.example:2762 --tls --tls-ca hospital-ca.pem
    """
    from sphere.scp import client

    settings = load(ctx.obj)
    seconds = client.echo(peer.resolve(settings), settings=settings)
    click.echo(f"{peer} answered C-ECHO in {1000 * seconds:.0f} ms")


def name_failure(message: str) -> None:
    """One line on standard error; a bar on the terminal is drawn again below it."""
    click.echo(f"\r\x1b[K{message}" if sys.stderr.isatty() else message, err=True)


@click.command()
@peer_argument(required=False)
@click.option(
    "--level", type=click.Choice(get_args(Level)), default="STUDY", show_default=True, help="QueryRetrieveLevel."
)
@click.option(
    "--model",
    type=click.Choice(list(MODELS)),
    default="study",
    show_default=True,
    help="Patient Root, Study Root, or the retired Patient/Study Only.",
)
@click.option(
    "-k", "--key", "keys", multiple=True, metavar="KEYWORD[=VALUE]", help="Key to match or, without value, to be told."
)
@click.option("--relational", is_flag=True, help="Negotiate relational queries: no unique keys above the level needed.")
@click.option("--fuzzy", is_flag=True, help="Fuzzy person names: words in any order, spellings of one sound aside.")
@click.option("--combined", is_flag=True, help="Take a date and its time as one moment in ranges.")
@click.option(
    "--timezone",
    default="",
    metavar="&ZZXX",
    callback=check_timezone,
    help="Dates and times are meant, and shown, in this zone.",
)
@click.option("--as-of", metavar="VERSION|TIME", callback=check_as_of,
              help="Ask this archive's catalog as it was (no PEER).")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), help="Stop after so many answers.")
@click.option("--offset", type=click.IntRange(min=0), default=0, help="Pass over so many answers first.")
@format_options
@click.pass_context
def find(
    ctx: click.Context,
    peer: Named | None,
    level: Level,
    model: str,
    keys: tuple[str, ...],
    relational: bool,
    fuzzy: bool,
    combined: bool,
    timezone: str,
    as_of: str | None,
    limit: int | None,
    offset: int,
    format_: Format,
    output: Path | None,
) -> None:
    """Ask a peer what it has (C-FIND), or without PEER this archive itself, no server needed.

    PEER is a name of [[peers]] in the settings, or AET@HOST:PORT. Keys are keywords or tags (PatientID, 00100020),
    dotted inside sequences. This archive shows the usual attributes unless a key without value says which.

    \b
    Examples:
      sphere find ward -k PatientName='DOE*' -k StudyDate=20240101- -k StudyDescription
      sphere find -k PatientName='DOE*' --format csv -o studies.csv
      sphere find -k StudyDate=20240101- --offset 1000 --limit 100
      sphere find -k StudyDate=20240101- --as-of 2026-01-31T12:00:00Z
      sphere find ward --level SERIES -k StudyInstanceUID=1.2.3 -k Modality -k NumberOfSeriesRelatedInstances
    """
    settings = load_archive(ctx.obj) if peer is None else load(ctx.obj)
    wanted = split_keys(keys)
    features = Features(
        relational=relational,
        combined_datetime=combined,
        fuzzy_names=fuzzy,
        timezone_adjustment=bool(timezone),
    )
    answers: Iterator[Dataset]
    if peer is None:
        answers = find_here(settings, wanted, level=level, model=MODELS[model], features=features,
                            timezone=timezone, as_of=as_of)  # fmt: skip
    elif as_of is not None:
        raise click.UsageError("--as-of asks this archive itself: leave PEER out, or ask an AE title of [[snapshots]]")
    else:
        answers = find_there(peer.resolve(settings), wanted, settings=settings, level=level, model=MODELS[model],
                             features=features, timezone=timezone)  # fmt: skip
    found = list(part_of(answers, offset=offset, limit=limit))
    write_rows(answers_table(found), format=format_, output=output)


def split_keys(texts: Iterable[str]) -> dict[str, str]:
    """Keys that are each KEYWORD or KEYWORD=VALUE; raises UsageError for one that is given twice."""
    keys: dict[str, str] = {}
    for text in texts:
        keyword, _, value = text.partition("=")
        if keyword.strip() in keys:
            raise click.UsageError(f"{keyword.strip()} is given twice")
        keys[keyword.strip()] = value
    return keys


def answers_table(answers: Iterable[Dataset]) -> pa.Table:
    """One row an answer, one column of text a keyword, in the order of the tags, without what is the same for all."""
    rows = [
        {element.keyword or str(element.tag): text_of(element.value) for element in answer if element.tag not in SAME}
        for answer in answers
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: strings([row.get(name) for row in rows]) for name in names}
    return pa.table(columns)


def text_of(value: Any) -> str | None:
    """A value as one text, several separated by a backslash (PS3.5 6.2)."""
    if value is None:
        return None
    if isinstance(value, list | tuple) or type(value).__name__ == "MultiValue":
        return "\\".join(str(item) for item in value)
    return str(value)

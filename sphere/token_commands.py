"""`sphere token`: who may ask over HTTP."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, cast

import click

from sphere.conf.loading import load_archive

if TYPE_CHECKING:
    from sphere.catalog.cohorts import Cohorts
    from sphere.scp.web.tokens import Role, Tokens

UNITS = {"h": "hours", "d": "days", "w": "weeks"}


@click.group()
def token() -> None:
    """API tokens for DICOMweb: made here, shown once, kept as hashes only.

    \b
    Examples:
      sphere token create --role reader --name notebook --expires 30d
      sphere token create --role researcher --collection TRIAL-7 --name anna
      sphere token list
      sphere token revoke 1a2b3c4d
    """


@token.command()
@click.option(
    "--role", type=click.Choice(["researcher", "reader", "writer", "admin"]), required=True, help="What it may."
)
@click.option("--name", required=True, help="Whose it is; shown in the list and in audit records.")
@click.option("--expires", metavar="SPAN", default="90d", show_default=True, help="12h, 30d, 4w, or never.")
@click.option("--collection", "collections", multiple=True, help="That a researcher may see; may be given again.")
@click.option("--cohort", "cohorts", multiple=True, help="That a researcher may see (`sphere cohort list`).")
@click.pass_context
def create(
    ctx: click.Context, role: str, name: str, expires: str, collections: tuple[str, ...], cohorts: tuple[str, ...]
) -> None:
    """Make a token and print it; it cannot be shown again.

    A researcher sees the instances of the collections and cohorts named here, and answers are as if there were no
    others; a reader sees all.

    \b
    Examples:
      sphere token create --role reader --name notebook
      sphere token create --role writer --name gateway --expires never
      sphere token create --role researcher --collection TRIAL-7 --name anna --expires 30d
    """
    for cohort in cohorts:
        _cohorts(ctx).get(cohort)
    until = None if expires == "never" else datetime.now(timezone.utc) + _span(expires)
    kind = cast("Role", role)  # the choice has seen to it
    click.echo(_tokens(ctx).create(name, kind, until, collections=collections, cohorts=cohorts))


@token.command("list")
@click.pass_context
def list_(ctx: click.Context) -> None:
    """Every token: id, role, name, when it was made and when it expires.

    \b
    Example:
      sphere token list
    """
    now = datetime.now(timezone.utc)
    for one in _tokens(ctx).all():
        until = f"expired {one.expires}" if one.expired(now) else f"until {one.expires}" if one.expires else "for ever"
        sees = "".join(f", sees {name}" for name in (*one.collections, *one.cohorts))
        click.echo(f"{one.id}  {one.role:6}  {one.name}  made {one.created}, {until}{sees}")


@token.command()
@click.argument("id")
@click.pass_context
def revoke(ctx: click.Context, id: str) -> None:
    """Take a token back; servers know within seconds.

    \b
    Example:
      sphere token revoke 1a2b3c4d
    """
    gone = _tokens(ctx).revoke(id)
    click.echo(f"{gone.id} ({gone.name}) opens nothing any more")


def _tokens(ctx: click.Context) -> Tokens:
    from sphere.ingest.storage import open_storage
    from sphere.scp.web.tokens import Tokens

    settings = load_archive(ctx.obj)
    return Tokens(open_storage(settings.storage.root, user=settings.storage.user))


def _cohorts(ctx: click.Context) -> Cohorts:
    from sphere.catalog.cohorts import Cohorts
    from sphere.ingest.storage import open_storage

    settings = load_archive(ctx.obj)
    return Cohorts(open_storage(settings.storage.root, user=settings.storage.user))


def _span(text: str) -> timedelta:
    found = re.fullmatch(r"([0-9]{1,5})([hdw])", text)
    if not found or not int(found[1]):
        raise click.UsageError("--expires: a span is 12h, 30d, 4w, or never")
    return timedelta(**{UNITS[found[2]]: int(found[1])})

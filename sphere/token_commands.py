"""`sphere token`: who may ask over HTTP."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

import click

from sphere.conf.settings import load

if TYPE_CHECKING:
    from sphere.scp.web.tokens import Tokens

UNITS = {"h": "hours", "d": "days", "w": "weeks"}


@click.group()
def token() -> None:
    """API tokens for DICOMweb: made here, shown once, kept as hashes only.

    \b
    Examples:
      sphere token create --role reader --name notebook --expires 30d
      sphere token list
      sphere token revoke 1a2b3c4d
    """


@token.command()
@click.option("--role", type=click.Choice(["reader", "writer", "admin"]), required=True, help="What it may.")
@click.option("--name", required=True, help="Whose it is; shown in the list and in audit records.")
@click.option("--expires", metavar="SPAN", default="90d", show_default=True, help="12h, 30d, 4w, or never.")
@click.pass_context
def create(ctx: click.Context, role: str, name: str, expires: str) -> None:
    """Make a token and print it; it cannot be shown again.

    \b
    Examples:
      sphere token create --role reader --name notebook
      sphere token create --role writer --name gateway --expires never
    """
    until = None if expires == "never" else datetime.now(timezone.utc) + _span(expires)
    click.echo(_tokens(ctx).create(name, role, until))  # type: ignore[arg-type]  # the choice has seen to it


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
        click.echo(f"{one.id}  {one.role:6}  {one.name}  made {one.created}, {until}")


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

    settings = load(ctx.obj)
    return Tokens(open_storage(settings.storage.root, user=settings.storage.user))


def _span(text: str) -> timedelta:
    found = re.fullmatch(r"([0-9]{1,5})([hdw])", text)
    if not found or not int(found[1]):
        raise click.UsageError("--expires: a span is 12h, 30d, 4w, or never")
    return timedelta(**{UNITS[found[2]]: int(found[1])})

"""Values of options that are wrong by themselves: callbacks for click, which ends with exit status 2 then."""

from __future__ import annotations

import re

import click

from sphere.conf.uids import UID

_AE_TITLE = re.compile(r"[\x20-\x5b\x5d-\x7e]{0,15}[\x21-\x5b\x5d-\x7e]")


def check_uids(_: click.Context, option: click.Parameter, uids: tuple[str, ...]) -> tuple[str, ...]:
    """UIDs, each given by itself (PS3.5 9.1)."""
    for uid in uids:
        if not UID.fullmatch(uid):
            raise click.BadParameter(f"{uid[:80]!r} is not a UID (PS3.5 9.1)", param=option)
    return uids


def check_uid(ctx: click.Context, option: click.Parameter, uid: str) -> str:
    """One UID, or nothing."""
    check_uids(ctx, option, (uid,) if uid else ())
    return uid


def check_ae_title(_: click.Context, option: click.Parameter, title: str) -> str:
    """An application entity title (PS3.5 6.2, AE)."""
    if not _AE_TITLE.fullmatch(title):
        raise click.BadParameter(f"{title[:80]!r} is not an AE title: 1 to 16 characters of ASCII", param=option)
    return title


def check_timezone(_: click.Context, option: click.Parameter, text: str) -> str:
    """An offset from UTC, or nothing (PS3.3 C.12.1.1.8)."""
    from sphere.catalog.zones import minutes_of

    if text and minutes_of(text) is None:
        raise click.BadParameter(f"{text[:80]!r} is not an offset from UTC such as +0100", param=option)
    return text


def check_as_of(_: click.Context, option: click.Parameter, text: str | None) -> str | None:
    """A version of the catalog, or a time."""
    from sphere.catalog.asof import parse_as_of
    from sphere.conf.errors import QueryError

    if text is not None:
        try:
            parse_as_of(text)
        except QueryError as error:
            raise click.BadParameter(str(error), param=option) from None
    return text

"""`sphere peers`: the peers of the settings, and what each answers to C-ECHO."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click
import orjson
import pyarrow as pa

from sphere.conf.loading import load
from sphere.output import as_table

if TYPE_CHECKING:
    from sphere.scp.client.echoes import Echo


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON array instead of a table.")
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=10.0, show_default=True, metavar="S",
    help="Seconds that a peer has to connect, and to answer.",
)  # fmt: skip
@click.pass_context
def peers(ctx: click.Context, as_json: bool, timeout: float) -> None:
    """List the peers of the settings, and what each answers to C-ECHO.

    All are asked at the same time. The exit status is 1 if one did not answer.

    \b
    Examples:
      sphere peers
      sphere peers --json --timeout 2
    """
    settings = load(ctx.obj)
    from sphere.scp.client.echoes import echo_all

    asked = [_row(one) for one in echo_all(settings, timeout_s=timeout)]
    if as_json:
        click.echo(orjson.dumps(asked, option=orjson.OPT_INDENT_2).decode())
    else:
        click.echo(as_table(pa.Table.from_pylist([_shown(one) for one in asked], schema=_SHOWN)), nl=False)
    sys.exit(0 if all(one["answered"] for one in asked) else 1)


_COLUMNS = ("name", "ae_title", "address", "tls", "transfer_syntaxes", "may", "C-ECHO")
_SHOWN = pa.schema([(name, pa.string()) for name in _COLUMNS])


def _row(one: Echo) -> dict[str, Any]:
    peer = one.peer
    return {
        "name": peer.name,
        "ae_title": peer.ae_title,
        "host": peer.host,
        "port": peer.port,
        "tls": peer.tls,
        "transfer_syntaxes": list(peer.transfer_syntaxes),
        "may": list(peer.may),
        "answered": one.ms is not None,
        "ms": one.ms,
        "error": one.error,
    }


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    host = f"[{row['host']}]" if ":" in row["host"] else row["host"]
    return {
        "name": row["name"],
        "ae_title": row["ae_title"],
        "address": f"{host}:{row['port']}",
        "tls": "yes" if row["tls"] else "no",
        "transfer_syntaxes": ", ".join(row["transfer_syntaxes"]) or "as it lies",
        "may": ", ".join(row["may"]) or "nothing",
        "C-ECHO": f"{row['ms']:.0f} ms" if row["answered"] else row["error"],
    }

"""PEER of the command line: a name of the settings or AET@HOST:PORT, and how it is to be called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from sphere.conf.peers import Peer
from sphere.conf.settings import Settings

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class Named:
    """A peer as the command line names it; `options` go over what the settings say of it."""

    name: str
    options: Mapping[str, Any]

    def resolve(self, settings: Settings) -> Peer:
        """The peer; raises SettingsError for a name that is not known."""
        from sphere.scp.peers import resolve

        return resolve(self.name, settings).model_copy(update=dict(self.options))

    def __str__(self) -> str:
        return self.name


def peer_argument(*, required: bool = True) -> Callable[[Command], Command]:
    """The argument PEER and the options --tls, --tls-ca, --tls-verify; they come as `peer`, a Named, or None."""
    return functools.partial(_decorated, required=required)


def _decorated(command: Command, *, required: bool) -> Command:
    @click.argument("peer", metavar="PEER" if required else "[PEER]", required=required)
    @click.option("--tls", is_flag=True, help="Call the peer with TLS; so do the next two.")
    @click.option(
        "--tls-ca",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="CAs of its certificate, in PEM.",
    )
    @click.option(
        "--tls-verify",
        type=click.Choice(["name", "ca", "none"]),
        help="What is checked of its certificate: CA and host name, the CA alone, nothing.",
    )
    @functools.wraps(command)
    def wrapped(
        *args: Any, peer: str | None, tls: bool, tls_ca: Path | None, tls_verify: str | None, **kwargs: Any
    ) -> Any:
        options: dict[str, Any] = {"tls": True} if tls or tls_ca or tls_verify else {}
        options |= {"tls_ca": str(tls_ca.resolve())} if tls_ca else {}
        options |= {"tls_verify": tls_verify} if tls_verify else {}
        return command(*args, peer=None if peer is None else Named(peer, options), **kwargs)  # fmt: skip

    return wrapped  # type: ignore[return-value]

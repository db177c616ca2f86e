"""The fuzz targets by name: each takes any bytes and returns, or has found a bug."""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz import dimse, landing, store, web

TARGETS: dict[str, Callable[[bytes], None]] = {
    "pdus": dimse.pdus,
    "commands": dimse.commands,
    "identifiers": dimse.identifiers,
    "headers": landing.headers,
    "bundles": landing.bundles,
    "multipart": web.multipart,
    "metadata": store.metadata,
    "parameters": web.parameters,
}
TRACED = ("metadata",)  # that bound the memory of each input

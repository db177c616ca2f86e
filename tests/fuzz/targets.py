"""The fuzz targets by name: each takes any bytes and returns, or has found a bug."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Final, cast

MODULES: Final[Mapping[str, str]] = {
    "pdus": "dimse",
    "commands": "dimse",
    "identifiers": "dimse",
    "headers": "landing",
    "bundles": "landing",
    "multipart": "web",
    "metadata": "store",
    "parameters": "web",
}
"""Where each is; who fuzzes loads no other, as code that is to be instrumented takes seconds to load."""
TRACED = ("metadata",)  # that bound the memory of each input


def target(name: str) -> Callable[[bytes], None]:
    return cast("Callable[[bytes], None]", getattr(import_module(f"tests.fuzz.{MODULES[name]}"), name))

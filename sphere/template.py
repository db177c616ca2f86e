"""The commented sphere.toml of `sphere init` and the settings of the user guide, both from one list of keys."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
from pydantic_core import PydanticUndefined

from sphere.conf.settings import LISTS, documented_keys

EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "peers": {"name": "ward", "ae_title": "WARD", "host": "10.0.0.5", "port": 104},
    "rules": {
        "name": "trial",
        "calling_ae": "CT*",
        "keys": {"PatientID": "TRIAL*"},
        "action": "tag",
        "collection": "trial",
    },
    "forwards": {"name": "trial-to-ward", "to": "ward", "collection": "trial"},
    "snapshots": {"ae_title": "SPHERE_2026", "as_of": "2026-01-01T00:00:00Z"},
}
_INTRODUCTIONS: Mapping[str, str] = {
    "peers": "# Who may talk to this archive, and whom it talks to: one such table a peer.",
    "rules": "# What is accepted, refused, or catalogued in collections: one such table a rule, in their order.",
    "forwards": "# What is sent on to a peer once it is catalogued: one such table a destination.",
    "snapshots": "# AE titles that answer from an earlier state of the catalog: one such table a state.",
}


def render(values: Mapping[str, Any]) -> str:
    """A whole settings file: keys of `values` (dotted) set, every other key commented out at its default."""
    lines = ["# SPHERE settings. A line that begins with # shows the default; take the # away to change it.", ""]
    section = ""
    for key, field in documented_keys():
        table, _, name = key.partition(".")
        if table != section:
            section = table
            lines += ["", _INTRODUCTIONS[table], f"# [[{table}]]"] if table in LISTS else [f"[{table}]"]
        lines += textwrap.wrap(field.description, 110, initial_indent="# ", subsequent_indent="# ")
        if name in EXAMPLES.get(table, ()):
            lines.append(f"# {name} = {_toml(EXAMPLES[table][name])}")
        elif key in values:
            lines.append(f"{name} = {_toml(values[key])}")
        else:
            lines.append(f"# {name} = {_toml(default_of(field))}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def default_of(field: Any) -> Any:
    """The default of a settings field, None where the key must be given."""
    default = field.get_default(call_default_factory=True)
    return None if default is PydanticUndefined else default


def markdown() -> str:
    """The settings as a table for the user guide."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key, field in documented_keys():
        default = default_of(field)
        shown = "(required)" if default is None else f"`{_toml(default)}`"
        rows.append(f"| `{key}` | {shown} | {field.description} |")
    return "\n".join(rows) + "\n"


def _toml(value: Any) -> str:
    """A TOML value; JSON's strings, numbers and booleans are TOML's too."""
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{orjson.dumps(k).decode()} = {_toml(v)}" for k, v in value.items()) + "}"
    return orjson.dumps(value).decode()


if __name__ == "__main__":
    print(markdown(), end="")

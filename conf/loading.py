"""Settings, read once at the edge: where they come from, what is wrong with them, and relative paths made absolute.

Sources, later ones win: the defaults of sphere.conf.settings, the TOML file (``--config``, else ``SPHERE_CONFIG``, else
``./sphere.toml``), then variables ``SPHERE_<SECTION>__<KEY>`` (``SPHERE_DIMSE__PORT=104``).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import ValidationError

from sphere.conf import toml
from sphere.conf.errors import SettingsError
from sphere.conf.peers import Peer
from sphere.conf.settings import LISTS, Dimse, Settings, Web, documented_keys

ROOT_VARIABLE = "SPHERE_STORAGE__ROOT"
"""The variable that names an archive where there is no settings file."""


def load(config: Path | None = None, *, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read, merge and validate the settings.

    Raises SettingsError when the file is missing or not TOML, or a key is unknown or has a bad value.
    """
    path = _find(config, environ)
    data = _read(path)
    variables = _overlay(data, environ)
    settings = _validate(data, path, variables)
    try:
        return _resolve(settings, path.parent.resolve() if path else Path.cwd())
    except SettingsError as error:
        raise SettingsError(f"{path or 'the settings'}: {error}") from None


def load_archive(config: Path | None = None, *, environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings of an archive: as `load`, but raises SettingsError where neither a settings file nor the variable
    SPHERE_STORAGE__ROOT says which one. The defaults alone would be a new one in the current folder."""
    if _find(config, environ) is None and not environ.get(ROOT_VARIABLE):
        raise SettingsError(
            f"which archive? There is no sphere.toml in {Path.cwd()}: name the settings of one with --config FILE, "
            f"before the verb, or SPHERE_CONFIG, or its storage with {ROOT_VARIABLE}; `sphere init DIR` makes one"
        )
    return load(config, environ=environ)


def from_dict(data: Mapping[str, Any], *, base: Path) -> Settings:
    """Settings from nested tables, relative paths taken from `base` (an absolute folder)."""
    return _resolve(_validate(dict(data), None), base)


def _find(config: Path | None, environ: Mapping[str, str]) -> Path | None:
    if config is not None:
        return config
    if named := environ.get("SPHERE_CONFIG"):
        return Path(named)
    default = Path("sphere.toml")
    return default if default.exists() else None


def _read(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        data: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8-sig"))
        return data
    except FileNotFoundError:
        raise SettingsError(f"settings file {path} does not exist; `sphere init DIR` makes one") from None
    except OSError as error:
        raise SettingsError(f"settings file {path} cannot be read: {error.strerror}") from None
    except (toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"settings file {path} is not valid TOML: {error}") from None
    except RecursionError:
        raise SettingsError(f"settings file {path} cannot be read: values within values, too deep") from None


def _overlay(data: dict[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """Put SPHERE_<SECTION>__<KEY> variables over the file; returns which variable set what."""
    variables: dict[str, str] = {}
    for name, value in environ.items():
        if not name.startswith("SPHERE_") or "__" not in name:
            continue
        section, _, key = name[len("SPHERE_") :].lower().partition("__")
        if section in LISTS:
            raise SettingsError(f"variable {name}: [[{section}]] is a list and cannot be set by a variable")
        variables[f"{section}.{key}"] = name
        if section not in data:
            variables[section] = name
        table = data.setdefault(section, {})
        if isinstance(table, dict):  # anything else is told of the file
            table[key] = value
    return variables


def _validate(data: Mapping[str, Any], path: Path | None, variables: Mapping[str, str] | None = None) -> Settings:
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        where = str(path) if path else "the settings"
        raise SettingsError("; ".join(_explain(item, where, variables or {}) for item in error.errors())) from None


def _explain(item: Any, where: str, variables: Mapping[str, str]) -> str:
    """One line for one pydantic error: key, the file or variable it is from, and what would be right."""
    parts = [str(part) for part in item["loc"]]
    key = ".".join(parts)
    if variable := variables.get(".".join(parts[:2])):
        where = f"variable {variable}"
    if key in LISTS:
        return f"{where}: {key}: is a list of tables, each under a line [[{key}]]"
    if key in Settings.model_fields and not isinstance(item.get("input"), Mapping):
        return f"{where}: {key}: is a table, under a line [{key}]"
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}; the nearest known key is {nearest_key(key)!r}"
    return f"{where}: {key}: {item['msg'].removeprefix('Value error, ')} (got {item.get('input')!r})"


def nearest_key(key: str) -> str:
    """The known dotted key that looks most like `key`."""
    known = [name for name, _ in documented_keys()] + list(Settings.model_fields)
    plain = ".".join(part for part in key.split(".") if not part.isdigit())
    return max(known, key=lambda name: difflib.SequenceMatcher(None, plain, name).ratio())


def _resolve(settings: Settings, base: Path) -> Settings:
    """Make relative paths absolute, seen from the folder of the settings file."""
    titles = [settings.archive.ae_title, *(snapshot.ae_title for snapshot in settings.snapshots)]
    if len(set(titles)) != len(titles):
        raise SettingsError("snapshots: each ae_title may stand once only, and not be that of the archive")
    names = [peer.name for peer in settings.peers]
    if len(set(names)) != len(names):
        raise SettingsError("peers: each name may stand once only")
    _check_peer_names(settings, names)
    dimse = settings.dimse.model_copy(update=_files(settings.dimse, base))
    web = settings.web.model_copy(update=_files(settings.web, base))
    peers = tuple(peer.model_copy(update=_files(peer, base)) for peer in settings.peers)
    archive = settings.archive.model_copy(update={"state_dir": base / settings.archive.state_dir})
    storage = settings.storage.model_copy(update={"root": _absolute(settings.storage.root, base)})
    ingest = settings.ingest.model_copy(update={"spool_dir": base / settings.ingest.spool_dir})
    catalog = settings.catalog.model_copy(
        update={"root": _absolute(settings.catalog.root, base) if settings.catalog.root else ""}
    )
    resolved = settings.model_copy(
        update={
            "archive": archive,
            "storage": storage,
            "catalog": catalog,
            "ingest": ingest,
            "dimse": dimse,
            "web": web,
            "peers": peers,
        }
    )
    if web.oidc_jwks and not (web.oidc_issuer and web.oidc_audience):
        raise SettingsError("web.oidc_jwks needs web.oidc_issuer and web.oidc_audience too")
    if set("[]") & set(unquote(urlsplit(resolved.catalog_root).path)):
        raise SettingsError(
            f"catalog.root: Delta tables cannot be read below a folder with [ or ] in its name: {resolved.catalog_root}"
        )
    if urlsplit(resolved.catalog_root).scheme == "webhdfs":
        raise SettingsError(
            "catalog.root: Delta tables cannot be read over webhdfs://; set catalog.root to file:/// or hdfs://"
        )
    return resolved


def _files(section: Dimse | Web | Peer, base: Path) -> dict[str, str]:
    """Its files of certificates and keys, those that are given, seen from `base`."""
    values = ((name, getattr(section, name, "")) for name in ("tls_certificate", "tls_key", "tls_ca", "oidc_jwks"))
    return {name: str(base / value) for name, value in values if value and "://" not in value}


def _check_peer_names(settings: Settings, names: list[str]) -> None:
    """Raise SettingsError where a rule or a forward names a peer that there is not."""
    named = [(f"rules.{number}.peer", name) for number, rule in enumerate(settings.rules) for name in rule.peer]
    for number, forward in enumerate(settings.forwards):
        named += [(f"forwards.{number}.to", forward.to), *((f"forwards.{number}.peer", name) for name in forward.peer)]
    for key, name in named:
        if name not in names:
            known = ", ".join(names) or "none"
            raise SettingsError(f"{key}: no peer is called {name!r} (known: {known})")
    forwards = [forward.name for forward in settings.forwards]
    if len(set(forwards)) != len(forwards):
        raise SettingsError("forwards: each name may stand once only")


def _absolute(url: str, base: Path) -> str:
    """file:PATH and file://PATH, %-encoded as URLs are, become file:///ABSOLUTE seen from `base`; other URLs stay."""
    if not url.startswith("file:"):
        return url
    path = unquote(url.removeprefix("file://").removeprefix("file:"))
    return (base / path).resolve().as_uri()

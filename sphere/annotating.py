"""What `sphere annotate` asks: this archive itself, or a server over HTTP. Rows are those of `GET /annotations`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import requests

from sphere.catalog.annotations import About, Annotations, Draft, Target, Version, level_named, locate
from sphere.catalog.queries import open_queries
from sphere.conf.errors import BadRequest, NotThere, Overtaken, PeerError, SettingsError, SphereError, TooLarge
from sphere.conf.settings import Settings
from sphere.conf.uids import UID

PIECE = 1 << 20
TIMEOUT_S = (10.0, 120.0)  # to connect, and between two reads of an answer
_ERRORS: Mapping[int, type[SphereError]] = {400: BadRequest, 404: NotThere, 409: Overtaken, 413: TooLarge}
_ID = re.compile(r"[0-9a-f]{32}")

Row = dict[str, Any]


class Annotating(Protocol):
    """Either of the two."""

    def add(
        self, file: Path, uid: str, level: str, *, allow_unknown: bool, media_type: str, said: Mapping[str, str]
    ) -> Row:
        """Link a file."""

    def find(self, *, uid: str, level: str, type: str, author: str, limit: int) -> list[Row]:
        """What is linked."""

    def describe(self, id: str, version: int | None) -> Row:
        """A version, by default the newest; raises NotThere."""

    def read(self, row: Row) -> Iterator[bytes]:
        """The bytes of what `describe` gave."""

    def change(self, id: str, file: Path, onto: int | None, *, media_type: str, said: Mapping[str, str]) -> Row:
        """A new version."""

    def delete(self, id: str, onto: int | None) -> None:
        """Show it no more."""

    def close(self) -> None:
        """Let go of what was opened."""


class Here:
    """This archive; `who` is told in its records."""

    def __init__(self, settings: Settings, who: str) -> None:
        self._settings, self._who = settings, who
        self._annotations = Annotations(settings)

    def add(
        self, file: Path, uid: str, level: str, *, allow_unknown: bool, media_type: str, said: Mapping[str, str]
    ) -> Row:
        target = self._target(uid, level, allow_unknown=allow_unknown)
        about = About(**said, media_type=media_type)
        return _row(self._stored(self._annotations.begin(about, made_by=self._who), file, target))

    def find(self, *, uid: str, level: str, type: str, author: str, limit: int) -> list[Row]:
        found, _ = self._annotations.find(uid=uid, level=level_named(level), type=type, author=author, limit=limit)
        return [_row(one) for one in found]

    def describe(self, id: str, version: int | None) -> Row:
        return _row(self._annotations.version(id, version))

    def read(self, row: Row) -> Iterator[bytes]:
        return self._annotations.read(self._annotations.version(row["id"], row["version"]))

    def change(self, id: str, file: Path, onto: int | None, *, media_type: str, said: Mapping[str, str]) -> Row:
        about = About(**said, media_type=media_type)
        return _row(self._stored(self._annotations.begin_version(id, about, made_by=self._who, onto=onto), file, None))

    def delete(self, id: str, onto: int | None) -> None:
        self._annotations.delete(id, made_by=self._who, onto=onto)

    def close(self) -> None:
        self._annotations.close()

    def _stored(self, draft: Draft, file: Path, target: Target | None) -> Version:
        try:
            with file.open("rb") as source:
                while piece := source.read(PIECE):
                    draft.write(piece)
            return draft.commit(target)
        finally:
            draft.discard()

    def _target(self, uid: str, level: str, *, allow_unknown: bool) -> Target:
        if not UID.fullmatch(uid):
            raise BadRequest("--uid is not a UID (PS3.5 9.1)")
        named = level_named(level)
        with open_queries(self._settings) as queries:
            found = locate(queries, uid, named)
        if found is None and not allow_unknown:
            raise NotThere(
                f"the archive has no {level or 'study, series or instance'} {uid}; --allow-unknown links all"
            )
        if found is None and named is None:
            raise BadRequest("--allow-unknown needs --level")
        return found or Target.unknown(named or "STUDY", uid)


class There:
    """A server at a URL."""

    def __init__(self, url: str, token: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise SettingsError("--server is a URL: http://HOST:PORT or https://HOST:PORT")
        self._url = f"{url.rstrip('/')}/annotations"
        self._session = requests.Session()
        if token:
            self._session.headers["Authorization"] = f"Bearer {token}"

    def add(
        self, file: Path, uid: str, level: str, *, allow_unknown: bool, media_type: str, said: Mapping[str, str]
    ) -> Row:
        params = {"uid": uid, "level": level, "allow_unknown": str(allow_unknown).lower(), **said}
        return self._sent("POST", "", file, params, media_type)

    def find(self, *, uid: str, level: str, type: str, author: str, limit: int) -> list[Row]:
        params = {"uid": uid, "level": level, "type": type, "author": author, "limit": limit}
        rows: list[Row] = self._ask("GET", "", params=params).json()
        return rows

    def describe(self, id: str, version: int | None) -> Row:
        told: Row = self._ask("GET", _path(id)).json()
        versions = [row for row in told["versions"] if version in (None, row["version"])]
        if not versions or versions[0]["action"] == "delete":
            raise NotThere(f"annotation {id} has no such version, or has been deleted")
        return dict(versions[0])

    def read(self, row: Row) -> Iterator[bytes]:
        answer = self._ask("GET", f"{_path(row['id'])}/file", params={"version": row["version"]}, stream=True)
        try:
            yield from answer.iter_content(PIECE)
        except requests.RequestException as error:
            raise PeerError(f"{self._url}: {error}") from None

    def change(self, id: str, file: Path, onto: int | None, *, media_type: str, said: Mapping[str, str]) -> Row:
        return self._sent("PUT", _path(id), file, {**said, **({"onto": str(onto)} if onto else {})}, media_type)

    def delete(self, id: str, onto: int | None) -> None:
        self._ask("DELETE", _path(id), params={"onto": onto} if onto else {})

    def close(self) -> None:
        self._session.close()

    def _sent(self, method: str, path: str, file: Path, params: Mapping[str, str], media_type: str) -> Row:
        with file.open("rb") as source:
            headers = {"Content-Type": media_type}
            row: Row = self._ask(method, path, params=dict(params), data=source, headers=headers).json()
        return row

    def _ask(self, method: str, path: str, **how: Any) -> requests.Response:
        try:
            answer = self._session.request(method, self._url + path, timeout=TIMEOUT_S, **how)
        except requests.RequestException as error:
            raise PeerError(f"{self._url}: {error}") from None
        if answer.status_code >= 400:
            raise _ERRORS.get(answer.status_code, PeerError)(_detail(answer))
        return answer


def _detail(answer: requests.Response) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {answer.status_code}"


def _path(id: str) -> str:
    if not _ID.fullmatch(id):
        raise NotThere(f"there is no annotation {id[:40]!r}: an id is 32 hexadecimal digits")
    return f"/{id}"


def _row(version: Version) -> Row:
    return {**asdict(version), "level": "instance" if version.level == "IMAGE" else version.level.lower()}

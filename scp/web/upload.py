"""A file that comes over HTTP with what is said of it: as a body of its own, or in a form (RFC 7578)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from email.message import Message
from typing import Final, Protocol

from starlette.requests import Request

from sphere.catalog.annotations import (
    MAX_NAME,
    MAX_TEXT,
    About,
    Annotations,
    Draft,
    Target,
    Version,
    file_name,
    level_named,
    locate,
    plain_text,
)
from sphere.catalog.queries import Queries
from sphere.conf.errors import BadRequest, NotThere
from sphere.conf.uids import UID
from sphere.scp.web.multipart_in import Data, End, Event, Head, MultipartReader
from sphere.scp.web.problem import WebError

FORM: Final = "multipart/form-data"
MAX_FIELD: Final = 8 << 10  # bytes of a field of a form
ABOUT: Final = ("type", "author", "name", "description")
_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")
_MEDIA_TYPE = re.compile(r"[!#$&^_.+\-0-9A-Za-z]{1,100}/[!#$&^_.+\-0-9A-Za-z]{1,100}")


class Into(Protocol):
    """Where it goes, and what knows UIDs."""

    @property
    def annotations(self) -> Annotations: ...
    @property
    def catalog(self) -> Queries: ...


@dataclass(slots=True)
class Upload:
    """A body on its way in: the file itself, or a form with it and what is said of it."""

    service: Into
    request: Request
    given: dict[str, str]
    allowed: tuple[str, ...]
    id: str = ""
    reader: MultipartReader | None = None
    draft: Draft | None = None
    part: str = ""
    value: bytearray = field(default_factory=bytearray)
    media_type: str = ""
    file_name: str = ""

    def __post_init__(self) -> None:
        kind, given = options(self.request.headers.get("content-type", ""))
        if kind == FORM:
            self.reader = MultipartReader(given.get("boundary", ""))
        elif kind and not _MEDIA_TYPE.fullmatch(kind):
            raise BadRequest("Content-Type is not a media type")
        else:
            self.media_type = kind

    def feed(self, data: bytes) -> None:
        if self.reader is None:
            self._file().write(data)
            return
        for event in self.reader.feed(data):
            self._take(event)

    def commit(self) -> Version:
        if self.reader is not None:
            self.reader.close()
            if self.draft is None:
                raise BadRequest("the form has no part that is a file")
        draft, sha256 = self._file(), self.given.get("sha256", "")
        if sha256 and not _SHA256.fullmatch(sha256):
            raise BadRequest("sha256 is 64 hexadecimal digits")
        draft.about = self._about()
        if self.id:  # a form may say it after the file
            draft.expect(self._onto())
        return draft.commit(None if self.id else self.target(), sha256=sha256)

    def discard(self) -> None:
        if self.draft is not None:
            self.draft.discard()

    def target(self) -> Target:
        """What it is linked to; raises BadRequest, and NotThere."""
        uid, level = self.given.get("uid", ""), level_named(self.given.get("level", ""))
        if not UID.fullmatch(uid):
            raise BadRequest("uid, of a study, series or instance, is required and has to be a UID (PS3.5 9.1)")
        found = locate(self.service.catalog, uid, level)
        if found is not None:
            return found
        if not flag(self.given, "allow_unknown"):
            raise NotThere(f"the archive has no {self.given.get('level') or 'study, series or instance'} with this UID")
        if level is None:
            raise BadRequest("level is required for what the archive does not have")
        return Target.unknown(level, uid)

    def _take(self, event: Event) -> None:
        if isinstance(event, Head):
            self._begin(event.headers)
        elif isinstance(event, Data):
            if not self.part:
                self._file().write(event.data)
                return
            self.value += event.data
            if len(self.value) > MAX_FIELD:
                raise WebError(f"a field of the form has at most {MAX_FIELD} bytes", http=413)
        elif isinstance(event, End) and self.part:
            try:
                self.given[self.part] = self.value.decode()
            except UnicodeDecodeError:
                raise BadRequest(f"{self.part} is not UTF-8") from None

    def _begin(self, headers: Mapping[str, str]) -> None:
        disposition, given = options(_utf8(headers.get("content-disposition", "")))
        if disposition != "form-data" or not given.get("name"):
            raise BadRequest("a part of the form has no name")
        if "filename" in given or given["name"] == "file":
            if self.draft is not None:
                raise BadRequest("a form has one file")
            kind = options(headers.get("content-type", ""))[0]
            if kind and not _MEDIA_TYPE.fullmatch(kind):
                raise BadRequest("Content-Type of the file is not a media type")
            self.part, self.media_type, self.file_name = "", kind, given.get("filename", "")
            self._file()
            return
        if given["name"] not in self.allowed:
            raise BadRequest(f"unknown field {given['name'][:40]!r}; known: file, {', '.join(self.allowed)}")
        if given["name"] in self.given:
            raise BadRequest(f"{given['name']} stands twice, in the form or also in the URL")
        self.part, self.value = given["name"], bytearray()

    def _file(self) -> Draft:
        if self.draft is None:
            annotations, maker = self.service.annotations, who(self.request)
            if self.id:
                self.draft = annotations.begin_version(self.id, About(), made_by=maker, onto=self._onto())
            else:
                self.draft = annotations.begin(About(), made_by=maker)
        return self.draft

    def _onto(self) -> int | None:
        """The version that is to be replaced, as far as was said until now."""
        return number(self.given, "onto", 0) or None

    def _about(self) -> About:
        said = {
            name: file_name(self.given[name])
            if name == "name"
            else plain_text(name, self.given[name], limit=MAX_TEXT if name == "description" else MAX_NAME)
            for name in ABOUT
            if name in self.given
        }
        about = About(**said, media_type=self.media_type or None)
        return about if about.name is not None or not self.file_name else replace(about, name=self.file_name)


def _utf8(header: str) -> str:
    """What browsers put into a header of a form as UTF-8 (RFC 7578 5.1)."""
    try:
        return header.encode("latin-1").decode()
    except UnicodeDecodeError:
        return header


def number(given: Mapping[str, str], name: str, default: int) -> int:
    """A whole number among what was given; raises BadRequest."""
    text = given.get(name, "")
    if not text:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII):
        raise BadRequest(f"{name} is a number")
    return int(text)


def flag(given: Mapping[str, str], name: str) -> bool:
    """true or false among what was given, false by default; raises BadRequest."""
    text = given.get(name, "false").lower()
    if text not in ("true", "false"):
        raise BadRequest(f"{name} is true or false")
    return text == "true"


def who(request: Request) -> str:
    """Who asks, as audit records name them."""
    return str(getattr(request.state, "who", ""))


def options(header: str) -> tuple[str, dict[str, str]]:
    """A header value and its parameters (RFC 2231 included), names in lower case."""
    message = Message()
    message["x"] = header
    values = message.get_params([], header="x")
    if not values:
        return "", {}
    decoded = {name.lower(): value if isinstance(value, str) else _rfc2231(value) for name, value in values[1:]}
    return values[0][0].lower(), decoded


def _rfc2231(value: tuple[str | None, str | None, str]) -> str:
    try:
        return value[2].encode("latin-1").decode(value[0] or "ascii", "replace")
    except (LookupError, UnicodeEncodeError):
        return value[2]

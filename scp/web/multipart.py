"""Bodies of several parts, made (RFC 2046 5.1, PS3.18 8.6.1.2)."""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterable


class Parts:
    """The parts of one multipart/related body, each of `media_type`."""

    def __init__(self, media_type: str) -> None:
        self.part_type = media_type
        self.boundary = f"sphere-{secrets.token_hex(16)}"

    @property
    def media_type(self) -> str:
        """The Content-Type of the whole."""
        root = self.part_type.partition(";")[0]
        return f'multipart/related; type="{root}"; boundary={self.boundary}'

    def head(self, media_type: str = "", **headers: str) -> bytes:
        """What precedes the body of a part; names of further headers have _ for -."""
        lines = [f"\r\n--{self.boundary}", f"Content-Type: {media_type or self.part_type}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    @property
    def end(self) -> bytes:
        """What follows the last part."""
        return f"\r\n--{self.boundary}--\r\n".encode()

    def bodies(self, bodies: Iterable[bytes]) -> Generator[bytes | memoryview, None, None]:
        """Each body as a part, and the end."""
        for body in bodies:
            yield self.head() + body
        yield self.end

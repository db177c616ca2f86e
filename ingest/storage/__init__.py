"""Where bytes are kept: one contract (`base`), three back ends, chosen by the URL of ``storage.root``."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphere.conf.errors import StorageError
from sphere.ingest.storage.base import Appender, Buffer, Entry, Readable, Storage

__all__ = ["Appender", "Buffer", "Entry", "Readable", "Storage", "open_storage"]


def open_storage(url: str, *, user: str = "") -> Storage:
    """The storage of a root URL; connects when it is first used.

    `url` is file:///PATH, hdfs://NAMENODE:PORT/PATH or webhdfs://NAMENODE:PORT/PATH; `user` is the HDFS user name,
    empty for the login name. Raises StorageError for any other URL.
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise StorageError(f"storage root {url!r} must be file:/// and an absolute path")
        from sphere.ingest.storage.local import LocalStorage

        return LocalStorage(Path(unquote(parts.path)))
    if parts.scheme not in ("hdfs", "webhdfs") or not parts.netloc:
        raise StorageError(f"storage root {url!r} must begin with file:///, hdfs://HOST:PORT/ or webhdfs://HOST:PORT/")
    if parts.scheme == "hdfs":
        from sphere.ingest.storage.hdfs import HdfsStorage

        return HdfsStorage(url, user=user)
    from sphere.ingest.storage.webhdfs import WebHdfsStorage

    return WebHdfsStorage(url, user=user)

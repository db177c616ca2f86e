"""Storage in a folder of this host (``file:///PATH``).

What is written is readable by every process at once; durable means fdatasync of the file and fsync of each folder in
which a name was made, moved or removed.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from io import FileIO
from pathlib import Path

from sphere.conf.errors import StorageError
from sphere.conf.private import FOLDER
from sphere.ingest.storage.ahead import ZerosAhead
from sphere.ingest.storage.base import Appender, Buffer, Entry, Piece, Storage
from sphere.ingest.storage.direct import LEAST, DirectWriter
from sphere.ingest.storage.paths import TEMPORARY, checked, checked_prefix, is_temporary, rewritten, storage_error

_IOV_MAX = min(os.sysconf("SC_IOV_MAX"), 1024)
_BLOCK = 512  # bytes that st_blocks counts in
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
_MODE = 0o640  # readable by the group of the archive, by nobody else


class LocalAppender(Appender):
    """A file open for append; nothing is buffered in this process."""

    def __init__(self, fd: int, path: str, size: int) -> None:
        self._fd = fd
        self._path = path
        self._size = size
        self._direct = DirectWriter(path)
        self._zeros = ZerosAhead(path, size)

    def tell(self) -> int:
        return self._size

    def write(self, buffers: Sequence[Buffer]) -> None:
        if self._zeros.none(self._size) and self._line(buffers):
            return
        views = [view for view in map(_bytes_view, buffers) if view.nbytes]
        size = sum(view.nbytes for view in views)
        with _Told(f"writing {self._path}"):
            if self._size + size <= self._zeros.end and self._direct.takes(self._size, size):
                views = self._past_cache(views, size)
            if views:
                with self._zeros.moving:
                    self._extend(views)

    def write_late(self, size: int, head: Callable[[], Buffer], buffers: Sequence[Buffer]) -> None:
        views = [view for view in map(_bytes_view, buffers) if view.nbytes]
        at, behind = self._size, self._size + size
        end = behind + sum(view.nbytes for view in views)
        if not (self._direct.takes(at, size) and self._direct.fits(behind, end - behind)):
            self.write([head(), *views])
            return
        with _Told(f"writing {self._path}"):
            if not self._put_behind(views, behind, end):  # the file is as it was
                self.write([head(), *views])
                return
            self._zeros.note(end - at)
            if self._direct.write([_bytes_view(head())], at) != size:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self._size = end

    def _put_behind(self, views: list[memoryview], at: int, end: int) -> bool:
        """Write from byte `at` to `end`, beyond the end of what is written; False where nothing was. Raises OSError
        where some of it was."""
        done = at
        with nullcontext() if end <= self._zeros.end else self._zeros.moving:
            try:
                while done < end and (written := self._direct.write(views, done)):
                    views, done = _after(views, written), done + written
            finally:
                if done > at:
                    self._zeros.end = max(self._zeros.end, done)
        if at < done < end:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return done == end

    def _line(self, buffers: Sequence[Buffer]) -> bool:
        """Whether that was a few bytes, as a line of a journal, which the kernel took at once."""
        if len(buffers) != 1 or not isinstance(data := buffers[0], bytes) or len(data) >= LEAST:
            return False
        with _Told(f"writing {self._path}"):
            written = os.write(self._fd, data)
            self._size += written
            self._zeros.end = self._size
            if written < len(data):
                self._extend([memoryview(data)[written:]])
        return True

    def _extend(self, views: list[memoryview]) -> None:
        """Write what moves the end of the file."""
        try:
            size = sum(view.nbytes for view in views)
            if self._direct.fits(self._size, size):
                views = self._past_cache(views, size)
            if views:
                self._zeros.drop(self._fd, self._size)
            while views:
                written = os.writev(self._fd, views[:_IOV_MAX])
                self._size += written
                views = _after(views, written)
        finally:
            self._zeros.end = max(self._zeros.end, self._size)

    def _past_cache(self, views: list[memoryview], size: int) -> list[memoryview]:
        """What is left of `views`."""
        self._zeros.note(size)
        written = self._direct.write(views, self._size)
        self._size += written
        return _after(views, written)

    def prepare(self) -> None:
        with _Told(f"writing zeros to {self._path}"):
            self._zeros.add(self._size)

    @property
    def unprepared(self) -> bool:
        return self._zeros.short(self._size)

    def sync(self) -> None:
        with _Told(f"syncing {self._path}"):
            os.fdatasync(self._fd)

    def publish(self) -> None:
        self.sync()

    def close(self) -> None:
        if self._fd < 0:
            return
        try:
            with _Told(f"cutting {self._path}"):
                self._zeros.cut(self._fd, self._size)
            self.sync()
        finally:
            self.abandon()

    def abandon(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                self._direct.close()
                self._zeros.close()
                os.close(fd)
            except OSError:  # a late write error of a file that nothing is promised of any more
                return


class LocalStorage(Storage):
    """Files below a folder, which is made when it is first written to."""

    visible_at_once = synced_is_shown = True
    in_files = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = root.as_uri()
        self._named = False  # whether the name of the root is known to be durable

    def _path(self, path: str) -> Path:
        return self.root / checked(path)

    def create(self, path: str, attempt: int = 0) -> LocalAppender:
        full = self._path(path)
        with _Told(f"creating {full}"):
            self._make_folders(full.parent)
            fd = os.open(full, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
            try:
                sync_folder(full.parent)
            except OSError:
                os.close(fd)
                full.unlink(missing_ok=True)  # nobody knows of it
                raise
        return LocalAppender(fd, str(full), 0)

    def _make_folders(self, folder: Path) -> None:
        """Make it, durably: also the root, where somebody else made that (locks of a spool are in it, too)."""
        if not self._named and self.root.is_dir():
            with suppress(PermissionError):  # it may be closed to us, and is of who made the root then
                sync_folder(self.root.parent)
        _make_folders(folder)
        self._named = True

    def append(self, path: str) -> LocalAppender:
        full = self._path(path)
        with _Told(f"opening {full} to append"):
            fd = os.open(full, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            return LocalAppender(fd, str(full), os.fstat(fd).st_size)

    def open(self, path: str) -> FileIO:
        full = self._path(path)
        with _Told(f"opening {full}"):
            return FileIO(full)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        full = self._path(path)
        with _Told(f"reading {full}"):
            fd = os.open(full, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if length is None:
                    length = max(0, os.fstat(fd).st_size - offset)
                return _pread(fd, offset, length)
            finally:
                os.close(fd)

    def write(self, path: str, data: bytes, *, durable: bool = True) -> None:
        full = self._path(path)
        temporary = full.with_name(f".{full.name}.{secrets.token_hex(8)}{TEMPORARY}")
        with _Told(f"writing {full}"):
            self._make_folders(full.parent)
            try:
                _write_new(temporary, data, durable=durable)
                with suppress(FileNotFoundError, PermissionError):  # there was none, or it may not be: as ours
                    _keep_owner(full.stat(), temporary)
                temporary.replace(full)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
            if durable:
                sync_folder(full.parent)

    def rewrite(self, path: str, pieces: Callable[[], Iterable[Piece]], *, check: Callable[[str], None]) -> int:
        temporary = rewritten(path)
        full, new = self._path(path), self._path(temporary)
        self.delete(temporary)  # of a process that was killed
        try:
            with _Told(f"writing {full} anew"):
                before = full.stat()
                _write_pieces(new, pieces())
                _keep_owner(before, new)
                after = new.stat()
            check(temporary)
            with _Told(f"putting {new.name} in the place of {full}"):
                new.replace(full)
                sync_folder(full.parent)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        return _BLOCK * (before.st_blocks - after.st_blocks) if before.st_nlink == 1 else 0

    def rename(self, path: str, to: str) -> None:
        full, other = self._path(path), self._path(to)
        with _Told(f"renaming {full}"):
            try:
                _rename(full, other)
            except FileExistsError:
                raise StorageError(f"renaming {full}: there is a {other.name} already") from None
            sync_folder(other.parent)

    def size(self, path: str) -> int:
        full = self._path(path)
        with _Told(f"looking at {full}"):
            return full.stat().st_size

    def exists(self, path: str) -> bool:
        return self._path(path).is_file()

    def walk(self, prefix: str = "", *, enter: Callable[[Entry], bool] | None = None) -> Iterator[Entry]:
        prefix = checked_prefix(prefix)
        with _Told(f"listing {self.root / prefix}"):
            yield from _walk(self.root / prefix, f"{prefix}/" if prefix else "", enter)

    def truncate(self, path: str, size: int) -> None:
        full = self._path(path)
        with _Told(f"cutting {full}"):
            fd = os.open(full, os.O_WRONLY | os.O_CLOEXEC)
            try:
                if size > os.fstat(fd).st_size:
                    raise StorageError(f"cutting {full}: it is shorter than {size} bytes")
                os.ftruncate(fd, size)
                os.fsync(fd)
            finally:
                os.close(fd)

    def recover(self, path: str) -> int:
        return self.size(path)

    def delete(self, path: str) -> None:
        full = self._path(path)
        with _Told(f"deleting {full}"):
            try:
                full.unlink()
            except (FileNotFoundError, NotADirectoryError):
                return
            sync_folder(full.parent)


class _Told:
    """The one place where errors of the system become ours. No generator: three are made for every instance."""

    __slots__ = ("_doing",)

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise storage_error(error, self._doing) from error


def _bytes_view(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    return view if view.itemsize == 1 and view.ndim == 1 else view.cast("B")


def _after(views: list[memoryview], written: int) -> list[memoryview]:
    """What is left of `views` (bytes) when their first `written` bytes are taken off."""
    done = 0
    while done < len(views) and written >= len(views[done]):
        written -= len(views[done])
        done += 1
    left = views[done:]
    if written:
        left[0] = left[0][written:]
    return left


def _pread(fd: int, offset: int, length: int) -> bytes:
    data = os.pread(fd, length, offset)
    if len(data) == length or not data:
        return data
    parts = [data]
    have = len(data)
    while have < length and (data := os.pread(fd, length - have, offset + have)):
        parts.append(data)
        have += len(data)
    return b"".join(parts)


def _write_new(path: Path, data: bytes, *, durable: bool) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
    with os.fdopen(fd, "wb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        if durable:
            os.fsync(file.fileno())


def _write_pieces(path: Path, pieces: Iterable[Piece]) -> None:
    """Write a new file with holes for zeros, durably, and have what reads it read the disk."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
    try:
        at = 0
        for piece in pieces:
            if isinstance(piece, int):
                at += piece
                continue
            view = memoryview(piece)
            while view:
                written = os.pwrite(fd, view, at)
                view, at = view[written:], at + written
        os.ftruncate(fd, at)
        os.fsync(fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _keep_owner(before: os.stat_result, path: Path) -> None:
    """Have a file that takes the place of another be whose that was, and readable by who could read it."""
    path.chmod(before.st_mode & 0o777)
    now = path.stat()
    if (now.st_uid, now.st_gid) != (before.st_uid, before.st_gid):
        os.chown(path, before.st_uid, before.st_gid)


def _rename(path: Path, to: Path) -> None:
    """Of two processes at once, one alone succeeds; where the file system has no links, who looks first."""
    try:
        os.link(path, to)
        path.unlink()
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if to.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        path.rename(to)


def _make_folders(folder: Path) -> None:
    """Make `folder` and its parents, each durable in the one above it."""
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    folder.mkdir(FOLDER, exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _walk(folder: Path, below: str, enter: Callable[[Entry], bool] | None) -> Iterator[Entry]:
    """Files in the order of their whole paths: a folder sorts with its "/"."""
    try:
        with os.scandir(folder) as found:
            items = sorted((item.name + "/" if item.is_dir() else item.name, item) for item in found)
    except (FileNotFoundError, NotADirectoryError):
        return
    for name, item in items:
        if name.endswith("/") and enter is None:
            yield from _walk(folder / item.name, below + name, enter)
        elif not is_temporary(name):
            try:
                stat = item.stat()
            except FileNotFoundError:  # removed since the folder was read
                continue
            if not name.endswith("/"):
                yield Entry(below + name, stat.st_size, stat.st_mtime)
            elif enter is not None and enter(Entry(below + item.name, 0, stat.st_mtime)):
                yield from _walk(folder / item.name, below + name, enter)

"""STOW-RS of many GB in one request: what the server's process holds meanwhile.

python -m tests.bench.stow_memory FOLDER [GB]      (10 GB; FOLDER is made, and removed at the end)
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]

from sphere.ingest.header import identify
from sphere.ingest.journal import Landed
from sphere.ingest.storage import open_storage
from tests.support.landing import archive, slices
from tests.support.web import serving_web

SIDE = 1600  # rows and columns: 5 MB an instance
HEAD = b"\r\n--B\r\nContent-Type: application/dicom\r\n\r\n"
KIND = 'multipart/related; type="application/dicom"; boundary=B'


def parts(total: int, sent: list[int]) -> Iterator[bytes]:
    """Instances that differ in their UID, until they are `total` bytes."""
    [data] = slices(1, rows=SIDE, columns=SIDE)
    uid = identify(data, size=len(data)).SOPInstanceUID.encode()
    while sent[0] < total:
        number = f"{sent[1]:08d}".encode()
        one = HEAD + data.replace(uid, uid[:-9] + b"1" + number)
        sent[0], sent[1] = sent[0] + len(one), sent[1] + 1
        for start in range(0, len(one), 1 << 20):
            yield one[start : start + (1 << 20)]
    yield b"\r\n--B--\r\n"


def main(folder: Path, gb: float) -> None:
    """Store, and print one line."""
    process, most, over, sent = psutil.Process(), [0], threading.Event(), [0, 1]
    try:
        with serving_web(archive(folder)) as web:
            before = process.memory_info().rss

            def watch() -> None:
                while not over.wait(0.05):
                    most[0] = max(most[0], process.memory_info().rss)

            watching = threading.Thread(target=watch, daemon=True)
            watching.start()
            began = time.monotonic()
            timeout = httpx.Timeout(60, read=None)
            response = httpx.post(
                f"{web.url}/studies",
                content=parts(int(gb * 1e9), sent),
                headers={"content-type": KIND},
                timeout=timeout,
            )
            seconds = time.monotonic() - began
            over.set()
            watching.join()
            stored = len(response.json().get("00081199", {}).get("Value", []))
        members = sum(state.records or 0 for state in Landed(open_storage(web.settings.storage.root)).bundles())
        print(
            f"status {response.status_code}: {sent[0] / 1e9:.2f} GB, {stored} instances answered, {members} stored, "
            f"in {seconds:.0f} s; resident {before >> 20} MiB before, {most[0] >> 20} MiB at most (client included)"
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 10)

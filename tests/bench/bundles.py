"""Landing without a network: BundleWriter.store beside one raw stream of the same storage, with the same grouping.

``python -m tests.bench.bundles [URL]``; URL is a storage root, by default a temporary folder.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from pathlib import Path

from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.storage import Storage, open_storage
from tests.support.bundles import new_member

SIZES = {39_000: 3000, 526_000: 600}  # bytes of a data set: how many are stored
THREADS = (1, 4, 16)


def raw(storage: Storage, size: int, count: int, group: int) -> float:
    """Seconds for `count` buffers in one stream, synced after each `group` of them."""
    data = bytes(size)
    appender = storage.create(f"raw-{time.time_ns()}")
    begun = time.perf_counter()
    for _ in range(count // group):
        appender.write([data] * group)
        appender.sync()
    seconds = time.perf_counter() - begun
    appender.close()
    return seconds


def landed(storage: Storage, settings: Settings, size: int, count: int, threads: int) -> float:
    """Seconds for `count` members that `threads` threads store."""
    data = bytes(size)
    writer = BundleWriter(storage, settings)

    def send(first: int) -> None:
        for number in range(first, first + count // threads):
            writer.store(new_member(number, dataset=data))

    workers = [threading.Thread(target=send, args=(number * count,)) for number in range(threads)]
    begun = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - begun
    writer.close()
    return seconds


def main() -> None:
    """Print one line per size and number of threads."""
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        root = {"storage": {"root": sys.argv[1]}} if len(sys.argv) > 1 else {}
        settings = from_dict({"catalog": {"root": "file:catalog"}, **root}, base=Path(folder))
        storage = open_storage(settings.storage.root)
        print(f"{'bytes':>8} {'threads':>8} {'raw/s':>8} {'raw MB/s':>9} {'store/s':>8} {'MB/s':>7}")
        for size, count in SIZES.items():
            for threads in THREADS:
                one = raw(storage, size, count, threads)
                ours = landed(storage, settings, size, count, threads)
                figures = (count / one, count * size / one / 1e6, count / ours, count * size / ours / 1e6)
                print("{:>8} {:>8} {:>8.0f} {:>9.0f} {:>8.0f} {:>7.0f}".format(size, threads, *figures))


if __name__ == "__main__":
    main()

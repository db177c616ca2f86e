"""A process that stores members until it is killed: ``python -m tests.support.writer SETTINGS_JSON``.

Each line of its output is one acknowledged member: number, bundle, offset, length.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading

from sphere.conf.settings import Settings
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.storage import open_storage
from tests.support.bundles import new_member


def main() -> None:
    """Four threads store for as long as the process lives."""
    settings = Settings.model_validate_json(sys.argv[1])
    writer = BundleWriter(open_storage(settings.storage.root), settings)
    numbers = itertools.count()

    def send() -> None:
        for number in numbers:
            record = writer.store(new_member(number))
            os.write(1, f"{number} {record.bundle} {record.offset} {record.length}\n".encode())

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()


if __name__ == "__main__":
    main()

"""A receiver process on a temporary archive, for tests; `python -m tests.support.receiver` is its body."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphere.conf import logs
from sphere.conf.footprint import keep_small
from sphere.conf.loading import from_dict
from sphere.conf.peers import Peer
from sphere.conf.settings import Settings
from sphere.ingest.journal import Landed
from sphere.ingest.records import MemberRecord
from sphere.ingest.storage import open_storage
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
STOP_S = 40  # seconds that a receiver may take to stop


@dataclass
class Receiver:
    """A running receiver."""

    process: subprocess.Popen[str]
    settings: Settings
    log_path: Path

    @property
    def port(self) -> int:
        return self.settings.dimse.port

    @property
    def peer(self) -> Peer:
        """It, as a peer of ours."""
        return Peer(name="under-test", ae_title=self.settings.archive.ae_title, host="127.0.0.1", port=self.port)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def members(self) -> list[MemberRecord]:
        """What the journals hold, in the order in which it became durable."""
        landed = Landed(open_storage(self.settings.storage.root), self.settings.archive.state_dir)
        return [record for state in landed.bundles() for record in landed.records(state.bundle, unpublished=True)[0]]

    def dataset_bytes(self, record: MemberRecord) -> bytes:
        """The data set of a member, as it lies in its bundle."""
        offset, length = record.offset + record.dataset_offset, record.length - record.dataset_offset
        return open_storage(self.settings.storage.root).read(record.bundle, offset, length)

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@contextmanager
def running_receiver(
    base: Path,
    tables: Mapping[str, Any] | None = None,
    *,
    file_size_limit: int | None = None,
    clean: bool = True,
    module: str = "tests.support.receiver",
) -> Iterator[Receiver]:
    """A receiver with its archive in `base`, listening; ended with status 0 at the end where `clean`.

    `tables` goes over the settings; no file may grow above `file_size_limit` bytes; `module` is its body.
    """
    data: dict[str, Any] = {"dimse": {}, **(tables or {})}
    data["dimse"] = {"port": free_port(), "workers": 1, **data["dimse"]}
    base.mkdir(parents=True, exist_ok=True)
    log_path = base / "receiver.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(data), str(base), str(file_size_limit or 0)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    receiver = Receiver(process, from_dict(data, base=base), log_path)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == str(receiver.port), log_path.read_text()
        yield receiver
        if clean:
            assert receiver.stop() == 0, receiver.log
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def main() -> None:
    """Receive with the settings of argv[1] (JSON) in the folder argv[2] until SIGTERM."""
    logs.configure("debug")
    limit = int(sys.argv[3])
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    settings = from_dict(json.loads(sys.argv[1]), base=Path(sys.argv[2]))
    keep_small(settings)
    from sphere.scp.server import run_receiver

    run_receiver(settings, ready=lambda port: print(port, flush=True))
    logging.shutdown()
    os._exit(0)  # as a child of `sphere serve` does: not around threads in native code (cpython issue 87135)


if __name__ == "__main__":
    os.environ.pop("PYTHONWARNINGS", None)
    main()

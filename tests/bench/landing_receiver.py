"""A receiver that keeps nothing, or that counts its groups; a process of `landing_servers.receivers`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sphere.conf import logs
from sphere.conf.footprint import keep_small
from sphere.conf.loading import from_dict


def count_groups(folder: Path) -> None:
    """Have the members stored by this process and the syncs that they took written to `folder`."""
    from sphere.ingest.members import Prepared
    from sphere.ingest.open_bundle import OpenBundle
    from sphere.ingest.records import MemberRecord

    put, counts = OpenBundle.put, [0, 0]
    file = os.open(folder / f"{os.getpid()}.groups", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o640)
    os.pwrite(file, b"0 0", 0)

    def counting(bundle: OpenBundle, group: Sequence[Prepared], now: float) -> list[MemberRecord]:
        records = put(bundle, group, now)
        counts[0] += len(records)
        counts[1] += 1
        os.pwrite(file, b"%d %d" % (counts[0], counts[1]), 0)  # counts never get shorter
        return records

    OpenBundle.put = counting  # type: ignore[method-assign]


def keep_nothing() -> None:
    """Put a writer that writes nothing in the place of the receiver's."""
    from sphere.ingest.bundle import NewMember
    from sphere.ingest.members import prepare
    from sphere.ingest.records import MemberRecord
    from sphere.scp import server

    class Nothing:
        def store(self, member: NewMember) -> MemberRecord:
            """As if it were durable."""
            return prepare(member).record("none.tar", 0)

        def close(self) -> None:
            """Nothing to seal."""

    server.open_writer = lambda _: Nothing()  # type: ignore[assignment, return-value]


def main(arguments: list[str]) -> None:
    """Receive until SIGTERM: ``null SETTINGS FOLDER`` or ``counted SETTINGS FOLDER``."""
    kind, data, folder = arguments
    settings = from_dict(json.loads(data), base=Path(folder))
    keep_small(settings)  # first, as in `sphere.children.receive`
    logs.configure("info")
    if kind == "counted":
        count_groups(Path(folder))
    else:
        keep_nothing()
    from sphere.scp.server import run_receiver

    run_receiver(settings, ready=lambda _: print("ready", flush=True))


if __name__ == "__main__":
    main(sys.argv[1:])

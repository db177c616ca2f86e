"""A disk that loses its power: what was synced is there, and of the rest whatever came to it, in any order."""

from __future__ import annotations

import hashlib
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest import bundle
from sphere.ingest.bundle import BundleWriter, FileRange, NewMember
from sphere.ingest.records import MemberRecord
from sphere.ingest.recovery import recover
from sphere.ingest.storage import ahead, open_storage
from tests.support.bundles import PREAMBLE, all_records, assert_sound, member_bytes, new_member
from tests.support.powerless import Recorder

pytestmark = pytest.mark.faults

CRASHES = 60  # of each archive


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("most", [40_000, 400_000])
def test_every_acknowledged_instance_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, most: int
) -> None:
    """With zeros ahead, alone and in groups, some digested beside the disk, some out of a waiting file."""
    monkeypatch.setattr(bundle, "PREPARE_S", 0.01)
    monkeypatch.setattr(ahead, "FREE", 0)
    monkeypatch.setattr(ahead, "STEP", 1 << 18)
    rng = random.Random(f"{threads} {most}")
    settings = _archive(tmp_path / "archive")
    waiting = tmp_path / "waiting"
    waiting.write_bytes(rng.randbytes(most))
    acknowledged: list[tuple[int, MemberRecord]] = []
    sent: dict[str, bytes] = {}
    with monkeypatch.context() as patch:
        recorder = Recorder(tmp_path / "archive" / "storage", patch)
        writer = BundleWriter(open_storage(settings.storage.root), settings)

        def run(thread: int) -> None:
            for number in range(48 // threads):
                member = _member(random.Random(f"{threads} {thread} {number}"), f"1.{thread}.{number}", waiting)
                sent[member.SOPInstanceUID] = PREAMBLE + member.fetch(len(PREAMBLE), most)
                record = writer.store(member)
                with recorder.lock:
                    acknowledged.append((len(recorder.changes), record))

        _together([lambda thread=thread: run(thread) for thread in range(threads)])
        writer.close()
    books: Counter[str] = Counter()
    syncs = [at for at, change in enumerate(recorder.changes) if change.kind == "sync"]
    for crash in range(CRASHES):
        count = rng.choice([rng.choice(syncs), rng.randrange(len(recorder.changes))])
        promised = [record for at, record in acknowledged if at <= count]
        after = _archive(tmp_path / f"after-{crash}")
        recorder.leave(tmp_path / f"after-{crash}" / "storage", count, rng)
        books.update(_audited(after, promised, sent))
        shutil.rmtree(tmp_path / f"after-{crash}")
    print("\n" + " ".join(f"{name}={count}" for name, count in books.items()))
    assert (books["lost"], books["duplicated"], books["altered"], books["not recovered"]) == (0, 0, 0, 0)
    assert books["acknowledged"] == books["present"] > 100


def _archive(folder: Path) -> Settings:
    return from_dict({"storage": {"root": "file:storage", "seal_mib": 2}}, base=folder)


def _member(rng: random.Random, uid: str, waiting: Path) -> NewMember:
    if rng.random() < 0.1:
        return new_member(dataset=FileRange(waiting, 0, rng.randrange(waiting.stat().st_size)), SOPInstanceUID=uid)
    data = rng.randbytes(rng.randrange(300, waiting.stat().st_size))
    beside: dict[str, Any] = {"digested": lambda: hashlib.sha256(data).hexdigest()} if rng.random() < 0.6 else {}
    return new_member(dataset=[memoryview(data)], SOPInstanceUID=uid, **beside)


def _together(calls: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _audited(settings: Settings, promised: list[MemberRecord], sent: dict[str, bytes]) -> Counter[str]:
    """What is there of what was acknowledged before, once recovered."""
    storage = open_storage(settings.storage.root)
    locks = settings.archive.state_dir / "locks"
    locks.mkdir(parents=True)
    for path in Path(storage.root).rglob("*.tar"):  # type: ignore[attr-defined]
        (locks / f"{path.stem}.lock").touch()
    report = recover(storage, settings)
    found = all_records(storage)
    assert_sound(storage)
    places = {(one.SOPInstanceUID, one.bundle, one.offset) for one in found}
    present = sum((one.SOPInstanceUID, one.bundle, one.offset) in places for one in promised)
    return Counter(
        {
            "crashes": 1,
            "acknowledged": len(promised),
            "present": present,
            "lost": len(promised) - present,
            "duplicated": len(found) - len({one.SOPInstanceUID for one in found}),
            "altered": sum(member_bytes(storage, one) != sent[one.SOPInstanceUID] for one in found),
            "not recovered": len(report.failed),
            "set aside": sum(1 for _ in storage.walk("damaged")),
        }
    )

"""Annotations by the clock: ``python -m tests.bench.bench_annotations [NUMBER]``, on local disk of a temporary folder.

Adding (durable, each alone), listing by UID beside NUMBER others, taking up all journals anew as another host would.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from sphere.catalog.annotations import About, Annotations, Target, Version, file_path
from sphere.conf.loading import from_dict

ADDED = 200  # one by one
ASKED = 500  # lists


def main() -> None:
    """Print one line for each."""
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        settings = from_dict({}, base=Path(folder))
        annotations = Annotations(settings)
        began = time.perf_counter()
        for one in range(ADDED):
            draft = annotations.begin(About(type="bench"), made_by="bench")
            draft.write(b"x" * 100_000)
            version = draft.commit(Target.unknown("STUDY", f"1.{one}"))
        print(f"added, 100 kB each: {ADDED / (time.perf_counter() - began):.0f}/s")
        for start in range(0, number, 1000):
            annotations._log.append([asdict(_other(version, one)) for one in range(start, start + 1000)])
        print(f"listed by UID beside {number}: {_listed(annotations):.2f} ms (median)")
        annotations.close()
        elsewhere = settings.archive.model_copy(update={"state_dir": Path(folder) / "elsewhere"})
        began = time.perf_counter()
        other = Annotations(settings.model_copy(update={"archive": elsewhere}))
        other.find(limit=1)
        print(f"all journals taken up anew: {time.perf_counter() - began:.1f} s")
        other.close()
        print(f"memory at most: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")


def _other(version: Version, number: int) -> Version:
    id = f"{number:032x}"
    changed = {"id": id, "StudyInstanceUID": f"2.{number // 3}", "path": file_path(id, 1)}
    return Version(**{**asdict(version), **changed})


def _listed(annotations: Annotations) -> float:
    took = []
    for one in range(ASKED):
        began = time.perf_counter()
        found, total = annotations.find(uid=f"2.{one}")
        took.append(1000 * (time.perf_counter() - began))
        assert len(found) == total == 3
    return statistics.median(took)


if __name__ == "__main__":
    main()

"""Recent arrivals while extraction runs: at every step each instance is found once, and counts are right."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any, get_args

import pytest
from pyspark.sql import SparkSession

from sphere.catalog import index
from sphere.catalog.query import Query
from sphere.catalog.schema import Level
from sphere.catalog.service import QueryService
from sphere.conf.settings import Settings
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.storage import open_storage
from sphere.jobs.extract import STEPS, run
from tests.support.extracted import extract
from tests.support.landing import archive, changed, new_member, slices

pytestmark = pytest.mark.spark

RETURNED: dict[Level, tuple[str, ...]] = {
    "PATIENT": ("PatientID", "NumberOfPatientRelatedStudies", "NumberOfPatientRelatedInstances"),
    "STUDY": ("PatientID", "ModalitiesInStudy", "NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances"),
    "SERIES": ("StudyInstanceUID", "Modality", "NumberOfSeriesRelatedInstances"),
    "IMAGE": ("StudyInstanceUID", "SeriesInstanceUID", "PatientID", "PatientComments"),
}


def answers(service: QueryService) -> dict[str, Any]:
    """All entities of every level, their counts, and where the bytes of each instance are."""
    found: dict[str, Any] = {}
    for level in get_args(Level):
        query = Query.build(level, return_keys=RETURNED[level])
        found[level] = [match.identifier().to_json_dict() for match in service.find(query)]
        assert service.count(Query.build(level)) == len(found[level]), level
    uids = [one["00080018"]["Value"][0] for one in found["IMAGE"]]
    assert len(uids) == len(set(uids)), "an instance is there twice"
    found["stored"] = [(one.SOPInstanceUID, one.sha256) for one in service.lookup_instances()]
    return found


class Watch:
    """Asks at every step, services that are open since before and new ones, and holds them to a plain extraction."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._number = count()
        self._writer = BundleWriter(open_storage(settings.storage.root), settings)
        self._expected: dict[str, Any] = {}
        self._on_disk: dict[str, tuple[int, int]] = {}
        self.open = [QueryService(settings), QueryService(self._beside())]
        self.seen: list[str] = []
        self.opened = 0
        self.arriving: list[tuple[bytes, float]] = []

    def close(self) -> None:
        for service in self.open:
            service.close()
        self._writer.close()

    def _beside(self, **sections: Any) -> Settings:
        """The archive, as a process of another index folder sees it."""
        ingest = {"on_conflict": self._settings.ingest.on_conflict}
        state_dir = {"state_dir": f"beside {next(self._number)}"}
        return archive(self._folder, ingest=ingest, archive=state_dir, **sections)

    def arrive(self, data: bytes, second: float) -> None:
        self._writer.store(new_member(data, second=second))
        self._expected = {}

    def seal(self) -> None:
        """What arrives from here on is in another bundle."""
        self._writer.close()
        self._writer = BundleWriter(open_storage(self._settings.storage.root), self._settings)

    def expected(self) -> dict[str, Any]:
        """The answers after a whole extraction of what is there."""
        if not self._expected:
            root = self._folder / f"catalog {next(self._number)}"
            later = self._beside(catalog={"root": root.as_uri()})
            extract(later)
            with QueryService(later) as service:
                self._expected = answers(service)
        return self._expected

    def ask(self, step: str) -> None:
        expected = self.expected()
        for service in self.open:
            assert answers(service) == expected, f"open since before, {step}"
        before, self._on_disk = self._on_disk, self.on_disk()
        if before != self._on_disk:  # a service that is opened now knows nothing else
            with QueryService(self._beside()) as service:
                assert answers(service) == expected, f"opened now, {step}"
            self.opened += 1

    def on_disk(self) -> dict[str, tuple[int, int]]:
        """Every file of the archive's storage, tables too: its size, and when it was changed last (ns)."""
        stats = {path: path.stat() for path in (self._folder / "storage").rglob("*") if path.is_file()}
        assert any(path.suffix == ".tar" for path in stats) and any(path.suffix == ".parquet" for path in stats)
        return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}

    def on_step(self, name: str, *details: Any) -> None:
        """Headers are told of again and again, by another thread: asked at their begin."""
        if details and details[0]:
            return
        self.seen.append(name)
        self.ask(name)
        if self.arriving:
            self.arrive(*self.arriving.pop(0))
            self.ask(f"{name}, and one more arrived")


@pytest.mark.parametrize(("policy", "settle_s"), [("keep-first", index.SETTLE_S), ("replace", 0.0)])
def test_each_once_at_every_step(
    spark: SparkSession, tmp_path: Path, policy: str, settle_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `settle_s` of nothing an open service takes up the tables between any two commits of a batch."""
    monkeypatch.setattr(index, "SETTLE_S", settle_s)
    settings = archive(tmp_path / "an archive", ingest={"on_conflict": policy}, extract={"batch": 8})
    first, second, third = slices(4, seed=1), slices(3, seed=2, study=1), slices(8, seed=3, study=2)
    watch = Watch(settings, tmp_path / "an archive")
    try:
        for number, data in enumerate([*first[:3], *second]):
            watch.arrive(data, number)
        run(spark, settings)
        watch.seal()
        moved = changed(first[1], StudyInstanceUID="1.2.3", SeriesInstanceUID="1.2.3.1", PatientID="MOVED")
        other = changed(second[0], PatientComments="other", PatientID="OTHER")
        twice = changed(first[3], PatientComments="another of what is new")
        came = [(first[0], 11), (moved, 12), (other, 13), (first[3], 14), (twice, 15), (third[0], 16), (third[0], 17),
                (b"no DICOM at all" * 20, 18), (third[1], 19), (second[0], 20)]  # fmt: skip
        for data, at in came:
            watch.arrive(data, at)
        watch.ask("nothing runs")
        older = changed(first[2], PatientComments="older", Modality="MR")
        watch.arriving = [
            (third[2], 30), (third[2], 31), (moved, 32), (changed(third[0], PatientComments="x"), 33), (older, -1),
            (third[3], 34), (changed(other, PatientComments="more"), 35), (first[1], 36), (third[4], 37),
        ]  # fmt: skip
        run(spark, settings, on_step=watch.on_step)
        assert not set(STEPS) - set(watch.seen)
        assert watch.seen.count("bundles") > 1, "several batches"
        assert watch.opened > 20, "at most steps"
        watch.ask("all is done")
    finally:
        watch.close()

"""What a receiver of `sphere serve` has resident while studies are taken out: under 200 MB, whatever their size."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from sphere.catalog.queries import open_queries
from sphere.catalog.query import Query
from tests.bench.bench_retrieve import ask, sink
from tests.support.extracted import extract
from tests.support.landing import archive, land, new_member, slices
from tests.support.memory import peak
from tests.support.serving import Serving, running_supervisor

pytestmark = pytest.mark.faults

RESIDENT = 200_000_000  # bytes
SMALL, LARGE = 40, 400  # slices of 526 kB
ROUNDS = 3


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A catalogued archive with a study of SMALL and one of LARGE slices; their StudyInstanceUIDs."""
    folder = tmp_path_factory.mktemp("archive")
    settings = archive(folder)
    for seed, count in enumerate((SMALL, LARGE)):
        land(settings, (new_member(data) for data in slices(count, rows=512, columns=512, seed=seed)))
    extract(settings)
    with open_queries(settings) as queries:
        query = Query.build("STUDY", return_keys=["NumberOfStudyRelatedInstances"])
        found = [one.identifier() for one in queries.find(query)]
    found.sort(key=lambda one: int(one.NumberOfStudyRelatedInstances))
    return folder, [str(one.StudyInstanceUID) for one in found]


@pytest.fixture
def served(studies: tuple[Path, list[str]], tmp_path: Path) -> Iterator[Serving]:
    folder, _ = studies
    with sink(tmp_path) as destination:
        peers = [{"name": "dest", "ae_title": "DEST", "host": "127.0.0.1", "port": destination}]
        with running_supervisor(folder, workers=1, peers=peers) as serving:
            yield serving


def test_the_resident_memory_of_a_receiver_that_retrieves(
    studies: tuple[Path, list[str]], served: Serving, tmp_path: Path
) -> None:
    """1.4 GB by C-MOVE and C-GET, one after the other, then four at once; ten times the slices take no more."""
    _, (small, large) = studies
    [child] = served.state().children
    peaks = []
    for study in (small, large):
        for _ in range(ROUNDS):
            for tool in ("movescu", "getscu"):
                ask(tool, served.port, "SPHERE", study)
        peaks.append(peak(child.pid))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda tool: ask(tool, served.port, "SPHERE", large), ("movescu", "getscu") * 2))
    peaks.append(peak(child.pid))
    print(f"\nresident at most: {', '.join(f'{one / 1e6:.0f} MB' for one in peaks)}")
    assert max(peaks) < RESIDENT
    assert peaks[1] - peaks[0] < 12_000_000
    assert served.state().children[0].pid == child.pid


def test_libraries_that_a_receiver_which_retrieves_does_not_map(
    studies: tuple[Path, list[str]], served: Serving
) -> None:
    """The index that is there is opened without delta-rs (60 MB), and one that is not, made elsewhere."""
    folder, (small, _) = studies
    [child] = served.state().children
    for path in (archive(folder).archive.state_dir / "index").glob("*.duckdb"):
        path.unlink()
    ask("getscu", served.port, "SPHERE", small)
    loaded = {part for one in psutil.Process(child.pid).memory_maps() for part in Path(one.path).parts}
    assert "duckdb" in {part.split(".")[0].lstrip("_") for part in loaded}
    assert not {"deltalake", "pandas", "PIL", "gdcm"} & loaded

"""A minute of coverage-guided fuzzing (`make fuzz` for more), and every input of the corpus once, plainly."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.__main__ import CORPUS, NAMES, fuzz
from tests.fuzz.seeds import SEEDS
from tests.fuzz.targets import MODULES, target

SECONDS = 60  # of all targets together
CORPUS_SIZE = 300_000  # bytes


@pytest.mark.faults
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_found(name: str) -> None:
    if importlib.util.find_spec("atheris") is None:
        assert os.environ.get("SPHERE_REQUIRE_ALL") != "1", "atheris is missing"
        pytest.skip("atheris is missing: it has no wheel for this Python")
    run = fuzz(name, SECONDS // len(NAMES))
    assert run.returncode == 0, run.stdout[-4000:]
    executed = next(line for line in run.stdout.splitlines() if "number_of_executed_units" in line)
    assert int(executed.split()[-1]) > len(list((CORPUS / name).iterdir())), "more than the corpus was tried"


@pytest.mark.faults
def test_memory_of_who_starts_it_is_not_counted() -> None:
    pytest.importorskip("atheris", reason="atheris is missing: it has no wheel for this Python")
    large = (
        "import mmap, sys; from tests.fuzz.__main__ import MEMORY_MB, fuzz\n"
        "mmap.mmap(-1, MEMORY_MB << 20, mmap.MAP_PRIVATE | mmap.MAP_POPULATE)\n"
        "sys.exit(fuzz('commands', 1).returncode)"
    )
    assert subprocess.run([sys.executable, "-c", large], check=False).returncode == 0


@pytest.mark.unit
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_is_in_the_corpus(path: Path) -> None:
    target(path.parent.name)(path.read_bytes())


@pytest.mark.unit
def test_the_corpus_is_small_and_every_target_has_one() -> None:
    assert set(MODULES) == set(SEEDS) == set(NAMES) == {path.name for path in CORPUS.iterdir()}
    assert sum(path.stat().st_size for path in CORPUS.glob("*/*")) < CORPUS_SIZE

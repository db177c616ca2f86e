"""What an archive keeps of patients is for its owner and its group, whatever the umask says."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sphere.archive import Archive
from sphere.conf.private import is_open, make_private
from sphere.serve import open_folders
from tests.support.extracted import extract
from tests.support.landing import archive, land, new_member, slices
from tests.support.serving import ready, running_supervisor
from tests.support.web import serving_web

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def open_files(folder: Path) -> list[str]:
    """What other accounts could read below it, if they came to its folder by another way."""
    found = [path for path in folder.rglob("*") if stat.S_ISREG(path.lstat().st_mode)]
    assert found
    return [str(path.relative_to(folder)) for path in found if path.stat().st_mode & 0o007]


def sphere(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "sphere.cli", "--config", str(folder / "sphere.toml"), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def test_the_command_line_makes_nothing_that_others_can_read(tmp_path: Path) -> None:
    """Bundles, tables and their logs (which have least and greatest names), indexes, journals, results."""
    folder = tmp_path / "archive"
    subprocess.run([sys.executable, "-m", "sphere.cli", "init", str(folder)], check=True, capture_output=True)
    for number, data in enumerate(slices(2)):
        (tmp_path / f"{number}.dcm").write_bytes(data)
    sphere(folder, "import", str(tmp_path / "0.dcm"), str(tmp_path / "1.dcm"))
    sphere(folder, "extract")
    assert sphere(folder, "find", "-k", "PatientName=*", "--format", "csv")
    assert {one.name for one in folder.rglob("*.json")} and list((folder / "state" / "index").rglob("*.duckdb"))
    assert open_files(folder) == []
    folders = [folder / "state", folder / "storage"]
    assert [one.stat().st_mode & 0o777 for one in folders] == [0o750, 0o750]


def test_in_python_the_folders_keep_others_out(tmp_path: Path) -> None:
    """The umask is the program's own there: what is readable stands in folders that nobody else comes into."""
    settings = archive(tmp_path / "archive")
    land(settings, [new_member(one) for one in slices(2)])
    extract(settings)
    assert list(Archive(settings).find("STUDY", {"PatientName": "*"}))
    with serving_web(settings) as running:
        assert running.get("/studies?PatientName=*").status_code == 200
    assert os.umask(0o022) == 0o022
    for path in (tmp_path / "archive").rglob("*"):
        reached = [one for one in (path, *path.parents) if one.is_relative_to(tmp_path)]
        closed = any(not one.stat().st_mode & 0o005 for one in reached)
        assert closed or path.is_dir(), path


def test_folders_that_others_may_look_into_are_named(tmp_path: Path) -> None:
    """As an archive of before has them; nobody changes their rights unasked."""
    for folder in (tmp_path, *tmp_path.parents[:1]):
        folder.chmod(0o755)
    with running_supervisor(tmp_path / "archive", workers=1) as serving:
        serving.wait(ready)
        assert open_folders(serving.settings) == []
        assert serving.stop() == 0
        assert "may look into" not in serving.log_path.read_text()
    (tmp_path / "archive" / "state").chmod(0o755)
    with running_supervisor(tmp_path / "archive", workers=1) as serving:
        serving.wait(ready)
        assert serving.stop() == 0
    state = tmp_path / "archive" / "state"
    assert is_open(state) == (open_folders(serving.settings) == [state])
    assert ("may look into" in serving.log_path.read_text()) == is_open(state)


def test_a_folder_below_a_closed_one_is_not_open(tmp_path: Path) -> None:
    make_private(tmp_path / "a" / "b")
    assert [(tmp_path / one).stat().st_mode & 0o777 for one in ("a", "a/b")] == [0o750, 0o750]
    (tmp_path / "a" / "b").chmod(0o755)
    assert not is_open(tmp_path / "a" / "b") and not is_open(tmp_path / "missing")

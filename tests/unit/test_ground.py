"""What holds the house together: the direction of imports, who may know what, and the error tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sphere
from sphere.conf import errors

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parent.parent.parent
ORDER = ["conf", "ingest", "catalog", "scp", "jobs", "sphere"]
ONLY_IN = {
    "pynetdicom": {"scp"},
    "pyspark": {"jobs", "sphere"},
    "deltalake": {"catalog", "jobs"},
}


def imports() -> Iterator[tuple[str, Path, str]]:
    """(room, file, imported module) of every import statement in the rooms."""
    for room in ORDER:
        for file in sorted((ROOT / room).rglob("*.py")):
            if any(part.is_symlink() for part in file.parents if part != ROOT):
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    yield from ((room, file, alias.name) for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module:
                    yield room, file, node.module


def test_rooms_import_only_the_rooms_before_them() -> None:
    seen = 0
    for room, file, module in imports():
        parts = module.split(".")
        if parts[0] == "sphere" and len(parts) > 1 and parts[1] in ORDER:
            seen += 1
            assert ORDER.index(parts[1]) <= ORDER.index(room), f"{file.relative_to(ROOT)} imports {module}"
    assert seen > 20


@pytest.mark.parametrize(("library", "rooms"), ONLY_IN.items())
def test_a_library_is_known_in_its_rooms_only(library: str, rooms: set[str]) -> None:
    users = {room for room, _, module in imports() if module.split(".")[0] == library}
    assert users <= rooms
    assert users, f"nothing imports {library}: the rule matches nothing"


def test_links_in_the_front_door_lead_to_the_rooms() -> None:
    for room in ORDER[:-1]:
        link = ROOT / "sphere" / room
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{room}"


def leaves(cls: type[errors.SphereError]) -> Iterator[type[errors.SphereError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from leaves(child)


@pytest.mark.parametrize("error", list(leaves(errors.SphereError)), ids=lambda error: error.__name__)
def test_every_error_has_its_codes(error: type[errors.SphereError]) -> None:
    assert error.__doc__
    assert 0x0100 <= error.dimse <= 0xFFFF
    assert 400 <= error.http < 600
    assert error.exit_status in (1, 2)


def test_the_version_is_the_changelog_s() -> None:
    assert f"## {sphere.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_a_receiver_loads_the_libraries_of_queries_when_the_first_query_comes() -> None:
    """They are 35 MB of the 150 that a receiver may have; import `sphere.catalog.service` for types only in scp/."""
    names = ("duckdb", "deltalake", "hdfs_native")
    code = f"import sys, sphere.scp.server; print([name for name in {names} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"

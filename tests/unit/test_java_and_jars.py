"""What pip does not bring: Java and JARs, found, checked, and named when they are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sphere.conf import jars
from sphere.conf.errors import ExternalMissing
from sphere.conf.java import PACKAGES, install, java, java_version
from tests.support import packages

pytestmark = pytest.mark.unit


def fake_java(folder: Path, version: str) -> Path:
    program = folder / "bin" / "java"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\"' >&2\n")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(("version", "feature"), [("17.0.15", 17), ("21", 21), ("1.8.0_402", 8), ("nonsense", 0)])
def test_versions_are_read(tmp_path: Path, version: str, feature: int) -> None:
    assert java_version(fake_java(tmp_path, version)) == feature


def test_java_home_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fake_java(tmp_path, "21.0.2")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert java() == program


def test_an_unsupported_java_is_named_with_the_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_java(tmp_path, "1.8.0")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(ExternalMissing, match=r"is Java 8; Java 17 or 21 is needed: .*openjdk-17-jre-headless"):
        java()


def fake_apt(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """The only programs there are, for root: a shell's, and an apt-get that notes its arguments and runs `script`."""
    folder.mkdir()
    calls = folder / "calls"
    apt = folder / "apt-get"
    apt.write_text(f'#!/bin/sh\necho "$*" >> {calls}\n{script}\n')
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return calls


def test_root_gets_java_by_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = fake_java(tmp_path / "package", "17.0.15")
    link = f'[ "$1" = update ] || /bin/ln -s {ready} {tmp_path}/programs/java'
    calls = fake_apt(tmp_path / "programs", monkeypatch, link)
    install()
    assert java() == tmp_path / "programs/java"
    assert calls.read_text().splitlines() == ["update -q", f"install -q -y --no-install-recommends {PACKAGES[0]}"]
    install()
    assert len(calls.read_text().splitlines()) == 2, "what is there is not installed again"


def test_where_debian_has_no_java_17_it_is_21(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = fake_java(tmp_path / "package", "21.0.8")
    only = f'case "$*" in *17*) exit 100;; *21*) /bin/ln -s {ready} {tmp_path}/programs/java;; esac'
    fake_apt(tmp_path / "programs", monkeypatch, only)
    install()
    assert java() == tmp_path / "programs/java"


def test_tools_of_tests_are_installed_without_those_that_there_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages, "SBIN", "/nowhere")
    calls = fake_apt(tmp_path / "programs", monkeypatch, 'case "$*" in *chromium*) exit 100;; esac')
    packages.install()
    wanted = sorted(set(packages.PACKAGES.values()))
    install_ = "install -q -y --no-install-recommends"
    assert calls.read_text().splitlines() == [
        "update -q", f"{install_} {' '.join(wanted)}", *(f"{install_} {one}" for one in wanted)
    ]  # fmt: skip
    assert capsys.readouterr().out.splitlines()[1:] == ["apt-get install chromium ended with status 100"]


def test_an_apt_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_apt(tmp_path / "programs", monkeypatch, "exit 100")
    with pytest.raises(ExternalMissing, match="apt-get update failed with status 100; install it with"):
        install()


def test_a_missing_java_is_said_in_one_line(tmp_path: Path) -> None:
    """As `make demo` meets it, before anything is installed; a JAVA_HOME of the user's is not meddled with."""
    environment = {"PATH": os.environ["PATH"], "JAVA_HOME": str(tmp_path / "none")}
    root = Path(__file__).parent.parent.parent
    run = subprocess.run(
        [sys.executable, "-m", "sphere.conf.java"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.splitlines() == [run.stderr.strip()]
    assert "apt-get install openjdk-17-jre-headless" in run.stderr


def test_every_pin_is_whole() -> None:
    groups: tuple[jars.Group, ...] = ("spark", "hdfs")
    pins = [jar for group in groups for jar in jars.pinned(group)]
    assert len({jar.filename for jar in pins}) == len(pins)
    assert all(len(jar.sha256) == 64 for jar in pins)


def test_bytes_that_are_not_the_pinned_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPHERE_JARS", str(tmp_path))

    def forged(wanted: list[jars.Jar], work: Path) -> None:
        for jar in wanted:
            (work / jar.filename).write_bytes(b"something else")

    monkeypatch.setattr(jars, "_run_ivy", forged)
    with pytest.raises(ExternalMissing, match=r"SHA-256 is [0-9a-f]{64}, [0-9a-f]{64} is pinned in jars\.toml"):
        jars.paths("spark")
    assert not list((tmp_path / "spark").glob("*.jar"))


def test_jars_that_are_there_are_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPHERE_JARS", str(tmp_path))
    (tmp_path / "spark").mkdir()
    for jar in jars.pinned("spark"):
        (tmp_path / "spark" / jar.filename).write_bytes(b"")
    monkeypatch.setattr(jars, "_run_ivy", lambda *_: pytest.fail("fetched"))
    assert len(jars.paths("spark")) == len(jars.pinned("spark"))

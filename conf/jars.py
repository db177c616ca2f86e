"""The JARs that pip does not bring: Delta for Spark, and Hadoop's servers for a local HDFS.

jars.toml pins each by organisation, name, version and SHA-256. The Ivy that pyspark ships resolves them, so no other
build tool is needed; they stay in ``<environment>/share/sphere/jars`` (or SPHERE_JARS). `python -m sphere.conf.jars
GROUP...` fetches ahead of time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import quoteattr

from sphere.conf import toml
from sphere.conf.alone import alone
from sphere.conf.errors import ExternalMissing
from sphere.conf.java import java

Group = Literal["spark", "hdfs"]
PINS = Path(__file__).with_name("jars.toml")
FETCHERS = 6
"""Ivys at once."""
_SHORT = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")  # a JVM of some seconds


@dataclass(frozen=True, slots=True)
class Jar:
    """One pinned artifact."""

    org: str
    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """The name it has in the folder of JARs."""
        return f"{self.name}-{self.version}.jar"


def folder() -> Path:
    """Where JARs are kept."""
    named = os.environ.get("SPHERE_JARS")
    return Path(named) if named else Path(sys.prefix) / "share" / "sphere" / "jars"


def pinned(group: Group) -> list[Jar]:
    """The pins of one group, as jars.toml lists them."""
    jars = []
    for pin, sha256 in toml.loads(PINS.read_text(encoding="utf-8"))[group].items():
        org, name, version = pin.split()
        jars.append(Jar(org, name, version, sha256))
    return jars


def paths(group: Group) -> list[Path]:
    """Local files of a group, fetched first where they are missing.

    Raises ExternalMissing when they cannot be fetched or are not the pinned bytes.
    """
    wanted = pinned(group)
    target = folder() / group
    target.mkdir(parents=True, exist_ok=True)
    with alone(target / ".lock"):
        if any(not (target / jar.filename).exists() for jar in wanted):
            _fetch(wanted, target)
    return [target / jar.filename for jar in wanted]


def _fetch(wanted: list[Jar], target: Path) -> None:
    """Resolve with Ivy into temporary folders, check every digest, then move into place.

    Ivy fetches one file after the other and waits for the network most of the time: several share the work.
    """
    with ThreadPoolExecutor(FETCHERS) as pool:
        for fetched in [pool.submit(_fetch_some, wanted[first::FETCHERS], target) for first in range(FETCHERS)]:
            fetched.result()


def _fetch_some(wanted: list[Jar], target: Path) -> None:
    if not wanted:
        return
    with tempfile.TemporaryDirectory(dir=target) as work:
        _run_ivy(wanted, Path(work))
        for jar in wanted:
            file = Path(work) / jar.filename
            digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "missing"
            if digest != jar.sha256:
                raise ExternalMissing(f"{jar.filename}: SHA-256 is {digest}, {jar.sha256} is pinned in {PINS.name}")
            file.replace(target / jar.filename)


def _run_ivy(wanted: list[Jar], work: Path) -> None:
    module = work / "ivy.xml"
    module.write_text(_ivy_module(wanted), encoding="utf-8")
    options = ["-ivy", str(module), "-cache", str(work / "cache"), "-types", "jar", "bundle", "-confs", "default"]
    options += ["-retrieve", str(work / "[artifact]-[revision].jar")]
    command = [str(java()), *_SHORT, "-jar", str(_ivy()), *options]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    except subprocess.TimeoutExpired:
        raise ExternalMissing("JARs could not be fetched within 15 minutes; check the network and try again") from None
    if run.returncode:
        tail = " ".join((run.stderr or run.stdout).split()[-40:])
        raise ExternalMissing(f"JARs could not be fetched (Ivy ended with {run.returncode}): {tail}")
    shutil.rmtree(work / "cache", ignore_errors=True)


def _ivy_module(wanted: list[Jar]) -> str:
    """An Ivy module file that asks for exactly the pinned artifacts, nothing transitive."""
    lines = [
        f"<dependency org={quoteattr(jar.org)} name={quoteattr(jar.name)} rev={quoteattr(jar.version)} "
        'transitive="false" conf="default-&gt;master"/>'
        for jar in wanted
    ]
    head = '<ivy-module version="2.0"><info organisation="sphere" module="jars"/><configurations><conf name="default"/>'
    return f"{head}</configurations><dependencies>{''.join(lines)}</dependencies></ivy-module>"


def _ivy() -> Path:
    """The Ivy JAR inside pyspark, found without importing pyspark."""
    spec = importlib.util.find_spec("pyspark")
    if spec is None or spec.origin is None:
        raise ExternalMissing("pyspark is not installed; pip install sphere-pacs brings it")
    found = sorted((Path(spec.origin).parent / "jars").glob("ivy-*.jar"))
    if not found:
        raise ExternalMissing("pyspark has no Ivy JAR; install the pinned pyspark of constraints.txt")
    return found[-1]


def main(groups: list[str]) -> None:
    """Fetch the named groups (all when none is named) and say where they are."""
    for group in groups or ["spark", "hdfs"]:
        if group not in ("spark", "hdfs"):
            raise SystemExit(f"unknown group {group!r}; known: spark, hdfs")
        files = paths(group)  # type: ignore[arg-type]
        print(f"{group}: {len(files)} JARs in {files[0].parent}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Spark's classes as a JVM has them once it has read and checked them: class data sharing (JEP 310, JEP 350).

A third of what a session and its first statements cost is to read, check and link some 20,000 classes.
`python -m sphere.jobs.class_archive` extracts a few instances in a JVM that leaves its classes in a file; every session
after that maps the file. The JVM itself looks whether the file is of its own build and of the very JARs of its class
path, and else goes on without: the file can be of no use, not wrong. Nothing needs it.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyspark
from pyspark import SparkContext

from sphere.archive import Archive
from sphere.conf import jars
from sphere.conf.alone import alone
from sphere.conf.errors import JobFailed, SphereError
from sphere.conf.java import java
from sphere.conf.loading import from_dict

END_S = 600.0
"""Seconds that the JVM may take to write the archive; some 20 of one core are usual."""
_OPTION = "spark.driver.defaultJavaOptions"  # stands before spark.driver.extraJavaOptions, which is the user's
_SHORT = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"  # a JVM of one minute; what it leaves is the same
# What a JVM says about an archive that it does not take goes to standard output by default: that is not its own here.
_QUIET = "-Xlog:disable -Xlog:all=warning,cds*=off,class+path*=off:stderr"


def archive_of(program: Path) -> Path:
    """Where the archive of this Java, this PySpark and these JARs is, or would be."""
    home = program.resolve().parent.parent
    build = (home / "lib" / "modules").stat() if (home / "lib" / "modules").exists() else program.stat()
    seen = [home, build.st_size, build.st_mtime_ns, pyspark.__version__, Path(pyspark.__file__).parent]
    seen += [jar.sha256 for jar in jars.pinned("spark")]
    return jars.folder() / f"spark-{hashlib.sha256(repr(seen).encode()).hexdigest()[:16]}.jsa"


def options(program: Path) -> dict[str, str]:
    """Settings of a session that uses the archive, where there is one."""
    archive = archive_of(program)
    return {_OPTION: f'"-XX:SharedArchiveFile={archive}" {_QUIET}'} if archive.exists() else {}


def make() -> Path:
    """Have the archive, in a process that has no session; where it is not there yet that takes half a minute and 200 MB
    of disk.

    Raises ExternalMissing where Java or the JARs cannot be had, JobFailed where the JVM leaves none.
    """
    target = archive_of(java())
    target.parent.mkdir(parents=True, exist_ok=True)
    with alone(target.with_suffix(".lock")):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".classes-") as work:
                made = Path(work) / target.name
                _extract(Path(work), made)
                with made.open("rb") as file:
                    os.fsync(file.fileno())  # a JVM that maps a part of one ends there
                made.replace(target)
            for other in target.parent.glob("spark-*.jsa"):
                if other != target:
                    other.unlink()
    return target


def _extract(folder: Path, archive_file: Path) -> None:
    """What sessions do: extract, ask, and end; this one leaves its classes."""
    from sphere.jobs.synthetic import ct_series

    conf = {_OPTION: f'{_SHORT} "-XX:ArchiveClassesAtExit={archive_file}" {_QUIET}'}
    spark = {"master": "local[2]", "shuffle_partitions": 2, "driver_memory": "1g", "conf": conf}
    with Archive(from_dict({"spark": spark}, base=folder)) as archive:
        for number, data in enumerate(ct_series(3, rows=8, columns=8)):
            (folder / f"{number}.dcm").write_bytes(data)
        if not all(one.record for one in archive.import_files(sorted(folder.glob("*.dcm")))):
            raise JobFailed("generated instances could not be stored")
        archive.extract()
        archive.sql("SELECT Modality, count(*) AS n FROM instances GROUP BY Modality ORDER BY n")
    gateway: Any = SparkContext._gateway
    SparkContext._gateway = SparkContext._jvm = None
    gateway.shutdown()
    gateway.proc.stdin.close()  # the JVM ends with what has started it
    if gateway.proc.wait(END_S) or not archive_file.exists():
        raise JobFailed(f"the JVM left no archive of its classes in {archive_file.parent}: is the disk full?")


def main() -> None:
    """Make it, and say where it is."""
    try:
        print(f"Spark's classes: {make()}")
    except SphereError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

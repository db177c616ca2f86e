"""The Spark session: the catalog's tables by name, as of now, and nothing left lying about."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipimport
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyspark
import pytest
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from sphere.catalog.schema import TABLES
from sphere.conf import jars
from sphere.conf.errors import StatementError
from sphere.conf.java import java
from sphere.jobs import class_archive, session
from sphere.jobs.extract import run
from sphere.jobs.session import register_tables
from sphere.jobs.statements import check_asks
from tests.support.landing import archive, land, new_member, slices

pytestmark = pytest.mark.spark


def test_tables_are_views_as_of_now(spark: SparkSession, tmp_path: Path) -> None:
    settings = archive(tmp_path / "an archive")
    files = slices(3)
    land(settings, [new_member(data) for data in files[:1]])
    run(spark, settings)
    register_tables(spark, settings)
    counted = "SELECT count(*) AS n FROM instances JOIN studies USING (StudyInstanceUID)"
    assert spark.sql(counted).collect()[0]["n"] == 1
    land(settings, [new_member(data, second=1) for data in files[1:]])
    run(spark, settings)
    register_tables(spark, settings)
    assert spark.sql(counted).collect()[0]["n"] == 3


def test_a_catalog_of_its_own_is_closed_to_others(spark: SparkSession, tmp_path: Path) -> None:
    settings = archive(tmp_path, catalog={"root": "file:tables/here"})
    land(settings, [new_member(one) for one in slices(1)])
    before = os.umask(0o022)
    try:
        run(spark, settings)
    finally:
        os.umask(before)
    assert (tmp_path / "tables" / "here").stat().st_mode & 0o777 == 0o750


def test_sockets_of_the_session_are_for_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They ask for no secret. Where the path of a socket would be too long there are none."""
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    folder = Path(session._sockets.__wrapped__()["spark.python.unix.domain.socket.dir"])
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    far = tmp_path / ("x" * 100)
    far.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(far))
    assert session._sockets.__wrapped__() == {}
    assert not list(far.iterdir())


def test_tables_that_nothing_was_written_to_have_no_rows(spark: SparkSession, tmp_path: Path) -> None:
    """`SELECT reason, detail FROM quarantine` is answered where nothing is wrong."""
    settings = archive(tmp_path)
    register_tables(spark, settings)
    empty = {name: spark.table(name) for name in TABLES}
    assert all(rows.isEmpty() for rows in empty.values())
    land(settings, [new_member(data) for data in slices(1)])
    run(spark, settings)
    register_tables(spark, settings)
    for name, rows in empty.items():
        assert [(one.name, one.dataType) for one in spark.table(name).schema] == [
            (one.name, one.dataType) for one in rows.schema
        ]
    with pytest.raises(PySparkException):
        spark.sql("INSERT INTO quarantine SELECT * FROM quarantine").collect()


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM instances",
        "UPDATE instances SET PatientName = 'X'",
        "INSERT INTO instances SELECT * FROM instances",
        "INSERT OVERWRITE instances SELECT * FROM instances WHERE false",
        "MERGE INTO instances USING studies ON false WHEN NOT MATCHED BY SOURCE THEN DELETE",
        "TRUNCATE TABLE instances",
    ],
)
def test_tables_are_read_only(spark: SparkSession, tmp_path: Path, statement: str) -> None:
    """Rows that were taken out here would not come back: extraction is done with their bundles."""
    settings = archive(tmp_path)
    land(settings, [new_member(data) for data in slices(2)])
    run(spark, settings)
    register_tables(spark, settings)
    with pytest.raises(PySparkException):
        spark.sql(statement).collect()
    register_tables(spark, settings)
    assert spark.sql("SELECT count(*) AS n FROM instances").collect()[0]["n"] == 2


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 1",
        "WITH a AS (SELECT 1 AS x) SELECT * FROM a UNION ALL SELECT 2",
        "VALUES (1), (2)",
        "FROM range(3) |> WHERE id > 0",
        "DESCRIBE QUERY SELECT 1",
        "SHOW TABLES",
        "EXPLAIN SELECT 1",
    ],
)
def test_what_asks_is_let_through(spark: SparkSession, statement: str) -> None:
    check_asks(spark, statement)
    assert spark.sql(statement).toArrow().num_rows


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("DROP TABLE instances", "DROP TABLE"),
        ("DROP VIEW instances", "DROP VIEW"),
        ("INSERT INTO instances VALUES (1)", "INSERT INTO"),
        ("WITH a AS (SELECT 1) INSERT INTO delta.`{path}` SELECT * FROM a", "INSERT INTO"),
        ("FROM range(1) INSERT INTO a SELECT * INSERT INTO b SELECT *", "INSERT INTO"),
        ("INSERT OVERWRITE DIRECTORY '{path}/new' USING csv SELECT 1", "INSERT INTO DIR"),
        ("DELETE FROM delta.`{path}`", "DELETE FROM TABLE"),
        ("UPDATE delta.`{path}` SET id = 1", "UPDATE TABLE"),
        ("MERGE INTO delta.`{path}` USING b ON false WHEN NOT MATCHED BY SOURCE THEN DELETE", "MERGE INTO TABLE"),
        ("TRUNCATE TABLE delta.`{path}`", "TRUNCATE TABLE"),
        ("CREATE TABLE x USING parquet LOCATION '{path}/new' AS SELECT 1", "CREATE TABLE AS SELECT"),
        ("CREATE TEMP VIEW v AS SELECT 1", "CREATE VIEW"),
        ("ALTER TABLE delta.`{path}` ADD COLUMN x INT", "ADD COLUMNS"),
        ("SET spark.sql.shuffle.partitions=3", "SET"),
        ("USE elsewhere", "SET CATALOG AND NAMESPACE"),
        ("CACHE TABLE instances", "CACHE TABLE"),
        ("ADD JAR '/x.jar'", "ADD JARS"),
        ("VACUUM delta.`{path}` RETAIN 0 HOURS", "VACUUM TABLE"),
        ("OPTIMIZE delta.`{path}`", "OPTIMIZE TABLE"),
        ("RESTORE TABLE delta.`{path}` TO VERSION AS OF 0", "RESTORE TABLE"),
        ("CREATE TABLE delta.`{path}/new` SHALLOW CLONE delta.`{path}`", "CLONE TABLE"),
        ("BEGIN DELETE FROM delta.`{path}`; END", "COMPOUND BODY"),
        ("EXECUTE IMMEDIATE 'DELETE FROM delta.`{path}`'", "UNRESOLVED EXECUTE IMMEDIATE"),
        ("CALL x.y(1)", "CALL"),
    ],
)
def test_what_does_anything_is_refused_before_it_is_done(
    spark: SparkSession, tmp_path: Path, statement: str, kind: str
) -> None:
    path = tmp_path / "table"
    spark.range(3).write.format("delta").save(str(path))
    before = sorted(path.rglob("*"))
    with pytest.raises(StatementError, match=f"^{kind} is no query, and nothing of it was done"):
        check_asks(spark, statement.replace("{path}", str(path)))
    assert sorted(path.rglob("*")) == before


def test_times_are_utc(spark: SparkSession) -> None:
    assert spark.conf.get("spark.sql.session.timeZone") == "UTC"
    assert spark.sql("SELECT current_timezone() AS zone").collect()[0]["zone"] == "UTC"


def test_nothing_is_left_in_the_working_folder(spark: SparkSession) -> None:
    names = {path.name for path in Path.cwd().iterdir()}
    assert not names & {"spark-warehouse", "metastore_db", "derby.log", "artifacts"}
    assert spark.conf.get("spark.ui.enabled") == "false"


def test_python_workers_have_everything_before_their_first_task_and_open_no_archive(spark: SparkSession) -> None:
    """Before each task a worker invalidates the import caches, which made it read the directories of zip files."""

    def seen(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        opened = []
        read, zipimport._read_directory = zipimport._read_directory, opened.append
        importlib.invalidate_caches()
        zipimport._read_directory = read
        for batch in batches:
            here = "sphere.jobs.headers" in sys.modules and gc.get_freeze_count() > 0
            yield pa.RecordBatch.from_pydict({"opened": [len(opened)] * len(batch), "here": [here] * len(batch)})

    rows = spark.range(0, 2, 1, 2).mapInArrow(seen, "opened bigint, here boolean").collect()
    assert [(row["opened"], row["here"]) for row in rows] == [(0, True)] * 2


MAIN = "org.apache.spark.deploy.SparkSubmit"


def loaded(options: dict[str, str], folder: Path) -> list[str]:
    """Where a JVM that Spark starts with these options has its first class from; it says nothing of them."""
    log = folder / "loaded"
    conf = {**options, "spark.driver.extraJavaOptions": f"-Xlog:class+load:file={log}"}
    settings = [word for key, value in conf.items() for word in ("--conf", f"{key}={value}")]
    command = [str(Path(pyspark.__file__).parent / "bin" / "spark-submit"), *settings, "--version"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not run.stdout
    assert "version" in run.stderr and "warning" not in run.stderr
    return [line for line in log.read_text().splitlines() if f" {MAIN} " in line]


def test_classes_come_from_an_archive_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another build, or no archive at all: as if there were none, and not a word of it."""
    subprocess.run([sys.executable, "-m", "sphere.jobs.class_archive"], check=True, capture_output=True)
    kept = class_archive.archive_of(java())
    assert "shared objects file" in loaded(class_archive.options(java()), tmp_path)[0]
    monkeypatch.setenv("SPHERE_JARS", str(tmp_path / "a folder"))
    assert class_archive.options(java()) == {}
    other = class_archive.archive_of(java())
    assert (other.name, other.parent) == (kept.name, jars.folder())
    other.parent.mkdir()
    with kept.open("rb") as file:
        head = file.read(1 << 20)
    for wrong in (b"", b"no archive", b"\0" * 4096 + head[4096:]):
        other.write_bytes(wrong)
        assert "shared objects file" not in loaded(class_archive.options(java()), tmp_path)[0]


def _is_spark(process: psutil.Process) -> bool:
    try:
        return "pyspark-shell" in process.cmdline()
    except psutil.Error:  # it ended meanwhile
        return False


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests in the background may have it ignored
from sphere.cli import main
main(["--config", sys.argv[1], "sql", "SELECT 1"], prog_name="sphere")
"""


@pytest.mark.parametrize("pause_s", [0.0, 0.3, 1.2])
def test_ctrl_c_while_spark_starts_leaves_no_jvm(tmp_path: Path, pause_s: float) -> None:
    """Whatever has begun of it: PySpark's script, the JVM, or the JVM that tells its port in vain."""
    (tmp_path / "sphere.toml").write_text("")
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "sphere.toml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        process, started = psutil.Process(running.pid), list[psutil.Process]()
        while not started and running.poll() is None:
            started = [one for one in process.children(recursive=True) if _is_spark(one)]
        time.sleep(pause_s)
        started = process.children(recursive=True)
        running.send_signal(signal.SIGINT)
        try:
            assert running.wait(60) == 130
            assert psutil.wait_procs(started, timeout=30)[1] == []
        finally:
            for one in started:
                if one.is_running():
                    one.kill()
        assert "interrupted" in running.stderr.read()

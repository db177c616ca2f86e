"""The Spark session of this archive: Delta, quiet, and reachable from nowhere else."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyspark import SparkContext
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from pyspark.sql.functions import lit
from pyspark.sql.pandas.types import from_arrow_schema

from sphere.catalog.schema import TABLES
from sphere.conf import jars
from sphere.conf.errors import JobFailed
from sphere.conf.java import java
from sphere.conf.private import MASK, make_private
from sphere.conf.settings import Settings
from sphere.jobs import class_archive
from sphere.jobs.tables import Tables, become_hdfs_user

_DELTA = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    # Tasks that rebuild a table's state from its log: 50 by default, most of them empty here.
    "spark.databricks.delta.snapshotPartitions": "2",
    # Files and change data stay where a table's history needs them; nothing here shortens it.
    "spark.databricks.delta.schema.autoMerge.enabled": "false",
}
_QUIET = {
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.log.level": "ERROR",
    "spark.sql.debug.maxToStringFields": "20",  # of the hundreds of columns, in plans and messages
    "spark.sql.ui.explainMode": "simple",  # each job's plan is described for a page that nobody sees
}
_DATA = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "16384",
    "spark.sql.parquet.compression.codec": "zstd",
    "spark.sql.catalogImplementation": "in-memory",
    "spark.python.daemon.module": "sphere.jobs.python_daemon",
}
_SOCKET_PATH = 103  # bytes of a path that every system takes (sockaddr_un)


def spark_session(settings: Settings, *, app_name: str) -> SparkSession:
    """A session for this archive's tables, as `spark` of the settings says; ``spark.conf`` there wins.

    Executors of a cluster need Python with this package installed, of the driver's version. Raises ExternalMissing
    where Java or the Delta JARs cannot be had, JobFailed where Spark does not start.
    """
    program = java()
    os.environ.setdefault("JAVA_HOME", str(program.resolve().parent.parent))
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # the only place where PySpark looks for it
    if settings.spark.master.startswith("local"):  # a machine whose own name resolves to nothing would fail otherwise
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    become_hdfs_user(settings)
    logging.getLogger("SQLQueryContextLogger").disabled = True  # PySpark prints every error that it raises as well
    builder = SparkSession.builder.appName(app_name).master(settings.spark.master)
    for key, value in {**class_archive.options(program), **_options(settings)}.items():
        builder = builder.config(key, value)
    log_file = settings.archive.state_dir / "spark" / "driver.log"
    with _errors_to(log_file) as log, _none_left_behind(), _handler_of_ctrl_c():
        try:
            return builder.getOrCreate()
        except (PySparkException, OSError) as error:
            raise JobFailed(f"Spark did not start on {settings.spark.master}: {error}; see {log}") from error


@contextmanager
def _none_left_behind() -> Iterator[None]:
    """Where this is interrupted before PySpark is connected to the JVM that it starts, end that JVM: it would stay for
    ever, as the file by which it tells its port is gone."""
    import psutil  # type: ignore[import-untyped]

    before = {child.pid for child in psutil.Process().children()}
    try:
        yield
    except BaseException:
        if SparkContext._gateway is None:
            for child in psutil.Process().children():
                if child.pid not in before and "pyspark-shell" in _command(child):  # as script and as JVM
                    child.kill()
        raise


@contextmanager
def _handler_of_ctrl_c() -> Iterator[None]:
    """Keep the handler of SIGINT that was set on purpose, or that it is ignored, as in a child of `sphere serve`: that
    of PySpark takes the place of Python's own alone."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if before not in (signal.default_int_handler, None) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _command(process: Any) -> list[str]:
    with suppress(Exception):  # it ended meanwhile
        return list(process.cmdline())
    return []


@contextmanager
def _errors_to(log: Path) -> Iterator[Path]:
    """Give a JVM that starts meanwhile `log` as its standard error, and keep ours clean of what it says in passing."""
    make_private(log.parent)
    ours = os.dup(2)
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield log
    finally:
        os.dup2(ours, 2)
        os.close(ours)


def register_tables(spark: SparkSession, settings: Settings, names: Iterable[str] = tuple(TABLES)) -> None:
    """Make the tables of these names temporary views, as of now; one that nothing was ever written to has no rows."""
    tables = Tables(settings)
    for name in names:
        if tables.open(name) is None:
            rows = spark.createDataFrame([], from_arrow_schema(TABLES[name].schema))
        else:
            rows = spark.read.format("delta").load(tables.spark_url(name))
        rows.where(lit(True)).createOrReplaceTempView(name)  # what is not the table alone can only be read


@functools.cache
def _sockets() -> Mapping[str, str]:
    """Unix domain sockets between Python and the JVM: over TCP each job waits 40 ms for acknowledgements.

    Nobody is asked for a secret there, so they are in a folder that is open to this user alone.
    """
    if len(os.fsencode(tempfile.gettempdir())) + len(f"/sphere-{'x' * 8}/.{uuid.uuid4()}.sock") > _SOCKET_PATH:
        return {}
    folder, process = tempfile.mkdtemp(prefix="sphere-"), os.getpid()

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return {"spark.python.unix.domain.socket.enabled": "true", "spark.python.unix.domain.socket.dir": folder}


def _options(settings: Settings) -> dict[str, str]:
    state = settings.archive.state_dir / "spark"
    options = {**_DELTA, **_QUIET, **_DATA}
    options["spark.jars"] = ",".join(str(path) for path in jars.paths("spark"))
    options["spark.hadoop.fs.permissions.umask-mode"] = f"{MASK:03o}"
    options["spark.driver.memory"] = settings.spark.driver_memory
    options["spark.sql.shuffle.partitions"] = str(settings.spark.shuffle_partitions)
    options["spark.sql.warehouse.dir"] = (state / "warehouse").as_uri()
    if settings.spark.master.startswith("local"):
        options["spark.driver.host"] = options["spark.driver.bindAddress"] = "127.0.0.1"
        options.update(_sockets())
    if settings.storage.user:
        options["spark.executorEnv.HADOOP_USER_NAME"] = settings.storage.user
    return {**options, **settings.spark.conf}

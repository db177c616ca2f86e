"""A real HDFS on this machine: one NameNode and two DataNodes from the pinned JARs, on loopback and free ports.

As a fixture (`hdfs_cluster`), or for a person: ``python -m tests.support.hdfs [--dir DIR] [--port PORT]``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal
from xml.sax.saxutils import escape

import pytest

from sphere.conf import jars
from sphere.conf.alone import alone
from sphere.conf.errors import ExternalMissing
from sphere.conf.java import java
from tests.support.ports import free_port

_NAMENODE = "org.apache.hadoop.hdfs.server.namenode.NameNode"
_DATANODE = "org.apache.hadoop.hdfs.server.datanode.DataNode"
_JVM = ["-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "--add-opens", "java.base/java.lang=ALL-UNNAMED"]
_LOG4J = """log4j.rootLogger=WARN,out
log4j.appender.out=org.apache.log4j.ConsoleAppender
log4j.appender.out.layout=org.apache.log4j.PatternLayout
log4j.appender.out.layout.ConversionPattern=%d %p %c{1}: %m%n
"""
# A program that asks the kernel to be killed with its parent (prctl PR_SET_PDEATHSIG, kept over exec) and becomes the
# command that follows. Not a preexec_fn: forking a process that has threads and going on in Python can hang.
_PDEATHSIG = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
_DIE_WITH_PARENT = [sys.executable, "-c", _PDEATHSIG] if sys.platform == "linux" else []


class HdfsCluster:
    """Starts on construction and returns when it takes writes; raises TimeoutError with the end of a log when it fails.

    `folder` keeps data, settings and logs (an existing NameNode image in it is used again). `rpc_port` and `http_port`
    0 take free ones. `image` is of a formatted NameNode, to be copied: a JVM less to start; it is made where it is not
    there. A DataNode that is silent for 2 * `recheck_s` + 10 seconds is taken for dead; the file of a writer that is
    silent for `lease_s` is closed. Every process is ended by `stop`, or by the kernel when this process dies.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rpc_port: int = 0,
        http_port: int = 0,
        datanodes: int = 2,
        block_mib: int = 128,
        recheck_s: int = 2,
        lease_s: int = 1200,
        wait_s: float = 120.0,
        image: Path | None = None,
    ) -> None:
        self.folder = folder
        self.rpc_port, self.http_port = rpc_port or free_port(), http_port or free_port()
        self.hdfs_url = f"hdfs://127.0.0.1:{self.rpc_port}"
        self.webhdfs_url = f"webhdfs://127.0.0.1:{self.http_port}"
        self._datanodes = datanodes
        self._block_mib = block_mib
        self._recheck_s = recheck_s
        self._lease_s = lease_s
        self._image = image
        self._java = java()
        self._jars = ":".join(str(path) for path in jars.paths("hdfs"))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._start(wait_s)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> HdfsCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pids(self) -> list[int]:
        """Of its running processes."""
        return [process.pid for process in self._processes.values()]

    def kill_datanode(self) -> int:
        """Kill one living DataNode (-9); returns its process id."""
        name = next(name for name in sorted(self._processes) if name.startswith("datanode"))
        process = self._processes.pop(name)
        process.kill()
        process.wait()
        return process.pid

    def kill_namenode(self) -> None:
        """Kill the NameNode (-9)."""
        process = self._processes.pop("namenode")
        process.kill()
        process.wait()

    @contextlib.contextmanager
    def stopped(self, kind: Literal["namenode", "datanode"]) -> Iterator[None]:
        """Those processes hang meanwhile: they accept connections and answer nothing."""
        hung = [process for name, process in self._processes.items() if name.startswith(kind)]
        for process in hung:
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in hung:
                process.send_signal(signal.SIGCONT)

    def start_namenode(self, *, wait_s: float = 120.0) -> None:
        """Start it again and wait until it takes writes."""
        self._spawn("namenode", _NAMENODE)
        self._wait(wait_s)

    def start_datanodes(self, *, wait_s: float = 120.0) -> None:
        """Start those that are not running and wait until the NameNode counts them."""
        for number in range(self._datanodes):
            name = f"datanode{number}"
            if name not in self._processes:
                self._spawn(name, _DATANODE)
        self._wait(wait_s)

    def stop(self) -> None:
        """End every process of the cluster."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def _start(self, wait_s: float) -> None:
        for web in ("hdfs", "datanode"):
            (self.folder / "conf" / "webapps" / web).mkdir(parents=True, exist_ok=True)
        (self.folder / "conf" / "log4j.properties").write_text(_LOG4J)
        self._write_settings()
        if not (self.folder / "name" / "current").exists():
            self._format()
        self._spawn("namenode", _NAMENODE)
        self.start_datanodes(wait_s=wait_s)

    def _format(self) -> None:
        if self._image is None:
            self._run_format()
            return
        with alone(self._image.with_suffix(".lock")):
            if self._image.exists():
                shutil.copytree(self._image, self.folder / "name")
                return
            self._run_format()
            with tempfile.TemporaryDirectory(dir=self._image.parent) as work:
                shutil.copytree(self.folder / "name", Path(work) / "name")
                (Path(work) / "name").rename(self._image)

    def _write_settings(self) -> None:
        common = {
            "fs.defaultFS": self.hdfs_url,
            "dfs.namenode.http-address": f"127.0.0.1:{self.http_port}",
            "dfs.namenode.name.dir": (self.folder / "name").as_uri(),
            "dfs.namenode.datanode.registration.ip-hostname-check": "false",
            "dfs.namenode.safemode.extension": "0",
            "dfs.namenode.heartbeat.recheck-interval": str(1000 * self._recheck_s),
            "dfs.heartbeat.interval": "1",
            "dfs.namenode.lease-hard-limit-sec": str(self._lease_s),
            "dfs.permissions.enabled": "false",
            "dfs.replication": str(self._datanodes),
            "dfs.blocksize": f"{self._block_mib}m",
            "dfs.datanode.address": "127.0.0.1:0",
            "dfs.datanode.http.address": "127.0.0.1:0",
            "dfs.datanode.ipc.address": "127.0.0.1:0",
        }
        _write_xml(self.folder / "conf" / "hdfs-site.xml", common)
        _write_xml(self.folder / "conf" / "core-site.xml", {"fs.defaultFS": self.hdfs_url})

    def _command(self, main: str, *arguments: str) -> list[str]:
        return [str(self._java), *_JVM, "-cp", f"{self.folder / 'conf'}:{self._jars}", main, *arguments]

    def _run_format(self) -> None:
        run = subprocess.run(
            self._command(_NAMENODE, "-format", "-nonInteractive"), capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise TimeoutError(f"the NameNode could not be formatted: {(run.stdout + run.stderr)[-2000:]}")

    def _spawn(self, name: str, main: str) -> None:
        arguments = [] if name == "namenode" else [f"-Ddfs.datanode.data.dir={(self.folder / name).as_uri()}"]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*_DIE_WITH_PARENT, *self._command(main, *arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _wait(self, wait_s: float) -> None:
        """Until the NameNode is out of safe mode and counts every DataNode."""
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            state = self._state()
            if state.get("FSState") == "Operational" and state.get("NumLiveDataNodes") == self._datanodes:
                return
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise TimeoutError(f"{name} ended with {process.returncode}: {self._log_end(name)}")
            time.sleep(0.1)
        raise TimeoutError(f"HDFS was not ready within {wait_s:.0f} s: {self._log_end('namenode')}")

    def open_files(self) -> int:
        """How many files somebody writes to, as `hdfs fsck` tells it."""
        url = f"http://127.0.0.1:{self.http_port}/fsck?ugi=test&path=/&openforwrite=1"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return int(answer.read().count(b"OPENFORWRITE:"))

    def _state(self) -> dict[str, object]:
        url = f"http://127.0.0.1:{self.http_port}/jmx?qry=Hadoop:service=NameNode,name=FSNamesystemState"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                beans: list[dict[str, object]] = json.load(answer)["beans"]
        except (OSError, ValueError, KeyError):  # not listening yet
            return {}
        return beans[0] if beans else {}

    def _log_end(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-2000:]


def _write_xml(path: Path, properties: Mapping[str, str]) -> None:
    items = "".join(
        f"<property><name>{escape(name)}</name><value>{escape(value)}</value></property>\n"
        for name, value in properties.items()
    )
    path.write_text(f'<?xml version="1.0"?>\n<configuration>\n{items}</configuration>\n')


def hdfs_for_test(folder: Path, **options: int) -> HdfsCluster:
    """A cluster; where there can be none the test is skipped, or fails with SPHERE_REQUIRE_ALL=1."""
    try:
        return HdfsCluster(folder, image=_image(), **options)
    except ExternalMissing as error:
        if os.environ.get("SPHERE_REQUIRE_ALL") == "1":
            raise
        pytest.skip(str(error))


def _image() -> Path:
    """Where the image of an empty NameNode is, beside the JARs that made it, or will be."""
    version = next(jar.version for jar in jars.pinned("hdfs") if jar.name == "hadoop-hdfs")
    return jars.folder() / "hdfs" / f"formatted-{version}"


@pytest.fixture
def expendable_hdfs_cluster(tmp_path: Path) -> Iterator[HdfsCluster]:
    """A cluster of its own for a test that kills parts of it."""
    with hdfs_for_test(tmp_path / "hdfs") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def hdfs_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HdfsCluster]:
    """The cluster of this test run, with blocks of 4 MiB so that files have several."""
    with hdfs_for_test(tmp_path_factory.mktemp("hdfs"), block_mib=4) as cluster:
        yield cluster


def main() -> None:
    """Run a cluster in the foreground until Ctrl-C."""
    parser = argparse.ArgumentParser(description="HDFS on loopback: one NameNode, two DataNodes; Ctrl-C stops it.")
    parser.add_argument("--dir", type=Path, help="folder for its data, kept; without it a temporary one")
    parser.add_argument("--port", type=int, default=0, help="port of hdfs://; 0 takes a free one")
    parser.add_argument("--http-port", type=int, default=0, help="port of webhdfs://; 0 takes a free one")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.ExitStack() as stack:
        folder = options.dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sphere-hdfs-")))
        folder.mkdir(parents=True, exist_ok=True)
        print("starting one NameNode and two DataNodes ...", flush=True)
        try:
            cluster = stack.enter_context(
                HdfsCluster(folder.resolve(), rpc_port=options.port, http_port=options.http_port)
            )
        except (ExternalMissing, TimeoutError) as error:
            raise SystemExit(str(error)) from None
        print(f"HDFS     {cluster.hdfs_url}\nWebHDFS  {cluster.webhdfs_url}\nfolder   {folder}")
        print(f'\nIn sphere.toml:\n[storage]\nroot = "{cluster.hdfs_url}/sphere"\n\nCtrl-C stops it.', flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()

"""`make hdfs`, as a person runs it: two addresses that work, until Ctrl-C, which leaves nothing running."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from sphere.conf.errors import ExternalMissing
from sphere.conf.java import java
from sphere.ingest.storage import open_storage
from tests.support.dicom_tools import require_tool
from tests.support.receiver import ROOT

pytestmark = pytest.mark.hdfs

# Who runs the tests in the background may have Ctrl-C ignored, which programs that it starts inherit.
HEARD = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
ADDRESS = re.compile(r"^(?:HDFS|WebHDFS) +(\S+)$", re.MULTILINE)


def test_it_serves_until_ctrl_c(tmp_path: Path) -> None:
    make = require_tool("make", "make")
    try:
        java()
    except ExternalMissing as error:
        assert os.environ.get("SPHERE_REQUIRE_ALL") != "1", str(error)
        pytest.skip(str(error))
    target = [make, "--old-file=.venv/.ready-test", f"BIN={Path(sys.executable).parent}", "hdfs"]
    running = subprocess.Popen(
        [sys.executable, "-c", HEARD, *target], cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert running.stdout is not None
    started: list[psutil.Process] = []
    try:
        told = ""
        while "Ctrl-C stops it." not in told:
            line = running.stdout.readline()
            assert line, told
            told += line
        started = psutil.Process(running.pid).children(recursive=True)
        assert sum("java" in process.name() for process in started) == 3, "a NameNode and two DataNodes"
        addresses = ADDRESS.findall(told)
        assert [one.partition(":")[0] for one in addresses] == ["hdfs", "webhdfs"]
        for wrote, reads in (addresses, addresses[::-1]):
            storage = open_storage(f"{wrote}/sphere")
            storage.write("folder/file", wrote.encode() * 1000)
            assert open_storage(f"{reads}/sphere").read("folder/file") == wrote.encode() * 1000
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to all that it runs
        running.communicate(timeout=60)
        assert psutil.wait_procs(started, timeout=20)[1] == []
        assert list(tmp_path.iterdir()) == [], "its temporary folder is gone"
    finally:
        running.kill()
        for process in started:
            if process.is_running():
                process.kill()

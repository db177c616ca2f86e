"""`make demo`, what stands behind it: every step is shown and timed, the archive goes on until Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.spark, pytest.mark.timeout(600)]

STEPS = ("init", "serve", "echo", "store", "extract", "find", "sql", "status")
GOES_ON = re.compile(r"The archive goes on serving: .* to SPHERE@127.0.0.1:(\d+); Ctrl-C stops it")
DEMO = """
import signal
from sphere.demo import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests in the background may have it ignored
raise SystemExit(main())
"""


def test_it_tells_its_steps_and_serves_until_ctrl_c(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    demo = subprocess.Popen(
        [sys.executable, "-c", DEMO],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert demo.stdout is not None
    try:
        told = ""
        while not (serving := GOES_ON.search(told)):
            line = demo.stdout.readline()
            assert line, told
            told += line
        children = psutil.Process(demo.pid).children(recursive=True)
        page = re.search(r"http://127\.0\.0\.1:\d+/", demo.stdout.readline())
        assert page is not None
        with urllib.request.urlopen(page[0], timeout=60) as answer:
            assert answer.status == 200
        echo = [sys.executable, "-m", "sphere.cli", "echo", f"SPHERE@127.0.0.1:{serving[1]}"]
        assert subprocess.run(echo, check=False, cwd=tmp_path, capture_output=True).returncode == 0
    finally:
        demo.send_signal(signal.SIGINT)
        try:
            rest, _ = demo.communicate(timeout=120)
        finally:
            demo.kill()
    assert demo.returncode == 0, rest
    assert "archive stopped" in rest
    assert not psutil.wait_procs(children, timeout=30)[1], "who serves ends with it"
    steps = re.findall(r"^\$ \.venv/bin/sphere (?:--\S+ \S+ )*(\w+)", told, re.MULTILINE)
    assert tuple(steps) == STEPS
    assert len(re.findall(r"^  \[\d+\.\d s\]$", told, re.MULTILINE)) == len(STEPS) + 1, (
        "each with its time, samples too"
    )
    report = re.search(r"(\d+) read: (\d+) rows \(0 updated\), (\d+) duplicates .*, 0 rejected", told)
    assert report is not None, told
    read, rows, duplicates = map(int, report.groups())
    assert read == rows + duplicates
    assert f"{rows} instances, 0 quarantine" in told  # of the status

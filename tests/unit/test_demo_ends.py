"""What ends `make demo` before its end: one line, and the archive is stopped."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

DEMO = """
import signal, sys
from sphere import demo

def main():
    try:
        signal.raise_signal(int(sys.argv[1]))
    finally:
        print("archive stopped")

signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests in the background may have it ignored
demo.main = main
demo.start()
"""


@pytest.mark.parametrize(("number", "status"), [(2, 130), (15, 143), (1, 129)])
def test_a_signal_is_one_line_and_stops_the_archive(number: int, status: int) -> None:
    run = subprocess.run(
        [sys.executable, "-c", DEMO, str(number)], capture_output=True, text=True, check=False, timeout=60
    )
    assert (run.returncode, run.stdout, run.stderr) == (status, "archive stopped\n", "demo: interrupted\n")

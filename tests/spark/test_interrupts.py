"""Ctrl-C at chosen points of a verb that starts Spark, the real one: one line, status 130, no JVM left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.spark

AT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests in the background may have it ignored
event, words, config = sys.argv[1:4]
left = [1]

def reach(seen):  # as if Ctrl-C came now
    if words in seen and left:
        left.clear()
        print("reached", flush=True)
        signal.raise_signal(signal.SIGINT)

def heard(name, arguments):
    if name == event:
        reach(str(arguments))

sys.addaudithook(heard)
if event == "answer":  # in the middle of waiting for what the JVM answers to a command, where no other may be asked
    import socket
    from py4j.clientserver import ClientServerConnection

    send, read, asked = ClientServerConnection.send_command, socket.SocketIO.readinto, [""]

    def sending(self, command):
        asked.append(command)
        try:
            return send(self, command)
        finally:
            asked.pop()

    def reading(self, buffer):
        reach(asked[-1])
        return read(self, buffer)

    ClientServerConnection.send_command, socket.SocketIO.readinto = sending, reading
if event == "finalizer":  # where no exception comes out of
    import weakref

    class Gone:
        def __del__(self):
            reach("")

    def opened(name, arguments):
        if name == "open" and "driver.log" in str(arguments[0]):
            Gone()

    sys.addaudithook(opened)

from sphere.start import main
sys.argv = ["sphere", "--config", config, "sql", "SELECT 1"]
main()
"""


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ("import", "'click'"),  # the command line is read in
        ("import", "'pyspark.sql'"),
        ("open", "driver.log"),
        ("subprocess.Popen", "pyspark-shell"),
        ("socket.connect", "127.0.0.1"),  # the JVM is there, and is connected to
        ("answer", "SparkConf"),
        ("answer", "JavaSparkContext"),  # the one that takes seconds
        ("answer", "classic.SparkSession"),  # where PySpark has taken SIGINT for itself
        ("answer", "SELECT 1"),
        ("finalizer", ""),
    ],
)
def test_ctrl_c_is_one_line_whatever_it_breaks_off(tmp_path: Path, event: str, words: str) -> None:
    config = tmp_path / "sphere.toml"
    config.write_text('[spark]\nmaster = "local[1]"\ndriver_memory = "512m"\n')
    command = [sys.executable, "-c", AT, event, words, str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        process, started = psutil.Process(running.pid), set[psutil.Process]()
        while running.poll() is None:
            started.update(process.children(recursive=True))
            try:
                running.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        assert running.stdout.read() == "reached\n"
        assert (running.returncode, running.stderr.read()) == (130, "sphere: interrupted\n")
    assert psutil.wait_procs(started, timeout=30)[1] == []

"""The worked session of the README runs as it stands, as a stranger would type it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydicom.data import get_testdata_file

from sphere.demo import free_port

pytestmark = [pytest.mark.spark, pytest.mark.timeout(600)]

README = Path(__file__).parent.parent.parent / "README.md"
SAMPLES = ("CT_small.dcm", "MR_small.dcm", "examples_palette.dcm")


def commands(port: int) -> list[str]:
    """The lines of the session, on a free port."""
    [block] = re.findall(r"```console\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.removeprefix("$ ") for line in block.splitlines()]
    assert len(lines) >= 8
    return [line.replace("11112", str(port)) for line in lines]


def test_the_worked_session_of_the_readme(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for name in SAMPLES:
        shutil.copy(str(get_testdata_file(name)), tmp_path / "samples")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("SPHERE_CONFIG", None)
    environment["SPHERE_WEB__PORT"] = "0"
    output: dict[str, str] = {}
    server: subprocess.Popen[str] | None = None
    try:
        for line in commands(free_port()):
            arguments = shlex.split(line.removesuffix("&"))
            if line.endswith("&"):
                server = subprocess.Popen(arguments, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
                assert server.stdout is not None and "serves DICOM" in server.stdout.readline()
                continue
            run = subprocess.run(
                arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
            )
            assert run.returncode == 0, f"{line}: {run.stderr}"
            output[next(verb for verb in arguments[1:] if verb in VERBS)] = run.stdout
    finally:
        if server is not None:
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
    assert "3 sent, 0 failed" in output["store"]
    assert output["extract"].startswith("3 read: 3 rows (0 updated), 0 duplicates (0 conflicts), 0 rejected")
    assert "CompressedSamples^CT1" in output["find"] and "(3 rows)" in output["find"]
    assert re.search(r"^ CT +1$", output["sql"], re.MULTILINE)
    assert "waiting     0 members" in output["status"]


VERBS = {"init", "echo", "store", "extract", "find", "sql", "status"}

"""Libraries in processes of ours: what they warn of quotes values, and goes nowhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from sphere.ingest.header import dataset_json
from tests.support.headers import EXPLICIT_LE, IMPLICIT_LE, element, implicit, text
from tests.support.receiver import ROOT

pytestmark = pytest.mark.unit

WARNED = """
import io, pathlib, sys
from pydicom import dcmread
from pydicom.charset import convert_encodings
from pydicom.dataelem import DataElement
convert_encodings(["ISO-IR 100"])
DataElement(0x00100030, "DA", "Kowalski")
data = pathlib.Path(sys.argv[1]).read_bytes()
str(dcmread(io.BytesIO(data), force=True))
print("done")
"""
READY = {
    "a command, or a child of serve": "from sphere.conf import logs; logs.configure('debug')",
    "a log that is kept": "from pathlib import Path; from sphere.conf import logs; logs.configure('debug'); "
    "logs.keep(Path(sys.argv[2]))",
    "a worker of Spark": "from sphere.conf import logs; logs.quiet(everything=True)",
    "somebody's own": "from sphere.scp.libraries import prepare_libraries; prepare_libraries()",
}


@pytest.mark.parametrize("process", READY)
def test_nothing_of_pydicom_is_told(tmp_path: Path, process: str) -> None:
    data = tmp_path / "odd"
    data.write_bytes(
        text("SpecificCharacterSet", "CS", "ISO-IR 100")
        + text("StudyDate", "DA", "Kowalski")
        + text("StudyInstanceUID", "UI", "1.2.*")
        + text("NumberOfFrames", "IS", "1A")
    )
    kept = tmp_path / "log"
    code = f"import sys; {READY[process]}\n{WARNED}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(data), str(kept)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert not kept.exists() or kept.read_text() == ""


def test_a_recorded_identifier_is_told_whole_or_not_as_json() -> None:
    name = text("PatientName", "PN", "Doe^*")
    assert orjson.loads(dataset_json(name, EXPLICIT_LE)) == {
        "00100010": {"vr": "PN", "Value": [{"Alphabetic": "Doe^*"}]}
    }
    assert orjson.loads(dataset_json(implicit("InstanceNumber", b"1*"), IMPLICIT_LE))["00200013"]["Value"] == ["1*"]
    assert dataset_json(b"", EXPLICIT_LE) == ""
    assert dataset_json(name[:-2], EXPLICIT_LE) == ""  # cut
    assert dataset_json(name + name, EXPLICIT_LE) == ""  # one hides the other
    assert "00080020" in dataset_json(name + text("StudyDate", "DA", "2026*"), EXPLICIT_LE)  # out of order
    assert dataset_json(name + b"\x10\0", EXPLICIT_LE) == ""
    assert dataset_json(name + element(0x00420011, "OB", bytes(2000)), EXPLICIT_LE) == ""

"""What `sphere extract` says: its one line, whatever is waiting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sphere.catalog.audit import AuditJournal
from sphere.ingest.storage import open_storage
from tests.support.headers import element, implicit, instance, item, sequence, text
from tests.support.landing import archive, land, new_member, table_rows
from tests.support.receiver import ROOT

pytestmark = pytest.mark.spark

SECRETS = ("Kowalski", "1.2.*", "1A", "9999991234", "ISO-IR 100")
ODD = (
    text("SpecificCharacterSet", "CS", "ISO-IR 100"),
    element("PatientName", "PN", b"Kowalski^\xb3\x1b$B"),
    text("PatientBirthDate", "DA", "Kowalski"),
    text("PatientID", "LO", "9999991234"),
    text("StudyInstanceUID", "UI", "1.2.*"),
    text("NumberOfFrames", "IS", "1A"),
    element(0x00110010, "LO", b"Kowalski"),
    element(0x00111001, "FD", b"Kowa"),
)
ASKED = (
    (b"".join(ODD[:-1]), "1.2.840.10008.1.2.1"),
    (implicit(0x00080005, b"ISO-IR 100") + implicit("PatientName", b"Kowalski"), "1.2.840.10008.1.2"),
    (b"".join(ODD), "1.2.840.10008.1.2.1"),
    (sequence("ReferencedPatientSequence", item(*ODD[:-1])), "1.2.840.10008.1.2.1"),
)


def test_one_line_and_no_value(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    land(settings, [new_member(instance(*(one for one in ODD if b"1.2.*" not in one)))])
    journal = AuditJournal(open_storage(settings.storage.root), settings.archive.state_dir / "audit.jsonl")
    for identifier, syntax in ASKED:
        journal.add(who="ae:ASKS", method="C-FIND", identifier=identifier.hex(), transfer_syntax=syntax)
    journal.close()
    config = tmp_path / "sphere.toml"
    config.write_text('[storage]\nroot = "file:storage"\n[spark]\nmaster = "local[2]"\nshuffle_partitions = 2\n')
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-m", "sphere.cli", "--config", str(config), "extract"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    assert not [secret for secret in SECRETS if secret in done.stdout]
    recorded = [row["query"] for row in table_rows(settings, "audit")]
    assert len(recorded) == len(ASKED)
    assert sum("Kowalski" in query or b"Kowalski".hex() in query for query in recorded) == len(ASKED)

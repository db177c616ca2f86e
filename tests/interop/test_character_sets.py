"""A name is found by its own bytes, by its text in UTF-8 and by a part of it, whatever set it was stored in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sphere.scp import client
from sphere.scp.upper import command
from tests.support.headers import EXPLICIT_LE, IMPLICIT_LE, element, implicit, instance, text
from tests.support.raw_peer import RawPeer, associate_rq, p_data, pdv
from tests.support.receiver import Receiver, running_receiver

pytestmark = pytest.mark.interop

FIND = "1.2.840.10008.5.1.4.1.2.1.1"  # Patient Root
STORED = {  # SpecificCharacterSet and the bytes of a name: (name, a wild card that finds no other)
    ("ISO 2022 IR 100\\ISO 2022 IR 126", b"\x1b-F\xc4\xe9\xef^M\xfcller"): ("Διο^Müller", "*^müller"),
    ("\\ISO 2022 IR 58", b"Zhang^XiaoDong=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab"): (
        "Zhang^XiaoDong=张^小东",
        "*=张^小*",
    ),
    ("ISO_IR 203", b"\xbcuvre^\xa4"): ("Œuvre^€", "œuvre*"),
    ("\\ISO 2022 IR 203", b"\x1b-b\xbd^\x1b-b\xa4"): ("œ^€", "œ^*"),
    ("\\ISO 2022 IR 149", b"Hong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7"): ("Hong=洪^吉洞", "*=洪^*"),
    ("ISO 2022 IR 13\\ISO 2022 IR 87", b"\xd4\xcf\xc0\xde^\xc0=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J"): (
        "ﾔﾏﾀﾞ^ﾀ=山田^太郎",
        "*=山田*",
    ),
}


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """With a patient of each name."""
    base = tmp_path_factory.mktemp("sets")
    files: list[Path] = []
    for number, (charset, raw) in enumerate(STORED):
        identity = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "SOPInstanceUID": f"1.2.3.4.{number}",
                    "StudyInstanceUID": f"1.2.3.{number}", "SeriesInstanceUID": f"1.2.3.{number}.1"}  # fmt: skip
        elements = [text(keyword, "UI", uid) for keyword, uid in identity.items()]
        data = instance(
            text("SpecificCharacterSet", "CS", charset),
            element("PatientName", "PN", padded(raw)),
            text("PatientID", "LO", f"P{number}"),
            identity=tuple(elements),
        )
        files.append(base / f"{number}.dcm")
        files[-1].write_bytes(data)
    with running_receiver(base / "archive") as running:
        assert all(one.stored for one in client.store(running.peer, files, settings=running.settings))
        yield running
        assert "find id=" in running.log
        assert not [word for word in ("pydicom", "Warning", "uvre", "Zhang", "ISO") if word in running.log]


def padded(raw: bytes) -> bytes:
    return raw + b" " * (len(raw) % 2)


def found(receiver: Receiver, charset: str, name: bytes, syntax: str) -> list[bytes]:
    """The identifiers of the answers to a name, as they came."""
    make = implicit if syntax == IMPLICIT_LE else None
    keys = [("SpecificCharacterSet", "CS", charset.encode()), ("QueryRetrieveLevel", "CS", b"PATIENT"),
            ("PatientName", "PN", name), ("PatientID", "LO", b"")]  # fmt: skip
    data = b"".join(make(tag, padded(raw)) if make else element(tag, vr, padded(raw)) for tag, vr, raw in keys)
    fields = {"AffectedSOPClassUID": FIND, "CommandField": 0x20, "MessageID": 1, "Priority": 0, "CommandDataSetType": 0}
    peer = RawPeer.connect(receiver.port)
    peer.associate(associate_rq([FIND], syntax=syntax))
    peer.send(p_data(pdv(1, 3, command.encode(fields)), pdv(1, 2, data)))
    answers: list[bytes] = []
    while peer.response()["Status"] == 0xFF00:
        answer = peer.receive()
        assert answer is not None
        answers.append(answer[1][6:])
    peer.release()
    return answers


@pytest.mark.parametrize("syntax", [EXPLICIT_LE, IMPLICIT_LE])
@pytest.mark.parametrize(("charset", "raw"), STORED)
def test_a_name_is_found(receiver: Receiver, charset: str, raw: bytes, syntax: str) -> None:
    name, wild_card = STORED[charset, raw]
    patient = f"P{list(STORED).index((charset, raw))}".encode()
    for asked_in, key in ((charset, raw), ("ISO_IR 192", name.encode()), ("ISO_IR 192", wild_card.encode())):
        [answer] = found(receiver, asked_in, key, syntax)
        assert patient in answer
        assert name.encode() in answer and b"ISO_IR 192" in answer

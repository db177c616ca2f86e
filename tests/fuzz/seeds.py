"""The corpus that fuzzing starts from, made anew by ``python -m tests.fuzz seeds``: generated data only."""

from __future__ import annotations

import io
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import orjson

from sphere.conf.loading import from_dict
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.journal import journal_path
from sphere.ingest.storage import open_storage
from tests.support.bundles import all_records, new_member
from tests.support.headers import (
    DEFLATED,
    EXPLICIT_BE,
    EXPLICIT_LE,
    IDENTITY,
    IMPLICIT_BODY,
    IMPLICIT_LE,
    element,
    item,
    part10,
    sequence,
    text,
)
from tests.support.raw_peer import associate_rq, echo_rq, identifying, p_data, pdu, pdv, store_rq

SYNTAXES: Final = (IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE, DEFLATED)

Seeds = dict[str, bytes]


def pdus() -> Seeds:
    """Associations, whole and in pieces; the first byte says whether an A-ASSOCIATE-RQ is expected."""
    data = identifying("1.2.3")
    store = p_data(pdv(3, 3, store_rq("1.2.3")), pdv(3, 0, data[:20]), pdv(3, 2, data[20:]))
    cut = b"".join(p_data(pdv(3, 0, data[at : at + 8])) for at in range(0, 64, 8)) + p_data(pdv(3, 2, b""))
    release, abort = pdu(0x05, bytes(4)), pdu(0x07, bytes((0, 0, 2, 6)))
    return {
        "associate-echo-release": b"\0" + associate_rq() + echo_rq() + release,
        "associate-store": b"\0" + associate_rq() + store + store,
        "associate-abort": b"\0" + associate_rq() + abort,
        "echo": b"\1" + echo_rq() + echo_rq(2) + release,
        "store": b"\1" + store,
        "store-in-pieces": b"\1" + p_data(pdv(3, 3, store_rq("1.2.3.4"))) + cut + abort,
        "overrun": b"\1" + p_data(pdv(3, 3, b"x", length=0xFFFFFFFF)),
        "endless": b"\1" + pdu(0x04, b"", length=0xFFFFFFFF),
    }


def commands() -> Seeds:
    """Command sets of requests and responses."""
    from sphere.scp.upper import command

    common = {"AffectedSOPClassUID": "1.2.840.10008.5.1.4.1.1.2", "MessageID": 7, "CommandDataSetType": 0}
    return {
        "store": store_rq("1.2.3"),
        "move": command.encode({**common, "CommandField": 0x21, "MoveDestination": "WARD", "Priority": 0}),
        "get-rsp": command.encode(
            {"CommandField": 0x8010, "MessageIDBeingRespondedTo": 3, "CommandDataSetType": 0x0101, "Status": 0xFF00,
             "NumberOfRemainingSuboperations": 1, "NumberOfCompletedSuboperations": 2}
        ),
        "failure": command.encode(
            {"CommandField": 0x8020, "MessageIDBeingRespondedTo": 3, "CommandDataSetType": 0x0101, "Status": 0xA900,
             "OffendingElement": [0x00080052], "ErrorComment": "what is wrong"}
        ),
        "n-action": command.encode(
            {**common, "CommandField": 0x0130, "RequestedSOPInstanceUID": "1.2", "ActionTypeID": 1}
        ),
    }  # fmt: skip


def headers() -> Seeds:
    """Data sets; the first byte says how the target wraps them (see `tests.fuzz.landing.headers`)."""
    rich = _rich()
    big = b"".join(
        element(tag, vr, value, order=">")
        for tag, vr, value in (
            ("SOPInstanceUID", "UI", b"1.2.3.4\0"),
            ("StudyInstanceUID", "UI", b"1.2.3\0"),
            ("SeriesInstanceUID", "UI", b"1.2.3.1\0"),
            ("Rows", "US", b"\x02\x00"),
        )
    )
    return {
        "implicit": b"\0" + IMPLICIT_BODY,
        "explicit": b"\1" + rich,
        "big-endian": b"\2" + big,
        "deflated": b"\3" + rich,
        "file": b"\4" + part10(rich),
        "file-implicit": b"\4" + part10(IMPLICIT_BODY, syntax=IMPLICIT_LE),
        "bare": b"\4" + rich,
    }


def _rich() -> bytes:
    """The modules that make typed columns, character sets, nesting, and pixel data."""
    code = item(text("CodeValue", "SH", "113000"), text("CodeMeaning", "LO", "what"))
    elements = [
        *IDENTITY,
        text("SpecificCharacterSet", "CS", "ISO 2022 IR 6\\ISO 2022 IR 87"),
        text("StudyDate", "DA", "20260203"),
        text("StudyTime", "TM", "040506.7"),
        text("AcquisitionDateTime", "DT", "20260203040506+0100"),
        text("Modality", "CS", "CT"),
        element("PatientName", "PN", b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B "),
        text("SliceThickness", "DS", "1.25"),
        text("ImageOrientationPatient", "DS", "1\\0\\0\\0\\1\\0"),
        text("InstanceNumber", "IS", "5"),
        element("Rows", "US", b"\x02\0"),
        element("PixelSpacing", "DS", b"0.5\\0.5 "),
        sequence("ConceptNameCodeSequence", code, item(code, undefined=True), undefined=True),
        text(0x00290010, "LO", "SIEMENS CSA HEADER"),
        element(0x00291010, "OB", b"\0\1\2\3"),
        element("PixelData", "OB", b"\0" * 8),
    ]
    return b"".join(sorted(elements, key=lambda raw: struct.unpack_from("<HH", raw)))


def identifiers() -> Seeds:
    """Identifiers of queries and retrievals; two bytes of `tests.fuzz.dimse.identifiers` come first."""
    from pydicom import Dataset, dcmwrite

    def written(**keys: Any) -> Iterator[bytes]:
        dataset = Dataset()
        for keyword, value in keys.items():
            setattr(dataset, keyword, value)
        for implicit_vr, little in ((True, True), (False, True), (False, False)):
            buffer = io.BytesIO()
            dcmwrite(buffer, dataset, implicit_vr=implicit_vr, little_endian=little)
            yield buffer.getvalue()
        stream = zlib.compressobj(wbits=-15)
        yield stream.compress(next(written_explicit(dataset))) + stream.flush()

    def written_explicit(dataset: Dataset) -> Iterator[bytes]:
        buffer = io.BytesIO()
        dcmwrite(buffer, dataset, implicit_vr=False, little_endian=True)
        yield buffer.getvalue()

    item = Dataset()
    item.CodeValue = "113000"
    queries: dict[str, dict[str, Any]] = {
        "study": {"QueryRetrieveLevel": "STUDY", "PatientName": "D*^J?ne", "StudyDate": "20240101-", "StudyTime": "08-",
                  "ModalitiesInStudy": ["CT", "MR"], "SpecificCharacterSet": "ISO_IR 192"},
        "image": {"QueryRetrieveLevel": "IMAGE", "StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.3",
                  "SOPInstanceUID": ["1.4", "1.5"], "ConceptNameCodeSequence": [item]},
    }  # fmt: skip
    return {
        f"{name}-{number}": bytes((number | 0x40, number)) + data
        for name, keys in queries.items()
        for number, data in enumerate(written(**keys))
    }


def bundles() -> Seeds:
    """What may stand after good members; the first two bytes are `tests.fuzz.landing.bundles`' own."""
    tar, journal = three_members()
    member = tar[: len(tar) // 3]
    records = member[512 : 512 + member[512:].index(b"\0")]
    return {
        "whole": b"\0\1" + tar[:2048],
        "torn": b"\3\0" + member[: len(member) // 2],
        "zeros": b"\2\1" + bytes(700),
        "member": b"\1\3" + (16).to_bytes(8, "big") + records,
        "size": b"\1\2" + (16).to_bytes(8, "big") + b"11 size=99\n" + records,
        "journal": b"\0\4" + journal,
    }


def three_members() -> tuple[bytes, bytes]:
    """A sealed bundle of three small members, and its journal."""
    with tempfile.TemporaryDirectory() as folder:
        settings = from_dict({}, base=Path(folder))
        storage = open_storage(settings.storage.root)
        writer = BundleWriter(storage, settings)
        for number in (1, 2, 3):
            writer.store(new_member(number, b"data set %d" % number, preamble=b""))
        writer.close()
        bundle = all_records(storage)[0].bundle
        return storage.read(bundle), storage.read(journal_path(bundle))


def multipart() -> Seeds:
    """Bodies of parts; the first two bytes are `tests.fuzz.web.multipart`'s own."""
    head = b"--B-1\r\nContent-Type: application/dicom\r\n\r\n"
    return {
        "two-parts": b"\0\5" + head + b"one\r\n" + head + b"two\r\n--B-1--\r\n",
        "no-headers": b"\0\0--B-1 \t\r\n\r\n\r\n--B-1\r\n\r\nbody\r\n--B-1--",
        "preamble": b"\0\7to be left out\r\n" + head + b"\r\n--B-12\r\n--B-1-\r\n--B-1--and what follows",
        "padding": b"\0\3--B-1" + b" " * 120 + b"\r\n\r\nbody\r\n--B-1--",
        "no-end": b"\0\2" + head + b"body\r\n--B-1",
        "head-at-its-limit": b"\0\1--B-1\r\nX: " + b"x" * 93 + b"\r\n\r\n\r\n--B-1--",
        "long-preamble": b"\0\1" + b"x" * 300 + b"\r\n" + head + b"\r\n--B-1--",
        "valid": b"\1\4text of a header\x1eits part\x1e\x1e\r\n--B-\x1e--B\r\n",
        "media-types": b'\2\0multipart/related; type="image/jpeg"; transfer-syntax=*; q=0.5, */*;q=0.1',
    }


def metadata() -> Seeds:
    """Data sets in JSON and XML with sequences, private elements and bulk data (see `tests.fuzz.store.metadata`)."""
    from sphere.scp.web.native_xml import native_model

    header: dict[str, Any] = {
        "00080005": {"vr": "CS", "Value": ["ISO_IR 192"]},
        "00080016": {"vr": "UI", "Value": ["1.2.840.10008.5.1.4.1.1.7"]},
        "00080018": {"vr": "UI", "Value": ["1.2.3.4"]},
        "00081140": {"vr": "SQ", "Value": [{"00081155": {"vr": "UI", "Value": ["1.2"]}}, {}]},
        "00090010": {"vr": "LO", "Value": ["ACME"]},
        "00091001": {"vr": "UN", "InlineBinary": "AAE="},
        "00100010": {"vr": "PN", "Value": [{"Alphabetic": "Roe^Jane", "Ideographic": "\u5c71"}, {}]},
        "00101030": {"vr": "DS", "Value": [70.5]},
        "0020000D": {"vr": "UI", "Value": ["1.2.3"]},
        "00200032": {"vr": "DS", "Value": [1, None, -3]},
        "00280010": {"vr": "US", "Value": [2]},
        "00280009": {"vr": "AT", "Value": ["00181063"]},
        "00280100": {"vr": "US", "Value": [8]},
        "00400440": {"vr": "SQ"},
    }

    def with_pixels(**element: Any) -> bytes:
        return orjson.dumps([{**header, "7FE00010": {"vr": "OB", **element}, "FFFCFFFC": {"vr": "OB"}}])

    xml = native_model({**header, "7FE00010": {"vr": "OW", "BulkDataURI": "a/1"}})
    gaps = b'<NativeDicomModel><DicomAttribute tag="00280010" vr="US"><Value number="%d">1</Value></DicomAttribute>'
    return {
        "json": b"\0" + with_pixels(InlineBinary="AQIDBA=="),
        "json-bulk": b"\0" + with_pixels(BulkDataURI="a/1"),
        "json-base": b"\2" + with_pixels(BulkDataURI="1"),
        "json-frames": b"\0" + with_pixels(BulkDataURI="frames"),
        "json-twice": b'\0{"00100020":{"vr":"LO"},"00100020":{"vr":"LO","Value":["A"]}}',
        "json-plain": b'\0[{"00080018":{"vr":"UI","Value":["1.2"]}},{"00100020":{"vr":"LO","BulkDataURI":"http://x/a/1"}}]',
        "xml": b"\1" + xml,
        "xml-base": b"\3" + xml.replace(b"a/1", b"1"),
        "xml-gaps": b"\1" + gaps % 64 + b"</NativeDicomModel>",
        "xml-far": b"\1" + gaps % 70000 + b"</NativeDicomModel>",
    }


def parameters() -> Seeds:
    """See `tests.fuzz.web.parameters`."""
    size = bytes((2, 0, 1, 0))
    return {
        "viewport": b"\0" + size + b"128,64",
        "region": b"\0" + size + b"8192,8192,10,20,-30,-40",
        "rest": b"\0" + size + b"1,1,0,0,,",
        "window": b"\1" + size + b"-40.5,400,linear-exact",
        "range": b"\2" + size + b"bytes=1-100",
        "suffix": b"\2" + size + b"bytes=-100",
        "accept": b"\3" + size + b"image/*;q=0.1, image/png, */*;q=0",
    }


SEEDS = {
    "pdus": pdus,
    "commands": commands,
    "headers": headers,
    "identifiers": identifiers,
    "bundles": bundles,
    "multipart": multipart,
    "metadata": metadata,
    "parameters": parameters,
}

"""C-FIND by other people's programs over what they sent: every level, every model, every character set."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, build_context
from pynetdicom.pdu_primitives import SOPClassExtendedNegotiation
from pyspark.sql import SparkSession

from sphere.catalog.query import Features
from sphere.catalog.schema import TABLES
from sphere.conf.errors import PeerError
from sphere.conf.loading import from_dict
from sphere.jobs.extract import run
from sphere.scp import client
from sphere.scp.identifier import build_identifier
from tests.support.catalog import write_catalog, write_table
from tests.support.dicom_tools import Orthanc, findscu, run_tool, running_orthanc
from tests.support.receiver import Receiver, running_receiver
from tests.support.samples import make_instance, sendable_files

pytestmark = [pytest.mark.interop, pytest.mark.spark]

STUDY_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
PATIENT_FIND = "1.2.840.10008.5.1.4.1.2.1.1"

NAMES = {  # Specific Character Set (PS3.3 C.12.1.1.2), and a name that it can write
    "ISO_IR 100": "Buc^Jérôme",
    "ISO_IR 101": "Wałęsa^Łukasz",
    "ISO_IR 109": "Ħal^Ġorġ",
    "ISO_IR 110": "Bērziņš^Jānis",
    "ISO_IR 126": "Διονυσιος",
    "ISO_IR 127": "قباني^لنزار",
    "ISO_IR 138": "שרון^דבורה",
    "ISO_IR 144": "Люкceмбypг",
    "ISO_IR 148": "Çavuşoğlu^Işık",
    "ISO_IR 166": "สมชาย^ใจดี",
    "ISO_IR 13": "ﾔﾏﾀﾞ^ﾀﾛｳ",
    "ISO_IR 192": "Wang^XiaoDong=王^小東",
    "ISO 2022 IR 100": "Äneas^Rüdiger",
    "ISO 2022 IR 6\\ISO 2022 IR 87": "Suzuki^Hanako=鈴木^花子",
    "GB18030": "Wang^XiaoDong=王^小东",
    "GBK": "Li^Ming=李^明",
    "\\ISO 2022 IR 87": "Yamada^Tarou=山田^太郎=やまだ^たろう",
    "ISO 2022 IR 13\\ISO 2022 IR 87": "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう",
    "\\ISO 2022 IR 149": "Hong^Gildong=洪^吉洞=홍^길동",
}
ORTHANC_ENCODINGS = {
    "ISO_IR 100": "Latin1",
    "ISO_IR 144": "Cyrillic",
    "GB18030": "Chinese",
}  # others are asked in UTF-8
UNIQUE = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
TEXT_KEYS = {  # by level, a key whose text is written in the instance's character set
    "PATIENT": "PatientName",
    "STUDY": "StudyDescription",
    "SERIES": "SeriesDescription",
    "IMAGE": "ImageComments",
}


def text_of(name: str) -> str:
    """The last group of a person's name, which its character set was chosen for, as plain text.

    Without a space, which pydicom does not write beside katakana of ISO_IR 13.
    """
    return name.rpartition("=")[2].replace("^", "")


@dataclass
class Archive:
    """A receiver whose catalog holds the sample files, and what pydicom reads of them."""

    receiver: Receiver
    series: dict[str, dict[str, set[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))
    patients: dict[str, str] = field(default_factory=dict)  # by study
    names: dict[str, tuple[str, str]] = field(default_factory=dict)  # name and character set, by study
    images: list[tuple[str, str, str]] = field(default_factory=list)  # study, modality, number of the instance
    places: dict[str, dict[str, str]] = field(default_factory=dict)  # unique keys of what was made, by character set

    def add(self, path: Path) -> None:
        """Note a file that was stored, if it can be a row of `instances`."""
        dataset = pydicom.dcmread(path, force=True, stop_before_pixels=True)
        uids = [
            str(dataset.get(keyword, "")) for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
        ]
        if not all(re.fullmatch(r"[0-9.]{1,64}", uid) for uid in uids):
            return
        study, series, instance = uids
        self.series[study][series].add(instance)
        number = dataset.get("InstanceNumber")
        self.images.append((study, str(dataset.get("Modality") or ""), "" if number is None else str(number)))
        self.patients[study] = str(dataset.get("PatientID") or "")
        charset = dataset.get("SpecificCharacterSet") or ""
        name = str(dataset.get("PatientName") or "")
        if not name.isascii():
            self.names[study] = (name, charset if isinstance(charset, str) else "\\".join(charset))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, spark: SparkSession) -> Iterator[Archive]:
    made = tmp_path_factory.mktemp("made")
    files = sendable_files()
    for number, (charset, name) in enumerate(NAMES.items()):
        path, sets = made / f"{number}.dcm", charset.split("\\")
        texts = dict.fromkeys(TEXT_KEYS.values(), text_of(name)) | {"PatientName": name}
        files.append(make_instance(path, SpecificCharacterSet=sets, PatientID=f"CS{number}", **texts))
    with running_receiver(tmp_path_factory.mktemp("archive")) as receiver:
        archive = Archive(receiver)
        for path, charset in zip(files[-len(NAMES) :], NAMES, strict=True):
            made_of = pydicom.dcmread(path)
            archive.places[charset] = {keyword: str(made_of[keyword].value) for keyword in UNIQUE}
        for result in client.store(receiver.peer, files, settings=receiver.settings):
            if result.stored:
                archive.add(Path(result.source))
        report = run(spark, receiver.settings)
        assert report.rows == sum(len(uids) for study in archive.series.values() for uids in study.values())
        yield archive


@pytest.fixture(scope="module")
def orthanc(archive: Archive, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    folder = tmp_path_factory.mktemp("orthanc")
    with running_orthanc(folder, {"sphere": ("SPHERE", archive.receiver.port)}) as running:
        yield running


def some_studies(archive: Archive) -> list[str]:
    """The study of most series, that of most instances, and that of the first UID."""
    studies = {study: series for study, series in archive.series.items() if archive.patients[study]}
    most_series = max(studies, key=lambda uid: len(studies[uid]))
    most_instances = max(studies, key=lambda uid: sum(map(len, studies[uid].values())))
    return sorted({most_series, most_instances, min(studies)})


folders = count()


def ask(archive: Archive, tmp_path: Path, keys: list[str], *options: str) -> list[Dataset]:
    return findscu(archive.receiver.port, tmp_path / str(next(folders)), keys, *options)


@pytest.mark.parametrize("model", ["-P", "-O"])
def test_findscu_patients(archive: Archive, tmp_path: Path, model: str) -> None:
    keys = ["QueryRetrieveLevel=PATIENT", "PatientID", "PatientName", "NumberOfPatientRelatedInstances"]
    answers = ask(archive, tmp_path, keys, model)
    assert {answer.PatientID for answer in answers} == set(archive.patients.values())
    instances = sum(len(uids) for study in archive.series.values() for uids in study.values())
    assert sum(answer.NumberOfPatientRelatedInstances for answer in answers) == instances
    assert all(answer.QueryRetrieveLevel == "PATIENT" for answer in answers)


def test_findscu_studies(archive: Archive, tmp_path: Path) -> None:
    answers = ask(archive, tmp_path, ["QueryRetrieveLevel=STUDY", "PatientID", "StudyInstanceUID"], "-S")
    assert len(answers) == len(archive.patients)
    assert {answer.StudyInstanceUID: answer.PatientID for answer in answers} == archive.patients


@pytest.mark.parametrize("model", ["-P", "-O"])
def test_findscu_studies_of_a_patient(archive: Archive, tmp_path: Path, model: str) -> None:
    for patient in sorted(set(archive.patients.values()) - {""})[:6]:
        keys = ["QueryRetrieveLevel=STUDY", f"PatientID={patient}", "StudyInstanceUID"]
        found = {answer.StudyInstanceUID for answer in ask(archive, tmp_path, keys, model)}
        assert found == {study for study, of in archive.patients.items() if of == patient}


@pytest.mark.parametrize("model", ["-S", "-P"])
def test_findscu_series_and_images(archive: Archive, tmp_path: Path, model: str) -> None:
    for study in some_studies(archive):
        above = [f"StudyInstanceUID={study}"]
        above += [f"PatientID={archive.patients[study]}"] if model == "-P" else []
        keys = [*above, "SeriesInstanceUID", "NumberOfSeriesRelatedInstances"]
        answers = ask(archive, tmp_path, ["QueryRetrieveLevel=SERIES", *keys], model)
        counts = {answer.SeriesInstanceUID: answer.NumberOfSeriesRelatedInstances for answer in answers}
        assert counts == {series: len(uids) for series, uids in archive.series[study].items()}
        series = max(counts, key=lambda uid: int(counts[uid]))
        keys = [*above, f"SeriesInstanceUID={series}", "SOPInstanceUID", "Rows"]
        answers = ask(archive, tmp_path, ["QueryRetrieveLevel=IMAGE", *keys], model)
        assert {answer.SOPInstanceUID for answer in answers} == archive.series[study][series]
        assert len(answers) == len(archive.series[study][series])


@pytest.mark.parametrize("syntax", ["-xi", "-xe", "-xb", "-xd"])
def test_findscu_in_every_encoding(archive: Archive, tmp_path: Path, syntax: str) -> None:
    study = some_studies(archive)[0]
    keys = ["QueryRetrieveLevel=STUDY", f"StudyInstanceUID={study}", "PatientName", "ModalitiesInStudy"]
    [answer] = ask(archive, tmp_path, keys, "-S", syntax)
    assert answer.StudyInstanceUID == study
    assert answer.SpecificCharacterSet == "ISO_IR 192"


@pytest.mark.parametrize("charset", NAMES)
def test_findscu_in_every_character_set(archive: Archive, tmp_path: Path, charset: str) -> None:
    """The query itself is written in the character set of the instance."""
    name = NAMES[charset]
    query = tmp_path / "query.dcm"
    pydicom.dcmwrite(query, _name_query(charset, name), implicit_vr=False, little_endian=True)
    run_tool(
        "findscu", "-S", "-X", "-od", tmp_path, "-k", "StudyInstanceUID", "127.0.0.1", archive.receiver.port, query
    )
    answers = [pydicom.dcmread(path) for path in sorted(tmp_path.glob("rsp*.dcm"))]
    wanted = {study for study, named in archive.names.items() if named == (name, charset)}
    assert wanted
    assert wanted <= {answer.StudyInstanceUID for answer in answers}
    assert all(str(answer.PatientName).startswith(name) for answer in answers)  # a group matches alone, too


@pytest.mark.parametrize("level", TEXT_KEYS)
@pytest.mark.parametrize("charset", NAMES)
def test_findscu_asks_for_text_at_every_level(archive: Archive, tmp_path: Path, charset: str, level: str) -> None:
    """Key and answer are text of the level's own, the query in the character set of the instance."""
    place, keyword = archive.places[charset], TEXT_KEYS[level]
    wanted = NAMES[charset] if level == "PATIENT" else text_of(NAMES[charset])
    for text in (wanted, f"{wanted[:3]}*")[: 1 if charset == "ISO_IR 13" else 2]:  # as for the space in text_of
        query = Dataset()
        query.SpecificCharacterSet = charset.split("\\")
        query.QueryRetrieveLevel = level
        for above in UNIQUE[: list(TEXT_KEYS).index(level)]:
            setattr(query, above, place[above])
        setattr(query, keyword, text)
        asked = tmp_path / "query.dcm"
        pydicom.dcmwrite(asked, query, implicit_vr=False, little_endian=True)
        unique = UNIQUE[list(TEXT_KEYS).index(level)]
        answers = findscu(archive.receiver.port, tmp_path / str(next(folders)), [unique], "-P", query=asked)
        found = {answer[unique].value: str(answer[keyword].value) for answer in answers}
        assert found[place[unique]] == wanted, text


def _name_query(charset: str, name: str) -> Dataset:
    query = Dataset()
    query.SpecificCharacterSet = charset.split("\\")
    query.QueryRetrieveLevel = "STUDY"
    query.PatientName = name
    return query


def test_names_of_real_files_are_answered_as_they_read(archive: Archive) -> None:
    found = {
        match.StudyInstanceUID: str(match.PatientName)
        for match in client.find(
            archive.receiver.peer, {"PatientName": "", "StudyInstanceUID": ""}, settings=archive.receiver.settings
        )
    }
    assert {study: found[study] for study in archive.names} == {
        study: name for study, (name, _) in archive.names.items()
    }


def query(orthanc: Orthanc, level: str, keys: dict[str, str]) -> list[dict[str, str]]:
    """The answers that Orthanc got from us."""
    identity = orthanc.post("/modalities/sphere/query", {"Level": level, "Query": keys})["ID"]
    answers: list[dict[str, str]] = orthanc.get(f"/queries/{identity}/answers?expand&simplify")
    return answers


def test_orthanc_queries_every_level(archive: Archive, orthanc: Orthanc) -> None:
    patients = query(orthanc, "Patient", {"PatientID": ""})
    assert {answer["PatientID"] for answer in patients} == set(archive.patients.values())
    studies = query(orthanc, "Study", {"StudyInstanceUID": "", "PatientID": ""})
    assert {answer["StudyInstanceUID"] for answer in studies} == set(archive.series)
    for study in some_studies(archive):
        answers = query(orthanc, "Series", {"StudyInstanceUID": study, "SeriesInstanceUID": ""})
        assert {answer["SeriesInstanceUID"] for answer in answers} == set(archive.series[study])
        series = max(archive.series[study], key=lambda uid: len(archive.series[study][uid]))
        keys = {"StudyInstanceUID": study, "SeriesInstanceUID": series, "SOPInstanceUID": ""}
        answers = query(orthanc, "Instance", keys)
        assert {answer["SOPInstanceUID"] for answer in answers} == archive.series[study][series]


def test_orthanc_queries_names_in_every_character_set(archive: Archive, orthanc: Orthanc) -> None:
    for charset, name in NAMES.items():
        orthanc.put("/tools/default-encoding", ORTHANC_ENCODINGS.get(charset, "Utf8").encode())
        answers = query(orthanc, "Study", {"PatientName": name, "StudyInstanceUID": ""})
        wanted = {study for study, named in archive.names.items() if named == (name, charset)}
        assert wanted <= {answer["StudyInstanceUID"] for answer in answers}, charset
        assert all(answer["PatientName"].startswith(name) for answer in answers), charset
    orthanc.put("/tools/default-encoding", b"Utf8")


@pytest.mark.parametrize("level", TEXT_KEYS)
def test_orthanc_asks_for_text_at_every_level(archive: Archive, orthanc: Orthanc, level: str) -> None:
    """Of an instance it sends no key of text, so there it is the patient's name."""
    rank = list(TEXT_KEYS).index(level)
    keyword = "PatientName" if level == "IMAGE" else TEXT_KEYS[level]
    for charset, name in NAMES.items():
        place, wanted = archive.places[charset], name if keyword == "PatientName" else text_of(name)
        orthanc.put("/tools/default-encoding", ORTHANC_ENCODINGS.get(charset, "Utf8").encode())
        for text in (wanted, f"{wanted[:3]}*"):
            keys = {above: place[above] for above in UNIQUE[:rank]} | {UNIQUE[rank]: "", keyword: text}
            answers = query(orthanc, "Instance" if level == "IMAGE" else level.title(), keys)
            found = {answer[UNIQUE[rank]]: answer.get(keyword) for answer in answers}
            assert found.get(place[UNIQUE[rank]]) == wanted, (charset, text)
    orthanc.put("/tools/default-encoding", b"Utf8")


def test_orthanc_lets_wild_cards_match(archive: Archive, orthanc: Orthanc) -> None:
    answers = query(orthanc, "Study", {"PatientName": "wang^*", "PatientID": "CS*"})
    assert {answer["PatientName"] for answer in answers} == {NAMES["ISO_IR 192"], NAMES["GB18030"]}


def statuses(receiver: Receiver, identifier: Dataset, sop_class: str, *, extension: bytes = b"") -> list[Dataset]:
    """Every response's status elements, over an association of pynetdicom."""
    ae = AE()
    ae.requested_contexts = [build_context(sop_class)]
    item = SOPClassExtendedNegotiation()
    item.sop_class_uid = sop_class
    item.service_class_application_information = extension
    assoc = ae.associate("127.0.0.1", receiver.port, ext_neg=[item] if extension else None)
    granted = assoc.acceptor.sop_class_extended
    assert granted == ({sop_class: extension} if extension else {})
    found = [status for status, _ in assoc.send_c_find(identifier, sop_class)]
    assoc.release()
    return found


@pytest.mark.parametrize(
    ("keys", "level", "sop_class", "offending"),
    [
        ({"PatientID": "*"}, "", STUDY_FIND, 0x00080052),
        ({}, "WARD", STUDY_FIND, 0x00080052),
        ({}, "PATIENT", STUDY_FIND, 0x00080052),
        ({"PatientID": ""}, "STUDY", PATIENT_FIND, 0x00100020),
        ({"SeriesInstanceUID": ""}, "SERIES", STUDY_FIND, 0x0020000D),
        ({"StudyInstanceUID": "1.2\\1.3", "SeriesInstanceUID": "1.2"}, "IMAGE", STUDY_FIND, 0x0020000D),
        ({"StudyDate": "20249999"}, "STUDY", STUDY_FIND, 0x00080020),
        ({"SOPInstanceUID": "1.2.3"}, "STUDY", STUDY_FIND, 0x00080018),
    ],
)
def test_identifiers_that_break_the_rules(
    archive: Archive, keys: dict[str, str], level: Any, sop_class: str, offending: int
) -> None:
    identifier = build_identifier(keys, level)
    if not level:
        del identifier.QueryRetrieveLevel
    [status] = statuses(archive.receiver, identifier, sop_class)
    assert status.Status == 0xA900
    assert status.OffendingElement == offending
    assert 0 < len(status.ErrorComment) <= 64


def test_relational_queries_are_negotiated(archive: Archive) -> None:
    instances = {uid for study in archive.series.values() for uids in study.values() for uid in uids}
    settings, peer = archive.receiver.settings, archive.receiver.peer
    keys = {"SOPInstanceUID": "", "PatientID": "*"}
    with pytest.raises(PeerError, match=r"status 0xA900 \(StudyInstanceUID must have a value"):
        list(client.find(peer, keys, settings=settings, level="IMAGE"))
    found = [
        match.SOPInstanceUID
        for match in client.find(peer, keys, settings=settings, level="IMAGE", features=Features(relational=True))
    ]
    assert len(found) == len(instances)
    assert set(found) == instances


def test_relational_queries_have_keys_of_lower_levels(archive: Archive) -> None:
    """Of pynetdicom's SCU, which negotiates them; findscu cannot."""
    settings, peer = archive.receiver.settings, archive.receiver.peer
    every = {study for study, _, _ in archive.images}
    of_series = {study for study, modality, _ in archive.images if modality == "CT"}
    of_images = {study for study, modality, number in archive.images if (modality, number) == ("CT", "1")}
    assert every > of_series > of_images > set()
    for keys, expected in (({"Modality": "CT"}, of_series), ({"Modality": "CT", "InstanceNumber": "1"}, of_images)):
        asked = {"StudyInstanceUID": "", "PatientName": "", **keys}
        answers = list(client.find(peer, asked, settings=settings, features=Features(relational=True)))
        assert {match.StudyInstanceUID for match in answers} == expected
        assert len(answers) == len(expected)
        assert not any(match.get(keyword) for match in answers for keyword in keys), "of a lower level"
        [*pending, last] = statuses(archive.receiver, build_identifier(asked, "STUDY"), STUDY_FIND, extension=b"\1")
        assert (len(pending), last.Status) == (len(expected), 0)
        patients = {**keys, "StudyInstanceUID": "", "PatientID": ""}
        found = client.find(peer, patients, settings=settings, level="PATIENT", model="PATIENT_ROOT",
                            features=Features(relational=True))  # fmt: skip
        assert {match.PatientID or "" for match in found} == {archive.patients[study] for study in expected}


def test_date_and_time_are_taken_together_where_it_is_negotiated(archive: Archive) -> None:
    """From noon of one day to noon of another: afternoons of the first, mornings of the second, all between."""
    settings, peer = archive.receiver.settings, archive.receiver.peer
    every = list(client.find(peer, {"StudyDate": "", "StudyTime": "", "StudyInstanceUID": ""}, settings=settings))
    timed = [match for match in every if match.StudyDate and match.StudyTime]
    low, high = min(match.StudyDate for match in timed), max(match.StudyDate for match in timed)
    keys = {"StudyDate": f"{low}-{high}", "StudyTime": "120000-115959", "StudyInstanceUID": ""}
    identifier = build_identifier(keys, "STUDY")
    combined = statuses(archive.receiver, identifier, STUDY_FIND, extension=b"\x00\x01")
    wanted = [match for match in timed if f"{low}12" <= match.StudyDate + match.StudyTime < f"{high}12"]
    assert len(combined) - 1 == len(wanted)
    assert wanted


def test_findscu_cancels(tmp_path: Path) -> None:
    """More answers than sockets hold, so that the receiver is in the midst of them when the request comes."""
    many, text = 15_000, "x" * 60
    settings = from_dict({}, base=tmp_path)
    columns = ("StudyDescription", "ReferringPhysicianName", "AccessionNumber", "PatientName", "PatientID", "StudyID")
    rows = [
        {"StudyInstanceUID": f"2.25.{number:034}", "patient_key": f"61:{text}", **dict.fromkeys(columns, text)}
        for number in range(many)
    ]
    write_catalog(settings, [])
    write_table(settings, TABLES["studies"], rows)
    keys = [part for name in columns for part in ("-k", name)]
    with running_receiver(tmp_path) as receiver:
        arguments = ["-S", "--cancel", "2", "-v", "-k", "QueryRetrieveLevel=STUDY", "-k", "StudyInstanceUID", *keys]
        run = run_tool("findscu", *arguments, "127.0.0.1", receiver.port)
        log = receiver.log
    assert run.returncode == 0, run.stdout
    assert "Sending Cancel Request" in run.stdout, run.stdout[:5000]
    assert "Received Final Find Response (Cancel" in run.stdout, run.stdout[-1000:]
    told = re.search(r"matches=(\d+) status=0xFE00", log)
    assert told is not None, log
    assert 2 <= int(told[1]) < many


def test_unknown_attributes_do_not_end_a_query(archive: Archive, tmp_path: Path) -> None:
    keys = ["QueryRetrieveLevel=STUDY", "StudyInstanceUID", "0009,0010", "0009,1001", "3006,0020"]
    assert len(ask(archive, tmp_path, keys, "-S")) == len(archive.series)


def test_a_query_leaves_no_name_in_the_log(archive: Archive, tmp_path: Path) -> None:
    assert len(ask(archive, tmp_path, ["QueryRetrieveLevel=STUDY", "PatientName=Buc*"], "-S")) >= 1
    assert "Buc" not in archive.receiver.log
    assert "Jérôme" not in archive.receiver.log

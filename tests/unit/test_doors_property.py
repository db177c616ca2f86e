"""Every door gives one answer: the index (with recent arrivals), C-FIND, QIDO-RS, the mode without a catalog, and an
evaluation written plainly from the standard, over generated archives and generated queries."""

from __future__ import annotations

import io
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydicom import dcmread, dcmwrite
from pydicom.config import IGNORE
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom.dsutils import encode

from sphere.catalog.queries import Queries, open_queries
from sphere.catalog.query import Features, Query
from sphere.catalog.schema import Level
from sphere.conf.errors import QueryError
from sphere.conf.settings import Settings
from sphere.finding import find_instances, instances_matching, query_here
from sphere.scp import client
from sphere.scp.find import PENDING, FindAnswer, FindRequest, FindService
from sphere.scp.web.search_request import parse_search
from tests.support.examples import examples
from tests.support.extracted import extract
from tests.support.landing import archive, land, new_member, slices
from tests.support.receiver import running_receiver
from tests.support.reference import LEVEL, LEVELS, MULTIPLE, PAIRS, PRIVATE_VR, VR, Asked, answer

pytestmark = pytest.mark.unit

GROUP = 0x0029
CREATORS = ("ACME", "OTHER")
CODES = "ProcedureCodeSequence"
VALUES: dict[str, list[Any]] = {
    "PatientName": [
        "Doe^John",
        "DOE^JANE",
        "Müller^Ännchen",
        "Yamada^Tarou=山田^太郎=やまだ^たろう",
        "O'Neil^A.B",
        "Doe",
        "",
    ],
    "PatientSex": ["M", "F", ""],
    "PatientComments": ["a", "A", "", "two words"],
    "StudyDate": ["20240101", "20240102", "20231231", ""],
    "StudyTime": ["0030", "235959.5", "10", "101530", "noon", ""],
    "AccessionNumber": ["A_B1", "AxB1", "100%", " padded ", ""],
    "StudyDescription": ["CHEST", "chest", "CHEST PA", "[abc]", ""],
    "PhysiciansOfRecord": [["House^G", "Müller^Ä"], ["House^G"], None],
    "ReferringPhysicianName": ["House^Gregory", "Meier^Eva", ""],
    "Modality": ["CT", "MR", "SR"],
    "SeriesDate": ["20240101", "20240229", ""],
    "SeriesTime": ["2330", "000000", "1200", ""],
    "SeriesNumber": [1, 2, None],
    "InstanceNumber": [1, 2, 30, None],
    "ImageType": [["ORIGINAL", "PRIMARY"], ["DERIVED", "PRIMARY", "AXIAL"], ["ORIGINAL"], None],
    "ContentDate": ["20240101", "20240102", ""],
    "ContentTime": ["1015", "101530.25", "235960", ""],
    "AcquisitionDateTime": ["20240101003000", "2024", "20240101233000-0500", "20231231+0100", "rubbish", ""],
    "SliceThickness": ["1.5", "1.50", "2", None],
    "ImageComments": ["two\r\nlines", " indented", "x", ""],
    "PixelPaddingValue": [-2000, 63536, 0, None],
}
PRIVATE_VALUES: dict[int, list[Any]] = {
    0x01: ["one", "two"], 0x02: [0, 35, 0x3533], 0x03: ["Müller^Ä", "Doe^John", "DOE"], 0x04: [0.5, -2.0],
}  # fmt: skip
PRIVATE_KEYS = {
    0x01: ["one", "t*", '""', ""], 0x02: ["0", "35", "13619", "7"], 0x03: ["doe", "M?LLER*", "müller^ä", '""'],
    0x04: ["0.5", "-2", "0.25"],
}  # fmt: skip
OFFSETS = ["+0100", "-0500", "+0530", None]


def generated(seed: int) -> list[bytes]:
    """Instances of studies that agree on little: attributes differ within a study, and come and go."""
    chance = random.Random(seed)
    made = []
    for study in range(12):
        patient = chance.choice(["P1", "P1", "P2", "p1", None])
        for series in range(chance.choice([1, 1, 2])):
            for data in slices(chance.choice([1, 2]), seed=1000 * seed + 10 * study + series, study=study):
                made.append(_changed(data, chance, patient, f"9.{study}", f"9.{study}.{series}"))
    chance.shuffle(made)
    return made


def _changed(data: bytes, chance: random.Random, patient: str | None, study: str, series: str) -> bytes:
    dataset = dcmread(io.BytesIO(data))
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
    dataset.PatientID = patient or ""
    for keyword, values in VALUES.items():
        if keyword in dataset:
            del dataset[keyword]
        if chance.random() < 0.8:
            _store(dataset, keyword, chance.choice(values))
    if offset := chance.choice(OFFSETS):
        dataset.TimezoneOffsetFromUTC = offset
    if chance.random() < 0.7:
        codes = [chance.choice(["C1", "C2", "C3"]) for _ in range(chance.choice([0, 1, 2]))]
        dataset.ProcedureCodeSequence = Sequence([_code(one, chance.choice(["S", "T", ""])) for one in codes])
    for creator in CREATORS:
        if chance.random() < 0.6:
            dataset.add_new(
                GROUP << 16 | chance.choice([0x10, 0x11, 0x20]), "LO", creator
            )  # may take the other's block
            block = dataset.private_block(GROUP, creator) if _has(dataset, creator) else None
            if block is not None:
                for byte, values in PRIVATE_VALUES.items():
                    if byte == 0x01 or chance.random() < 0.7:
                        block.add_new(byte, PRIVATE_VR[byte], chance.choice(values))
    buffer = io.BytesIO()
    dcmwrite(buffer, dataset)
    return buffer.getvalue()


def _store(dataset: Dataset, keyword: str, value: Any) -> None:
    if VR.get(keyword) == "US or SS":
        dataset.add_new(tag_for_keyword(keyword) or 0, "SS" if (value or 0) < 0 else "US", value)
    else:
        setattr(dataset, keyword, value)


def _has(dataset: Dataset, creator: str) -> bool:
    try:
        dataset.private_block(GROUP, creator)
    except KeyError:
        return False
    return True


def _code(value: str, scheme: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator = value, scheme
    return item


class Doors:
    """An archive, and the ways to ask it; no dataclass, as every failure would then show it whole."""

    def __init__(self, settings: Settings, datasets: list[Dataset], tables: Queries, bundles: Queries) -> None:
        self.settings = settings
        self.datasets = datasets  # in the order of arrival
        self.tables = tables
        self.bundles = bundles


@contextmanager
def opened(folder: Path, seed: int) -> Iterator[Doors]:
    """Two thirds are catalogued, the rest are recent arrivals."""
    files = generated(seed)
    base = archive(folder, archive={"ae_title": "DOORS"})
    members = [new_member(data, second=number) for number, data in enumerate(files)]
    cut = len(members) * 2 // 3
    land(base, members[:cut])
    extract(base)
    land(base, members[cut:])
    catalog = base.catalog.model_copy(update={"mode": "files", "scan_workers": 0})
    with open_queries(base) as tables, open_queries(base.model_copy(update={"catalog": catalog})) as bundles:
        yield Doors(base, [dcmread(io.BytesIO(data)) for data in files], tables, bundles)


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    """An archive that is always the same."""
    with opened(tmp_path_factory.mktemp("doors"), 1) as made:
        yield made


def asked_text(keyword: str) -> st.SearchStrategy[str]:
    """Keys that have something to do with what is stored."""
    stored = [one for value in VALUES[keyword] for one in (value if isinstance(value, list) else [value]) if one]
    plain = st.sampled_from([str(one) for one in stored])
    vr = VR.get(keyword, "LO")
    if vr == "DA":
        return _ranges(st.sampled_from(["20240101", "20240102", "20231231", "20240229"])) | st.just('""')
    if vr == "TM":
        return _ranges(st.sampled_from(["00", "0030", "1015", "101530.2", "2330", "235960", "10:15:30"])) | st.just(
            '""'
        )
    if vr == "DT":
        return _ranges(
            st.sampled_from(["2024", "202401", "20240101", "2024010100", "20240102043000", "2023"])
        ) | st.just("20240101003000+0100")
    if vr in ("IS", "DS"):
        return plain | st.sampled_from(["2", "01", '""'])
    if vr == "US or SS":
        return st.sampled_from(["-2000", "63536", "0", "2000"])
    wild = st.builds(_wilder, plain, st.integers(0, 6), st.sampled_from(["*", "?", "**", "?*"]))
    several = [plain, wild, plain.map(str.upper), st.sampled_from(['""', "*", "", "?*", "nothing"])]
    if keyword in MULTIPLE:
        several.append(st.lists(plain, min_size=2, max_size=3).map("\\".join))
    return st.one_of(several)


def _wilder(text: str, at: int, sign: str) -> str:
    return text[:at] + sign + text[at + 1 :] if sign != "**" else f"*{text[at : at + 2]}*"


def _ranges(ends: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.tuples(ends, ends).map(sorted).map("-".join)
    return st.one_of(ends, ends.map(lambda one: f"{one}-"), ends.map(lambda one: f"-{one}"), pairs)


@st.composite
def queries(draw: st.DrawFn) -> Asked:
    """A few keys that the level and, in half of the queries, lower ones have, and what is negotiated."""
    level = draw(st.sampled_from(LEVELS))
    depth = LEVELS.index(level)
    lowest = draw(st.integers(depth, 3)) if draw(st.booleans()) else depth  # of relational queries
    names = [name for name in VALUES if LEVEL[name] <= lowest]
    chosen = draw(st.lists(st.sampled_from(names), max_size=2 if lowest == depth else 3, unique=True))
    keys: dict[Any, Any] = {name: draw(asked_text(name)) for name in chosen}
    combined = draw(st.booleans())
    if combined and lowest > 0 and draw(st.booleans()):
        for keyword in draw(st.sampled_from([pair for pair in PAIRS.items() if LEVEL[pair[0]] <= lowest])):
            keys[keyword] = draw(asked_text(keyword))
    extra = draw(st.integers(0, 5))
    if extra == 1:
        byte = draw(st.sampled_from(sorted(PRIVATE_KEYS)))
        keys[GROUP, byte, draw(st.sampled_from(CREATORS))] = draw(st.sampled_from(PRIVATE_KEYS[byte]))
    elif extra == 2:
        schemes = st.sampled_from(["S", "T", '""', "*"])
        keys[CODES] = {"CodeValue": draw(st.sampled_from(["C1", "C?", "C3"])), "CodingSchemeDesignator": draw(schemes)}
    elif extra == 3:
        keys["PatientID"] = draw(st.sampled_from(["P1", "p?", '""', "P*"]))
    elif extra == 4 and lowest > 0:
        keys["StudyInstanceUID"] = draw(st.sampled_from(["9.3", "9.1\\9.4\\9.5\\9.7"]))
    elif extra == 5 and lowest > 1:
        keys["SeriesInstanceUID"] = draw(st.sampled_from(["9.3.0", "9.1.0\\9.4.1\\9.5.0\\9.7.0"]))
    zone = draw(st.none() | st.sampled_from([0, 60, -210]))
    return Asked(level, keys, draw(st.booleans()), True, combined, zone)


def below(asked: Asked) -> list[str]:
    """The keys of lower levels."""
    return [name for name in asked.keys if LEVEL.get(name, 0) > LEVELS.index(asked.level)]


def by_name(asked: Asked) -> dict[str, Any]:
    return {_name(name): value for name, value in asked.keys.items()}


def _name(name: Any) -> str:
    return name if isinstance(name, str) else f"{name[0]:04X}10{name[1]:02X},{name[2]}"


def zone_text(zone: int | None) -> str:
    return "" if zone is None else f"{'-' if zone < 0 else '+'}{abs(zone) // 60:02}{abs(zone) % 60:02}"


def identifier(asked: Asked) -> Dataset:
    """The C-FIND identifier of a query."""
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.QueryRetrieveLevel = asked.level
    if asked.zone is not None:
        dataset.TimezoneOffsetFromUTC = zone_text(asked.zone)
    for name, value in asked.keys.items():
        if isinstance(value, dict):
            item = Dataset()
            for keyword, text in value.items():
                setattr(item, keyword, text)
            setattr(dataset, name, Sequence([item]))
        elif isinstance(name, str):
            dataset[name] = _element(name, value)
        else:
            vr = PRIVATE_VR[name[1]]
            number: Any = {"US": int, "FD": float}.get(vr, str)
            dataset.private_block(name[0], name[2], create=True).add_new(name[1], vr, number(value))
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "PatientID")[
        : LEVELS.index(asked.level)
    ]:
        dataset.setdefault(keyword, None)
    return dataset


def _element(keyword: str, text: str) -> Any:
    vr = VR.get(keyword, "LO")
    if vr == "US or SS":
        return DataElement(tag_for_keyword(keyword) or 0, "SS" if text.startswith("-") else "US", int(text))
    number = vr in ("IS", "DS")
    element = DataElement(tag_for_keyword(keyword) or 0, vr, None if number else text, validation_mode=IGNORE)
    if number:
        element._value = text  # two quotes are none, pydicom says
    return element


def features(asked: Asked) -> Features:
    return Features(
        relational=True,
        combined_datetime=asked.combined_datetime,
        timezone_adjustment=asked.zone is not None,
        empty_values=asked.empty_values,
        multiple_values=asked.multiple_values,
        fuzzy_names=asked.fuzzy,
    )


def find_answers(doors: Doors, asked: Asked, syntax: UID = ExplicitVRLittleEndian) -> list[FindAnswer]:
    """C-FIND, from the bytes of the identifier on."""
    data = encode(identifier(asked), syntax.is_implicit_VR, True) or b""
    request = FindRequest(
        model="PATIENT_ROOT", identifier=data, transfer_syntax=syntax, features=features(asked)
    )  # fmt: skip
    return list(FindService(doors.tables).answers(request, cancelled=lambda: False))


def by_find(doors: Doors, asked: Asked, syntax: UID = ExplicitVRLittleEndian) -> list[Dataset]:
    """The matches of C-FIND."""
    answers = find_answers(doors, asked, syntax)
    assert all(one.status == PENDING for one in answers), (answers[-1].status, answers[-1].comment)
    return [one.identifier for one in answers if one.identifier is not None]


def built(asked: Asked) -> Query:
    level: Any = asked.level
    return Query.build(
        level, by_name(asked), return_keys=("StudyInstanceUID",) if level == "PATIENT" else (), model="PATIENT_ROOT",
        combined_datetime=asked.combined_datetime, timezone=zone_text(asked.zone), empty_values=asked.empty_values,
        multiple_values=asked.multiple_values, fuzzy_names=asked.fuzzy,
    )  # fmt: skip


def told(queries: Queries, query: Query) -> list[Any]:
    return [match.identifier().to_json_dict() for match in queries.find(query)]


UNIQUE = {"STUDY": ("0020000D",), "SERIES": ("0020000D", "0020000E"), "IMAGE": ("0020000D", "0020000E", "00080018")}


def identities(asked: Asked, answers: list[Any]) -> list[tuple[str, ...]]:
    """The unique keys of answers."""
    if asked.level == "PATIENT":
        return sorted((one["00100020"].get("Value") or [""])[:1] for one in answers)
    return sorted(tuple(one[tag]["Value"][0] for tag in UNIQUE[asked.level]) for one in answers)


def by_qido(doors: Doors, asked: Asked) -> list[tuple[str, ...]] | None:
    """The query that the URL of a QIDO-RS search is; None for what QIDO-RS cannot ask."""
    private = any(not isinstance(name, str) for name in asked.keys)
    if private or below(asked) or asked.level == "PATIENT" or asked.zone is not None or asked.combined_datetime:
        return None
    parameters = [
        ("emptyvaluematching", str(asked.empty_values).lower()),
        ("multiplevaluematching", str(asked.multiple_values).lower()),
        ("fuzzymatching", str(asked.fuzzy).lower()),
    ]
    for name, value in asked.keys.items():
        nested = value.items() if isinstance(value, dict) else ()
        parameters += [(f"{name}.{inner}", text) for inner, text in nested] or [(name, value)]
    level: Level = asked.level  # type: ignore[assignment]
    return identities(asked, told(doors.tables, parse_search(parameters, level, {}).query))


def by_command(doors: Doors, asked: Asked) -> list[Any] | None:
    """`sphere find` without a peer; None where it is not what is asked, as it takes two quotes for no value."""
    if not (asked.empty_values and asked.multiple_values):
        return None
    keys: dict[str, str] = {}
    for name, value in asked.keys.items():
        if isinstance(name, tuple):
            keys |= {f"{name[0]:04X},0010": name[2], f"{name[0]:04X},10{name[1]:02X}": value}
        elif isinstance(value, dict):
            keys |= {f"{name}.{inner}": text for inner, text in value.items()}
        else:
            keys[name] = value
    level: Any = asked.level
    query = query_here(
        keys, level=level, model="PATIENT_ROOT", features=features(asked), timezone=zone_text(asked.zone)
    )  # fmt: skip
    return told(doors.tables, query)


PROFILE = settings(
    database=None, deadline=None, print_blob=True, phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.large_base_example,
                           HealthCheck.data_too_large],
)  # fmt: skip
SEEDS = st.integers(0, (1 << 32) - 1)
"""Of headers: other archives with each run."""


def held(seed: int, several: list[Asked]) -> None:
    """Put queries at every door of an archive of its own."""
    with tempfile.TemporaryDirectory() as name, opened(Path(name), seed) as doors:
        for asked in several:
            held_to_the_reference(doors, asked)


@settings(parent=PROFILE, max_examples=examples(3))
@given(seed=SEEDS, several=st.lists(queries(), min_size=20, max_size=30))
def test_every_door_gives_the_answer_of_the_reference(seed: int, several: list[Asked]) -> None:
    held(seed, several)


def held_to_the_reference(doors: Doors, asked: Asked) -> None:
    """Put a query at every door."""
    try:
        query = built(asked)
    except QueryError:  # two quotes where empty values were not agreed on, a list with wild cards
        assert [one.status for one in find_answers(doors, asked)] == [QueryError.dimse]
        return
    by_sql = told(doors.tables, query)
    assert told(doors.bundles, query) == by_sql, "without a catalog"
    found = [one.to_json_dict() for one in by_find(doors, asked)]
    assert identities(asked, found) == identities(asked, by_sql), "C-FIND"
    if asked.keys.get("PixelPaddingValue") not in ("-2000", "63536"):  # the same bytes, where no VR says which
        found = [one.to_json_dict() for one in by_find(doors, asked, ImplicitVRLittleEndian)]
        assert identities(asked, found) == identities(asked, by_sql), "C-FIND in implicit VR"
    expected = answer(doors.datasets, asked)
    if asked.level == "PATIENT":
        patients = sorted([key[1]] if key[0] == "id" else [""] for key in expected)
        assert identities(asked, by_sql) == patients, "reference"
    else:
        assert identities(asked, by_sql) == expected, "reference"
    commanded = by_command(doors, asked)
    assert commanded is None or identities(asked, commanded) == identities(asked, by_sql), "sphere find"
    by_url = by_qido(doors, asked)
    assert by_url is None or by_url == expected, "QIDO-RS"


PASSED_OVER = [
    ("TimezoneOffsetFromUTC", "+0100"), ("TimezoneOffsetFromUTC", '""'), ("TimezoneOffsetFromUTC", "-0?00"),
    ("SpecificCharacterSet", "ISO_IR 192"), ("SpecificCharacterSet", "ISO_IR 100"),
]  # fmt: skip


@pytest.mark.parametrize(("keyword", "text"), PASSED_OVER)
def test_what_a_network_passes_over_is_matched_here(doors: Doors, keyword: str, text: str) -> None:
    """Where it is typed it is a condition, at every door; C-FIND has no such key (PS3.4 C.4.1.1.3.1)."""
    stored = {str(one.SOPInstanceUID): str(one.get(keyword) or '""') for one in doors.datasets}
    wanted = sorted(uid for uid, value in stored.items() if fnmatchcase(value, text))
    asked = Asked("IMAGE", {keyword: text}, True, True)
    query = built(asked)
    url = parse_search([(keyword, text), ("emptyvaluematching", "true")], "IMAGE", {}).query
    for answers in (told(doors.tables, query), told(doors.bundles, query), told(doors.tables, url)):
        assert sorted(one["00080018"]["Value"][0] for one in answers) == wanted
    commanded = by_command(doors, asked)
    assert commanded is not None and sorted(one["00080018"]["Value"][0] for one in commanded) == wanted
    chosen = find_instances(doors.tables, instances_matching({keyword: text}))
    assert sorted(one.SOPInstanceUID for one in chosen) == wanted
    assert len(by_find(doors, asked)) == len(stored)


NAMES = ["PatientName", "PhysiciansOfRecord", "ReferringPhysicianName"]
HEARD = [
    "doe", "jo", "jon", "muller", "mueller", "MÜLER", "an", "aenchen", "山田", "やま", "yam*", "jamada taro", "neal",
    "onei", "gregori", "haus", "hous?", "*", "^,-", "mayer", "ewa", "meier", "do?", "d*e jan*", '""',
]  # fmt: skip


FUZZY = st.builds(
    lambda level, keys, empty: Asked(level, keys, empty, fuzzy=True),
    st.sampled_from(LEVELS[1:]),
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from(HEARD), min_size=1, max_size=2),
    st.booleans(),
)
FUZZY_PATIENTS = st.lists(st.sampled_from(HEARD[:-1]), max_size=3).map(
    lambda words: Asked("PATIENT", {"PatientName": " ".join(words)}, fuzzy=True)
)


@settings(parent=PROFILE, max_examples=examples(2))
@given(seed=SEEDS, several=st.lists(FUZZY | FUZZY_PATIENTS, min_size=25, max_size=35))
def test_fuzzy_names_at_every_door(seed: int, several: list[Asked]) -> None:
    """Person names by their sound, held to a plain evaluation too."""
    held(seed, several)


def test_a_sample_over_associations(doors: Doors) -> None:
    """The same answers from a receiver, what is asked for negotiated with it."""
    place = doors.settings.archive.state_dir.parent
    chance = random.Random(5)
    with running_receiver(place, {"archive": {"ae_title": "DOORS"}, "extract": {"every_s": 0}}) as receiver:
        heard = [Asked(*one, True, fuzzy=True) for one in HEARD_OVER]
        for asked in [*(_sample(chance, number) for number in range(12)), *heard]:
            found = client.find(
                receiver.peer, _texts(asked), settings=receiver.settings, level=asked.level, model="PATIENT_ROOT",  # type: ignore[arg-type]
                features=features(asked),
            )  # fmt: skip
            answers = [one.to_json_dict() for one in found]
            assert identities(asked, answers) == answer(doors.datasets, asked), asked
            assert answers or not asked.fuzzy, asked


HEARD_OVER: list[tuple[str, dict[Any, Any]]] = [
    ("STUDY", {"PatientName": "jon"}),
    ("STUDY", {"PatientName": "muller", "ReferringPhysicianName": "*"}),
    ("STUDY", {"PatientName": "jamada taro"}),
    ("SERIES", {"ReferringPhysicianName": "mayer"}),
    ("SERIES", {"PhysiciansOfRecord": "house g"}),
    ("IMAGE", {"PatientName": "do?", "ReferringPhysicianName": "gregori"}),
    ("IMAGE", {"PatientName": "aenchen"}),
]
"""Person names that are sought by their sound, negotiated too."""


def _sample(chance: random.Random, number: int) -> Asked:
    level = ("STUDY", "SERIES", "IMAGE")[number % 3]
    keys = [
        {"StudyDate": "20240101-", "StudyTime": "0030-2330"},
        {"PatientName": "d*", "AccessionNumber": '""'},
        {"PatientSex": chance.choice("MF"), "StudyDate": "20231231-20240101"},
        {"PhysiciansOfRecord": "House^G\\Müller^Ä"},
    ][number // 3]
    return Asked(level, keys, True, True, number < 3, (None, 60)[number % 2])


def _texts(asked: Asked) -> dict[str, str]:
    zone = {"TimezoneOffsetFromUTC": zone_text(asked.zone)} if asked.zone is not None else {}
    unique = dict.fromkeys(("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")[: LEVELS.index(asked.level)], "")
    return {**unique, **asked.keys, **zone}

"""Archives and queries that hypothesis draws: headers that agree on little, and keys of what they say."""

from __future__ import annotations

import io
import random
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from pydicom import dcmread, dcmwrite
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from tests.support.landing import slices
from tests.support.reference import LEVEL, LEVELS, MULTIPLE, PAIRS, PRIVATE_VR, VR, Asked

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


PROFILE = settings(
    database=None, deadline=None, print_blob=True, phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.large_base_example,
                           HealthCheck.data_too_large],
)  # fmt: skip
SEEDS = st.integers(0, (1 << 32) - 1)
"""Of headers: other archives with each run."""

"""One archive asked at every door, and held to a plain evaluation."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydicom import dcmread
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
from sphere.finding import query_here
from sphere.scp.find import PENDING, FindAnswer, FindRequest, FindService
from sphere.scp.web.search_request import parse_search
from tests.support.drawn import below, generated
from tests.support.extracted import extract
from tests.support.landing import archive, land, new_member
from tests.support.reference import LEVELS, PRIVATE_VR, VR, Asked, answer


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


def held(seed: int, several: list[Asked]) -> None:
    """Put queries at every door of an archive of its own."""
    with tempfile.TemporaryDirectory() as name, opened(Path(name), seed) as doors:
        for asked in several:
            held_to_the_reference(doors, asked)


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

"""Every door gives one answer: the index (with recent arrivals), C-FIND, QIDO-RS, the mode without a catalog, and an
evaluation written plainly from the standard, over generated archives and generated queries."""

from __future__ import annotations

import random
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere.finding import find_instances, instances_matching
from sphere.scp import client
from sphere.scp.web.search_request import parse_search
from tests.support.doors import (
    Doors,
    built,
    by_command,
    by_find,
    features,
    held,
    identities,
    opened,
    told,
    zone_text,
)  # fmt: skip
from tests.support.drawn import PROFILE, SEEDS, queries
from tests.support.examples import examples
from tests.support.receiver import running_receiver
from tests.support.reference import LEVELS, Asked, answer

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    """An archive that is always the same."""
    with opened(tmp_path_factory.mktemp("doors"), 1) as made:
        yield made


@settings(parent=PROFILE, max_examples=examples(3))
@given(seed=SEEDS, several=st.lists(queries(), min_size=20, max_size=30))
def test_every_door_gives_the_answer_of_the_reference(seed: int, several: list[Asked]) -> None:
    held(seed, several)


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

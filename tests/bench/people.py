"""Invented persons of several scripts, as arrays (PS3.5 6.2.1: alphabetic, ideographic and phonetic groups)."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

REGIONS = ("Thorax", "Abdomen", "Head", "Pelvis", "Knee", "Spine", "Shoulder", "Hand", "Foot", "Neck", "Heart")

_BEGIN = [
    "Al",
    "Be",
    "Cor",
    "Dar",
    "Es",
    "Fal",
    "Gar",
    "Hol",
    "In",
    "Jan",
    "Kor",
    "Lor",
    "Mar",
    "Nor",
    "Ol",
    "Per",
    "Qui",
    "Ros",
    "Sal",
    "Tor",
    "Ul",
    "Ver",
    "Wal",
    "Xen",
    "Yor",
    "Zim",
]
_MIDDLE = [
    "an",
    "ber",
    "cha",
    "del",
    "em",
    "fi",
    "gau",
    "hen",
    "ing",
    "jo",
    "kin",
    "lan",
    "mer",
    "nau",
    "ost",
    "pin",
    "qua",
    "rin",
    "sen",
    "tal",
]
_END = ["son", "sen", "ski", "ova", "ez", "man", "ier", "ini", "berg", "feld"]
FAMILIES = [*map("".join, itertools.product(_BEGIN, _MIDDLE, _END)), "Müller", "O'Neil", "García", "Dvořák", "Şahin"]
_GIVEN = [
    "Ada",
    "Bruno",
    "Chloé",
    "Dov",
    "Élise",
    "Farid",
    "Greta",
    "Hugo",
    "Inès",
    "Jonas",
    "Kim",
    "Lea",
    "Max",
    "Nora",
    "Omar",
    "Pia",
    "Rosa",
    "Sven",
    "Tom",
    "Uma",
]
_LATIN = [f"{family}^{given}" for family in FAMILIES for given in _GIVEN]
_OTHERS = [
    f"{family}^{given}"
    for family in ("Иванов", "Петрова", "Παπαδόπουλος", "محمود", "כהן", "สมบัติ")
    for given in ("Анна", "Ιωάννης", "أحمد", "משה", "มานี")
] + [
    f"{latin}^{given}={han}^{one}={spoken}^{two}"
    for latin, han, spoken in (("Yamada", "山田", "やまだ"), ("Suzuki", "鈴木", "すずき"), ("Hong", "洪", "홍"))
    for given, one, two in (("Tarou", "太郎", "たろう"), ("Hanako", "花子", "はなこ"), ("Gildong", "吉洞", "길동"))
]


class People:
    """`count` patients; a tenth of the names are not of the Latin script or have several groups."""

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed + 1)
        latin = (len(_LATIN) * rng.random(count) ** 1.5).astype(np.int64)
        others = len(_LATIN) + rng.integers(0, len(_OTHERS), count)
        self.names: pa.Array = pa.array([*_LATIN, *_OTHERS]).take(
            pa.array(np.where(rng.random(count) < 0.9, latin, others))
        )
        self.birth_dates: pa.Array = pa.array(
            np.datetime64("1920-01-01") + rng.integers(0, 36_000, count).astype("timedelta64[D]"), pa.date32()
        )
        self.sexes: pa.Array = pa.array(["F", "M"]).take(pa.array(rng.integers(0, 2, count)))


def json_names(names: pa.Array) -> pa.Array:
    """Person names as PS3.18 Annex F.2.2 writes them."""
    groups = pc.split_pattern(names, "=", max_splits=2)
    length = pc.list_value_length(groups)
    first = pc.binary_join_element_wise('{"Alphabetic":"', pc.list_element(groups, 0), '"', "")
    if not pc.any(pc.greater(length, 1)).as_py():
        return pc.binary_join_element_wise(first, "}", "")
    padded = pc.split_pattern(pc.binary_join_element_wise(names, "==", ""), "=", max_splits=4)
    more = pc.binary_join_element_wise(
        ',"Ideographic":"', pc.list_element(padded, 1), '","Phonetic":"', pc.list_element(padded, 2), '"', ""
    )
    return pc.binary_join_element_wise(first, pc.if_else(pc.greater(length, 1), more, ""), "}", "")

"""Attribute matching (PS3.4 C.2.2.2): a table of stored value, key and answer, asked of SQL and of Python alike."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from datetime import date
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from sphere.catalog.index_build import trimmed_sql
from sphere.catalog.match import Number, fold, normal_name, normal_name_sql
from sphere.catalog.match_header import holds
from sphere.catalog.match_parse import DECIMAL_VRS, INTEGER_VRS, parse_values
from sphere.catalog.predicate import ColumnSql, Compare, compile_sql

pytestmark = pytest.mark.unit

YES, NO = True, False

# (VR, stored value or list of values, key, whether it matches)
TEXT_CASES = [
    ("LO", "CHEST", "CHEST", YES),
    ("LO", "CHEST", "chest", NO),  # single values are case sensitive, PN aside
    ("LO", "CHEST", "CHES", NO),
    ("LO", " CHEST ", "CHEST", YES),  # leading and trailing spaces are not significant
    ("LO", "CHEST", "  CHEST ", YES),
    ("LO", "CHEST  PA", "CHEST PA", NO),  # inner ones are
    ("LO", "A_B-1", "A_B*", YES),
    ("LO", "AxB-1", "A_B*", NO),
    ("LO", "A%B", "A%B", YES),
    ("LO", "AxxB", "A%B", NO),
    ("LO", "100%", "%", NO),
    ("LO", "%", "%", YES),
    ("LO", "x", "%", NO),
    ("LO", "x", "_", NO),
    ("LO", "_", "?", YES),
    ("LO", "A%B", "A%*", YES),
    ("LO", "AB", "A%*", NO),
    ("LO", "[abc]", "[abc]*", YES),
    ("LO", "a", "[abc]*", NO),
    ("LO", "a.b", "a.?", YES),
    ("LO", "axb", "a.?", NO),
    ("LO", "x' OR '1'='1", "x' OR '1'='1", YES),
    ("LO", "x", "' OR 1=1 --", NO),
    ("LO", "(a|b)+$", "(a|b)+$", YES),
    ("LO", "(a|b)+$", "(a|b)*$", YES),
    ("LO", "CHEST", "*", YES),
    ("LO", "CHEST", "**", YES),
    ("LO", None, "*", YES),  # universal
    ("LO", None, "", YES),
    ("LO", "CHEST", "", YES),
    ("LO", "", "", YES),
    ("LO", None, "?", NO),
    ("LO", "", "?*", NO),
    ("LO", None, "CHEST", NO),
    ("LO", "  ", "?*", NO),
    ("LO", "A", "?", YES),
    ("LO", "AB", "?", NO),
    ("LO", "AB", "??", YES),
    ("LO", "ABC", "?B?", YES),
    ("LO", "ABC", "*C", YES),
    ("LO", "ABC", "*B*", YES),
    ("LO", "ABC", "A*B*C*", YES),
    ("LO", "ABC", "A*C*B", NO),
    ("LO", "ABC", "?*?", YES),
    ("LO", "", "*?", NO),
    ("LO", "Größe", "Gr??e", YES),
    ("LO", "Größe", "GRÖSSE", NO),
    ("LO", "頭部", "?部", YES),
    ("LO", "頭部CT", "頭部*", YES),
    ("LO", "𝄞x", "?x", YES),  # one character outside the basic plane
    ("LO", "голова", "гол*", YES),
    ("LO", ["A", "B"], "B", YES),  # any value
    ("LO", ["A", "B"], "C", NO),
    ("LO", ["AX", "BX"], "B*", YES),
    ("LO", ["AX ", " BX"], "BX", YES),
    ("LO", [], "A", NO),
    ("SH", "12345", "12345", YES),
    ("SH", "12345", "123?5", YES),
    ("SH", "0012345", "12345", NO),
    ("CS", "CT", "CT", YES),
    ("CS", "CT", "C?", YES),
    ("CS", "CT", "ct", NO),
    ("CS", ["ORIGINAL", "PRIMARY"], "PRIMARY", YES),
    ("CS", ["ORIGINAL", "PRIMARY"], "*ARY", YES),
    ("CS", ["ORIGINAL", "PRIMARY"], "AXIAL", NO),
    ("AE", "STORE_1", "STORE_?", YES),
    ("AE", "STORE_1", "STORE%1", NO),
    ("ST", " indented", "indented", NO),  # leading spaces are significant in ST, LT, UC, UR, UT
    ("ST", " indented", " indented", YES),
    ("ST", "text  ", "text", YES),
    ("LT", "two\r\nlines", "two*lines", YES),
    ("LT", "two\r\nlines", "two??lines", YES),
    ("LT", "back\\slash", "back\\slash", YES),  # a backslash is text here
    ("LT", "back\\slash", "back*", YES),
    ("UT", "long", "l*g", YES),
    ("UC", "unlimited", "un*", YES),
    ("UR", "http://a/b?c", "http://a/b?c", YES),
    ("UR", "http://a/b", "http://*/b", YES),
    ("AS", "034Y", "034Y", YES),
    ("AS", "034Y", "034?", NO),  # no wild cards in AS: the sign is a character
    ("UI", "1.2.3", "1.2.3", YES),
    ("UI", "1.2.3", "1.2", NO),
    ("UI", "1.2.3", "1.2.3\\1.2.4", YES),
    ("UI", "1.2.4", "1.2.3\\1.2.4", YES),
    ("UI", "1.2.5", "1.2.3\\1.2.4", NO),
    ("UI", "1.2.3", "1.2.3\0", YES),
    ("UI", "1.2.3", "", YES),
    ("UI", ["1.2", "1.3"], "1.3", YES),
]
NAME_CASES = [
    ("PN", "Doe^John", "Doe^John", YES),
    ("PN", "Doe^John", "DOE^JOHN", YES),
    ("PN", "DOE^JOHN", "doe^j*", YES),
    ("PN", "Doe^John", "Doe", NO),
    ("PN", "Doe^John", "Doe*", YES),
    ("PN", "Doe", "Doe^*", YES),
    ("PN", "Doe", "Doe^*^*", YES),
    ("PN", "Doering^J", "Doe^*", NO),
    ("PN", "Doe^John^^^", "Doe^John", YES),
    ("PN", "Doe^John", "Doe^John^^", YES),
    ("PN", "Doe ^ John ", "Doe^John", YES),
    ("PN", "Doe^John^Q^Dr", "*^John^*", YES),
    ("PN", "Doe^John", "*john*", YES),
    ("PN", "Doe^John", "D?e^J???", YES),
    ("PN", "Doe^John", "D_e*", NO),
    ("PN", "O'Neil^A.B+", "o'neil^a.b+", YES),
    ("PN", "Müller^Ännchen", "MÜLLER^ÄNN*", YES),
    ("PN", "Müller", "Muller", NO),  # that is fuzzy matching
    ("PN", "ПЕТРОВ^ИВАН", "петров*", YES),
    ("PN", "ΠΑΠΑΔΟΠΟΥΛΟΣ", "παπαδοπουλος", YES),
    ("PN", "Yamada^Tarou=山田^太郎=やまだ^たろう", "yamada*", YES),
    ("PN", "Yamada^Tarou=山田^太郎=やまだ^たろう", "山田^太郎", YES),
    ("PN", "Yamada^Tarou=山田^太郎=やまだ^たろう", "山田*", YES),
    ("PN", "Yamada^Tarou=山田^太郎=やまだ^たろう", "やまだ^たろう", YES),
    ("PN", "Yamada^Tarou=山田^太郎=やまだ^たろう", "*田*", YES),
    ("PN", "Yamada^Tarou=山田^太郎=やまだ^たろう", "*=山田*", YES),
    ("PN", "Yamada^Tarou=山田^太郎=やまだ^たろう", "=山田*", YES),
    ("PN", "Yamada^Tarou=山田^太郎=やまだ^たろう", "==やまだ*", YES),
    ("PN", "Yamada^Tarou=山田^太郎=やまだ^たろう", "yamada*=山本*", NO),
    ("PN", "Yamada^Tarou=山田^太郎=やまだ^たろう", "Yamada^Tarou=山田^太郎=やまだ^たろう", YES),
    ("PN", "Yamada^Tarou=山田^太郎=やまだ^たろう", "山田*=yamada*", NO),
    ("PN", "Yamada^Tarou=山田^太郎", "y*太郎", NO),  # a wild card ends with its group
    ("PN", "Yamada^Tarou=山田^太郎", "*=*", YES),
    ("PN", "=山田^太郎", "山田*", YES),
    ("PN", None, "D*", NO),
    ("PN", None, "*", YES),
    ("PN", "Hong^Gildong=洪^吉洞=홍^길동", "홍^*", YES),
    ("PN", ["A^B", "C^D"], "c^*", YES),
    ("PN", ["A^B", "C^D"], "e*", NO),
]
DATE_CASES = [
    ("DA", "20240101", "20240101", YES),
    ("DA", "20240102", "20240101", NO),
    ("DA", "20240101", "20240101-", YES),
    ("DA", "20231231", "20240101-", NO),
    ("DA", "20240101", "-20240101", YES),
    ("DA", "20240102", "-20240101", NO),
    ("DA", "20240115", "20240101-20240131", YES),
    ("DA", "20240101", "20240101-20240131", YES),
    ("DA", "20240131", "20240101-20240131", YES),
    ("DA", "20240201", "20240101-20240131", NO),
    ("DA", "20240115", "20240131-20240101", NO),  # a reversed range holds nothing
    ("DA", "20240229", "20240229", YES),
    ("DA", "00010101", "-19000101", YES),
    ("DA", None, "20240101-", NO),
    ("DA", None, "", YES),
    ("DA", "20240101", "*", YES),
    ("DA", ["20230101", "20240101"], "20240101", YES),
    ("TM", "101530", "101530", YES),
    ("TM", "101530.000000", "101530", YES),
    ("TM", "101530.999999", "101530", YES),  # a key stands for all its precision leaves open
    ("TM", "101531", "101530", NO),
    ("TM", "1015", "1015", YES),
    ("TM", "101559", "1015", YES),
    ("TM", "101600", "1015", NO),
    ("TM", "10", "10", YES),
    ("TM", "105959.999999", "10", YES),
    ("TM", "110000", "10", NO),
    ("TM", "095959", "10", NO),
    ("TM", "10", "1000-1100", YES),  # a stored time stands for its first moment
    ("TM", "10", "1001-1100", NO),
    ("TM", "10:15:30", "101530", YES),
    ("TM", "101530", "10:15:30", YES),
    ("TM", "101530.5", "101530.5", YES),
    ("TM", "101530.59", "101530.5", YES),
    ("TM", "101530.6", "101530.5", NO),
    ("TM", "235959", "1200-", YES),
    ("TM", "115959", "1200-", NO),
    ("TM", "000000", "-1200", YES),
    ("TM", "120059.9", "-1200", YES),
    ("TM", "120100", "-1200", NO),
    ("TM", "235960", "2359", YES),
    ("TM", "03", "2200-0600", NO),
    ("TM", "nonsense", "00-", NO),
    ("TM", "1000 ", "1000", YES),
    ("DT", "20240101103000", "20240101", YES),
    ("DT", "20240101103000", "2024", YES),
    ("DT", "20240101103000", "202402", NO),
    ("DT", "2024", "202401", YES),
    ("DT", "2024", "202402", NO),
    ("DT", "20240229235959.999999", "202402", YES),
    ("DT", "20241231235959.999999", "2024", YES),
    ("DT", "20240101103000.25", "20240101103000.2", YES),
    ("DT", "20240101103000.25", "20240101103000.25", YES),
    ("DT", "20240101103000.25", "20240101103000.26", NO),
    ("DT", "20240101103000+0100", "20240101093000+0000", YES),
    ("DT", "20240101103000+0100", "2024010109-2024010110", YES),
    ("DT", "20240101103000-0500", "20240101153000", YES),
    ("DT", "20240101003000+0130", "20231231", YES),
    ("DT", "20240101103000", "20240101103000-0500", NO),
    ("DT", "20240101153000", "20240101103000-0500", YES),
    ("DT", "20240615", "20240101-20241231", YES),
    ("DT", "20240615", "20240101-", YES),
    ("DT", "20240615", "-20240101", NO),
    ("DT", "20240101120000+0000", "20240101100000-0100-20240101120000+0000", YES),
    ("DT", "20230615", "2023-2024", YES),
    ("DT", "20250615", "2023-2024", NO),
    ("DT", "20240230", "2024-", NO),
    ("DT", "not a date", "2024-", NO),
]
NUMBER_CASES = [
    ("IS", 5, "5", YES),
    ("IS", 5, "05", YES),
    ("IS", 5, "+5", YES),
    ("IS", -5, "-5", YES),
    ("IS", 5, "6", NO),
    ("IS", 5, "", YES),
    ("IS", 5, "*", YES),
    ("IS", None, "5", NO),
    ("IS", [1, 2], "2", YES),
    ("DS", 1.5, "1.50", YES),
    ("DS", 1.5, "15e-1", YES),
    ("DS", 1.5, "1.51", NO),
    ("DS", [0.5, 0.25], ".25", YES),
    ("US", 512, "512", YES),
    ("US", 512, "513", NO),
    ("FD", 0.1, "0.1", YES),
    ("UV", 2**63 - 1, str(2**63 - 1), YES),
    ("AT", "00280009", "00280009", YES),
]
CASES = TEXT_CASES + NAME_CASES + DATE_CASES + NUMBER_CASES


@pytest.fixture(scope="module")
def database() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as connection:
        yield connection


def sql_type(vr: str) -> str:
    if vr == "DA":
        return "DATE"
    return "BIGINT" if vr in INTEGER_VRS else "DOUBLE" if vr in DECIMAL_VRS else "VARCHAR"


def by_sql(database: duckdb.DuckDBPyConnection, node: Compare, stored: Any) -> bool:
    """The answer of SQL over a column that holds the stored value, trimmed as the index does."""
    multiple, kind = isinstance(stored, list), sql_type(node.vr)
    if kind == "DATE" and stored is not None:
        days = [date(int(day[:4]), int(day[4:6]), int(day[6:])) for day in (stored if multiple else [stored])]
        stored = days if multiple else days[0]
    column = "v"
    if kind == "VARCHAR" and node.vr != "UI":
        column = trimmed_sql("v", node.vr, multiple=multiple)
    compiled = compile_sql([node], lambda keyword: ColumnSql(column, multiple))
    assert not compiled.rest
    source = f"(SELECT ?::{kind}{'[]' if multiple else ''} AS v)"
    sql = f"SELECT coalesce({compiled.where}, false) FROM {source}"
    [(answer,)] = database.execute(sql, [*compiled.values, stored]).fetchall()
    return bool(answer)


def by_header(node: Compare, stored: Any) -> bool:
    values = stored if isinstance(stored, list) else [stored] if stored is not None else []
    if node.vr == "PN":
        names = ("Alphabetic", "Ideographic", "Phonetic")
        values = [dict(zip(names, value.split("="), strict=False)) for value in values]
    return holds((node,), {"00091001": {"vr": node.vr, "Value": values}})


@pytest.mark.parametrize(("vr", "stored", "key", "expected"), CASES)
def test_value_matches_key(database: duckdb.DuckDBPyConnection, vr: str, stored: Any, key: str, expected: bool) -> None:
    tests = parse_values(key, vr)
    if not tests:
        assert expected is YES, "universal matching finds everything"
        return
    [test] = tests
    node = Compare(0x00091001, "", vr, test)
    assert (by_sql(database, node, stored), by_header(node, stored)) == (expected, expected)


@pytest.mark.parametrize(
    ("vr", "key", "reason"),
    [
        ("DA", "2024", "not a date YYYYMMDD"),
        ("DA", "2024-01-01", "not a date YYYYMMDD"),
        ("DA", "20240230", "date of the calendar"),
        ("DA", "20241301-", "date of the calendar"),
        ("DA", "-", "at least one end"),
        ("DA", "2024010*", "not a date YYYYMMDD"),
        ("DA", "20240101-20240102-20240103", "not a date YYYYMMDD"),
        ("DA", "20240101\\20240102", "only a UID"),
        ("TM", "25", "not a time"),
        ("TM", "1", "not a time"),
        ("TM", "1060", "not a time"),
        ("TM", "10*", "not a time"),
        ("TM", "-", "at least one end"),
        ("DT", "0024", "not a date-time"),
        ("DT", "20240230", "date-time of the calendar"),
        ("DT", "2024+2500", "not a date-time"),
        ("DT", "-", "not a date-time"),
        ("UI", "1.2.*", "not a UID"),
        ("UI", "abc", "not a UID"),
        ("UI", "1" * 65, "not a UID"),
        ("UI", "1.2\\x", "not a UID"),
        ("IS", "five", "not an integer"),
        ("IS", "1-5", "not an integer"),
        ("IS", "1.5", "not an integer"),
        ("DS", "1,5", "not a number"),
        ("DS", "nan", "not a number"),
        ("DS", "inf", "not a number"),
        ("US", "x", "not an integer"),
        ("LO", "A\\B", "only a UID"),
        ("CS", "CT\\MR", "only a UID"),
        ("PN", "a=b=c=d", "three groups"),
        ("OB", "x", "cannot be matched"),
    ],
)
def test_key_that_its_vr_does_not_allow(vr: str, key: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_values(key, vr)


def test_modalities_in_study_takes_several() -> None:
    [test] = parse_values("CT\\MR", "CS", keyword="ModalitiesInStudy")
    assert [test.matches(value) for value in ("CT", "MR", "US")] == [True, True, False]
    with pytest.raises(ValueError, match="no wild cards"):
        parse_values("CT\\M*", "CS", keyword="ModalitiesInStudy")


def test_fold_is_that_of_the_database_for_every_character(database: duckdb.DuckDBPyConnection) -> None:
    characters = [chr(code) for code in range(1, sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
    characters = [c for c in characters if unicodedata.category(c) != "Cn"]  # this Python's Unicode may be the older
    database.register("unicode", pa.table({"c": characters}))
    rows = database.execute("SELECT lower(upper(c)) FROM unicode").fetchall()
    assert [row[0] for row in rows] == [fold(character) for character in characters]


def test_normal_name_is_that_of_the_database(database: duckdb.DuckDBPyConnection) -> None:
    names = ["Doe ^ John^^ = 山田 ^ ", " A^^B^= ", "^^", "=", "", "İ^ß^Σς", "a=b=c"]
    rows = database.execute(f"SELECT {normal_name_sql('c')} FROM (SELECT unnest(?) AS c)", [names]).fetchall()
    assert [row[0] for row in rows] == [normal_name(name) for name in names]


def test_a_bound_value_never_becomes_sql() -> None:
    text = "x'; DROP TABLE studies; --"
    [test] = parse_values(text + "*", "LO")
    sql, values = test.sql("v")
    assert text not in sql
    assert values == ["x'; DROP TABLE studies; --%"]
    assert Number(1).sql("v") == ("v = ?", [1])


def test_the_table_is_large_enough() -> None:
    assert len(CASES) >= 120

"""Patterns of whoever asks, held to the regular expressions that say what they mean, and to a bound of their steps."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import duckdb
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sphere.catalog.fuzzy import FuzzyName
from sphere.catalog.match import PersonName, Test, WildCard, fold, normal_name
from sphere.catalog.match_parse import MAX_PATTERN, PLAIN, Rules, parse_values
from sphere.catalog.wild import Wild
from tests.support.examples import examples

pytestmark = pytest.mark.unit

TEXTS = st.text("aab.\n[", max_size=9)
PATTERNS = st.text("aab.\n[*?", max_size=7)
NAMES = st.text("aAbB^= \n", max_size=9)
NAME_KEYS = st.text("aAb^=* ?", min_size=1, max_size=7)
SOUNDED = st.text("ckshxaeiäß\u0301\u0308 -^=ph", max_size=10)
HEARD = st.text("ckshaeiäß\u0301 -*?", min_size=1, max_size=5)


def test_the_sides_of_a_pattern_do_not_overlap() -> None:
    assert not Wild("ab*ba").matches("aba")
    assert Wild("ab*ba").matches("abba")


@given(pattern=PATTERNS, text=TEXTS)
@settings(max_examples=examples(500))
@example("*?a*", "ba")
def test_a_pattern_means_its_regular_expression(pattern: str, text: str) -> None:
    signs = {"*": ".*", "?": "."}
    expression = "".join(signs.get(one) or re.escape(one) for one in pattern)
    assert Wild(pattern).matches(text) == (re.fullmatch(expression, text, re.DOTALL) is not None)


@given(key=NAME_KEYS, name=NAMES)
@settings(max_examples=examples(500))
@example("a^*^*", "a")
@example("^*", "")
@example("*=a", "b=a=c")
def test_a_person_name_means_its_regular_expression(key: str, name: str) -> None:
    """The reading with one expression, a group's trailing wild components left out one by one."""
    groups = _old_normal_name(key).split("=")
    if not any(group.strip("*") for group in groups):
        return
    body = "=".join(map(_old_group, groups))
    expression = f"{'(?:^|=)' if len(groups) == 1 else '^'}{body}(?:=|\\Z)"
    expected = re.search(expression, _old_normal_name(name)) is not None
    assert PersonName(tuple(groups)).matches(name) == expected


def _old_normal_name(text: str) -> str:
    text = re.sub(r" *([\^=]) *", r"\1", fold(text).strip(" "))
    return re.sub(r"\^+(=|\Z)", r"\1", text).rstrip("=")


def _old_group(group: str) -> str:
    if not group.strip("*"):
        return "[^=]*"
    ways = [group]
    while group.endswith("^*"):
        group = group[:-2]
        ways.append(group)
    signs = {"*": "[^=]*", "?": "[^=]"}
    return "(?:" + "|".join("".join(signs.get(one) or re.escape(one) for one in way) for way in ways) + ")"


@given(name=st.text("aAÄß^= ", max_size=14))
@settings(max_examples=examples(300))
def test_a_normal_name_means_its_regular_expressions(name: str) -> None:
    assert normal_name(name) == _old_normal_name(name)


@given(key=HEARD, name=SOUNDED)
@settings(max_examples=examples(600), deadline=None)
@example("s", "ß\u0301s")
def test_a_fuzzy_name_means_the_expressions_of_its_words(key: str, name: str) -> None:
    test = FuzzyName.parse(key)
    if test is None:
        return
    expressions = [re.sub(r"\\x\{([0-9a-f]{4})\}", r"\\u\1", one) for one in test.sql("v")[1]]
    expected = all(re.search(one, normal_name(name)) for one in expressions)
    assert test.matches(name) == expected


def steps(action: Callable[[], Any]) -> int:
    """How many lines and calls, of Python and of C, an action runs."""
    count = 0

    def line(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += 1
        return line

    def call(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "c_call"

    traced, profiled = sys.gettrace(), sys.getprofile()
    sys.settrace(line)
    sys.setprofile(call)
    try:
        action()
    finally:
        sys.settrace(traced)
        sys.setprofile(profiled)
    return count


HARD = {
    "stars": (lambda n: WildCard("*a" * n + "*b"), lambda n: "a" * 16 * n),
    "only stars": (lambda n: WildCard("*" * n + "b"), lambda n: "a" * 16 * n),
    "stars and marks": (lambda n: WildCard("*a?a" * n + "*b*"), lambda n: "a" * 16 * n),
    "a name": (lambda n: PersonName(("*a" * n + "*b",)), lambda n: "a" * 16 * n),
    "a name of open components": (lambda n: PersonName(("b" + "^*" * n,)), lambda n: "a^" * 16 * n + "a"),
    "spaces of a name": (lambda n: PersonName(("*b",)), lambda n: "a" + " " * 16 * n + "a"),
    "delimiters of a name": (lambda n: PersonName(("*b",)), lambda n: "a" + "^" * 16 * n + "a"),
}
"""By what would make a regular expression try every way: a test, and a value that does not pass it."""


@pytest.mark.parametrize("name", HARD)
def test_what_would_take_ages_takes_steps_by_its_length(name: str) -> None:
    test, value = HARD[name]
    few, many = (steps(lambda size=size: _fails(test(size), value(size))) for size in (20, 80))
    assert many <= 4.5 * few + 100, (few, many)


@pytest.mark.parametrize("key", ["ck" * 20 + "b", "kx" * 20, "*" * 20 + "b", "*k" * 20 + "b", "s*" * 20 + "b"])
def test_sounds_take_at_most_key_times_name(key: str) -> None:
    test = FuzzyName.parse(key)
    assert test is not None
    for size in (50, 200):
        names = ["ck" * size, "sch" * size, "a\u0301" * size]
        count = steps(lambda names=names: [test.matches(name) for name in names])
        assert count <= 150 * len(key) * sum(map(len, names)), size


def test_a_segment_with_marks_takes_at_most_pattern_times_text() -> None:
    pattern, text = "*" + "a?" * 50 + "b*", "a" * 2000
    assert steps(lambda: _fails(WildCard(pattern), text)) <= 3 * len(pattern) * len(text)


def _fails(test: Test, value: str) -> None:
    assert not test.matches(value)


@pytest.mark.parametrize(
    ("test", "value"),
    [
        (WildCard("*a" * 500 + "*b"), "a" * 20_000),
        (WildCard("*a?" * 300 + "*b_"), "a" * 20_000),
        (PersonName(("*a" * 500 + "*b",)), "a" * 20_000),
        (PersonName(("*?" * 500 + "b",)), "a" * 20_000),
        (FuzzyName(("ck" * 20 + "b",)), "ck" * 2_000),
        (FuzzyName(("s*" * 300 + "b",)), "sz" * 500),
    ],
    ids=["stars", "stars and marks", "a name", "marks of a name", "sounds", "sounds and stars"],
)
def test_sql_comes_to_an_end_too(test: Test, value: str) -> None:
    """Tried one way after the other, any of these would outlast the universe."""
    condition, values = test.sql("v")
    rows = duckdb.connect().execute(f"SELECT {condition} FROM (SELECT ? AS v)", [*values, value]).fetchall()
    assert rows == [(False,)] and not test.matches(value)


@pytest.mark.parametrize("vr", ["LO", "UT", "PN"])
def test_the_longest_pattern_that_is_taken_can_be_asked_in_sql(vr: str) -> None:
    db = duckdb.connect()
    for rules in (PLAIN, Rules(fuzzy_names=True)):
        for text in ("?" * MAX_PATTERN, ("sfktxpgu*" * MAX_PATTERN)[:MAX_PATTERN], "aouei?" * (MAX_PATTERN // 6)):
            for test in parse_values(text, vr, rules=rules):
                condition, values = test.sql("v")
                rows = db.execute(f"SELECT {condition} FROM (SELECT 'x' AS v)", values).fetchall()
                assert rows == [(test.matches("x"),)]
            with pytest.raises(ValueError, match=r"wild cards"):
                parse_values(text + "?" * MAX_PATTERN, vr, rules=rules)


@pytest.mark.parametrize("text", ["1" * 60_000 + "x", "1." * 30_000], ids=["digits", "points"])
def test_what_is_no_number_is_so_by_one_look(text: str) -> None:
    with pytest.raises(ValueError, match="not a number"):
        parse_values(text, "DS")

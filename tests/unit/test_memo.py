"""What is remembered is short: a peer's texts of any length are not."""

from __future__ import annotations

import pytest

from sphere.catalog.query import Key
from sphere.conf.memo import MOST, remembered

pytestmark = pytest.mark.unit


def test_long_texts_are_answered_and_not_remembered() -> None:
    calls: list[object] = []

    @remembered(8)
    def seen(*arguments: object) -> int:
        calls.append(arguments)
        return len(calls)

    key, long_key = Key(1, "PatientID", "LO"), Key(1, "PatientID", "LO", creator="c" * 65)
    for short in ("u" * 64, b"u" * 64, 5, None, ("a", ("b", 3)), (key,), tuple("abc")):
        assert seen(short) == seen(short) == len(calls)
    before = len(calls)
    for number, long in enumerate(("u" * 65, b"u" * 65, ("a", ("b" * 65, 3)), (long_key,), (1,) * (MOST + 1))):
        assert (seen(long), seen(long)) == (before + 2 * number + 1, before + 2 * number + 2)

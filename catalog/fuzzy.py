"""Fuzzy semantic matching of person names (PS3.4 C.2.2.2.1.1), by one regular expression a word of the key.

A key matches a name where each of its words begins some word of the name, in any order and component, upper and lower
case, accents, doubled letters and spellings of one sound aside: "jon mueller" finds "Müller^John", "Meier" finds
"Mayer", "smi" finds "Smith^Anna". Words are what spaces, component and group delimiters, hyphens, apostrophes, commas
and full stops separate. `*` stands for any letters of a word, `?` for one. Words of other scripts than Latin match by
their beginnings alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Final

from sphere.catalog.match import Sql, Test, Value, fold, normal_name

BREAKS: Final = r" ^=,.'’\-"
"""What separates words, as the inside of a character class."""

SOUNDS: Final[tuple[tuple[str, ...], ...]] = (
    ("ai", "ay", "ei", "ey", "aj", "ej"),
    ("f", "ph", "pf", "v", "w"),
    ("ks", "cks", "chs", "x"),
    ("k", "ck", "ch", "kh", "c", "q"),
    ("s", "tsch", "sch", "sh", "sz", "cz", "ts", "tz", "z", "ß"),
    ("t", "th", "dt", "d"),
    ("p", "b"),
    ("g", "gh", "dj"),
    ("u", "ue", "ou", "oo", "ů"),
    ("o", "oe", "au", "œ"),
    ("a", "ae", "aa", "æ"),
    ("i", "ie", "ee", "y", "j"),
)
"""Spellings taken for the same sound; the first names it. All other letters are their own."""

_SPELLINGS: Final = sorted(((one, group[0]) for group in SOUNDS for one in group), key=lambda pair: -len(pair[0]))
_GROUP_OF: Final = {group[0]: group for group in SOUNDS}
_MARKS: Final = r"[\x{0300}-\x{036f}]*"
_BASES: Final = {"ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "t", "ı": "i", "ħ": "h"}
"""Letters of Latin script that Unicode does not take apart."""


@dataclass(frozen=True)
class FuzzyName(Test):
    """Each of `words` (folded) begins some word of the name, spellings of one sound aside."""

    words: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> FuzzyName | None:
        """The test that a key asks for; None where it has no letter, which is universal matching."""
        words = tuple(word for word in re.split(f"[{BREAKS}]+", fold(text)) if word.strip("*"))
        return cls(tuple(dict.fromkeys(words))) if words else None

    def sql(self, x: str) -> Sql:
        values: list[Any] = [_pattern(word) for word in self.words]
        return "(" + " AND ".join([f"regexp_matches({x}, ?)"] * len(values)) + ")", values

    def matches(self, value: Value) -> bool:
        name = normal_name(str(value))
        return all(regex.search(name) for regex in self._regexes)

    @cached_property
    def _regexes(self) -> tuple[re.Pattern[str], ...]:
        return tuple(re.compile(_python(_pattern(word))) for word in self.words)


def _python(pattern: str) -> str:
    """A pattern as `re` writes it: RE2 has \\x{...} where Python has \\u...."""
    return re.sub(r"\\x\{([0-9a-f]{4})\}", r"\\u\1", pattern)


def _pattern(word: str) -> str:
    return f"(?:^|[{BREAKS}])" + "".join(_unit(sound) for sound in _sounds(word))


def _sounds(word: str) -> Iterator[str]:
    """The sounds of a word of the key: repeated ones once, an h after another letter not at all."""
    letters = "".join(_base(character) for character in word)
    last, at = "", 0
    while at < len(letters):
        spelling, sound = next((pair for pair in _SPELLINGS if letters.startswith(pair[0], at)), (letters[at],) * 2)
        at += len(spelling)
        if sound != last and not (sound == "h" and last):
            yield sound
            last = sound


def _unit(sound: str) -> str:
    """The letters that may stand for a sound, doubled or with an h after it."""
    if sound in ("*", "?"):
        return f"[^{BREAKS}]" + ("*" if sound == "*" else "")
    spellings = sorted(_GROUP_OF.get(sound, (sound,)), key=len, reverse=True)
    alternatives = "|".join("".join(_letter(letter) for letter in spelling) for spelling in spellings)
    return f"(?:{alternatives})+{_MARKS}h*"


def _letter(letter: str) -> str:
    """A letter with or without accents."""
    variants = _variants().get(letter)
    return f"[{letter}{variants}]{_MARKS}" if variants else re.escape(letter)


@cache
def _variants() -> dict[str, str]:
    """From a Latin letter to the letters that are it with an accent."""
    found: dict[str, str] = {chr(code): "" for code in range(ord("a"), ord("z") + 1)}
    for code in (*range(0x00C0, 0x0250), *range(0x1E00, 0x1F00)):
        character = chr(code)
        base = _base(character)
        if base in found and fold(character) == character:
            found[base] += character
    return found


def _base(character: str) -> str:
    """A letter without its accents; ß, æ and œ, and letters of other scripts, as they are."""
    if character in _BASES:
        return _BASES[character]
    base = unicodedata.normalize("NFD", character)[0]
    return base if "a" <= base <= "z" else character

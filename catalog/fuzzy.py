"""Fuzzy semantic matching of person names (PS3.4 C.2.2.2.1.1), by one regular expression a word of the key in SQL.

A key matches a name where each of its words begins some word of the name, in any order and component, upper and lower
case, accents, doubled letters and spellings of one sound aside: "jon mueller" finds "Müller^John", "Meier" finds
"Mayer", "smi" finds "Smith^Anna". Words are what spaces, component and group delimiters, hyphens, apostrophes, commas
and full stops separate. `*` stands for any letters of a word, `?` for one. Words of other scripts than Latin match by
their beginnings alone.

In Python the same is found by the set of places that a name can be read up to, sound by sound: `re` would try every
way to spell "ckckck", which doubles with each letter.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Final

from sphere.catalog.match import Sql, Test, Value, fold, normal_name

BREAKS: Final = r" ^=,.'’\-"
"""What separates words, as the inside of a character class."""
_BREAKS: Final = frozenset(BREAKS.replace("\\", ""))

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
        starts = {at for at in range(len(name) + 1) if at == 0 or name[at - 1] in _BREAKS}
        return all(_is_heard(sounds, name, starts) for sounds in self._heard)

    @cached_property
    def _heard(self) -> tuple[tuple[_Spellings, ...], ...]:
        return tuple(tuple(map(_spellings, _sounds(word))) for word in self.words)


_Spellings = tuple[str, tuple[tuple[str, ...], ...]]
"""A sound and the ways to spell it, each as the letters that may stand at each of its places; none for a wild card.
Where these are several, marks may follow."""


def _is_heard(sounds: Sequence[_Spellings], name: str, places: set[int]) -> bool:
    """Whether the sounds follow each other from one of some places of a name on."""
    for sound, spellings in sounds:
        if sound == "?":
            places = {at + 1 for at in places if at < len(name) and name[at] not in _BREAKS}
        elif sound == "*":
            places = _onwards(places, name, lambda letter: letter not in _BREAKS)
        else:
            places = _onwards(_spelled(spellings, name, places), name, _is_mark)
            places = _onwards(places, name, lambda letter: letter == "h")
        if not places:
            return False
    return True


def _spelled(spellings: Sequence[Sequence[str]], name: str, places: set[int]) -> set[int]:
    """The ends of one or more spellings of a sound, from some places on; each place is looked at once."""
    found: set[int] = set()
    ahead = list(places)
    seen = set(places)
    while ahead:
        at = ahead.pop()
        for letters in spellings:
            end = _end(letters, name, at)
            if end < 0:
                continue
            found.add(end)
            for further in (end, _past_marks(letters[-1], name, end)):  # a mark may also be a sound of its own
                if further not in seen:
                    seen.add(further)
                    ahead.append(further)
    return found


def _end(letters: Sequence[str], name: str, at: int) -> int:
    """Where a spelling that begins at a place ends, marks after its last letter left over; -1 where it does not."""
    for number, variants in enumerate(letters):
        at = _past_marks(letters[number - 1], name, at) if number else at
        if at >= len(name) or name[at] not in variants:
            return -1
        at += 1
    return at


def _onwards(places: set[int], name: str, passes: Callable[[str], bool]) -> set[int]:
    """The places, and those that can be come to from them over letters that pass."""
    found = set(places)
    for place in places:
        at = place
        while at < len(name) and passes(name[at]):
            at += 1
            if at in found:
                break
            found.add(at)
    return found


def _past_marks(variants: str, name: str, at: int) -> int:
    while len(variants) > 1 and at < len(name) and _is_mark(name[at]):
        at += 1
    return at


def _is_mark(letter: str) -> bool:
    return "\u0300" <= letter <= "\u036f"


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


def _spellings(sound: str) -> _Spellings:
    """A sound with what `_unit` says of it: each letter with its accented variants."""
    if sound in ("*", "?"):
        return sound, ()
    return sound, tuple(
        tuple(letter + _variants().get(letter, "") for letter in one) for one in _GROUP_OF.get(sound, (sound,))
    )


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

"""Wild card patterns (PS3.4 C.2.2.2.4) on text: ``*`` stands for any characters, ``?`` for exactly one; case matters.

Patterns come from whoever asks, so none may take long: never a regular expression of Python, which would try every
way to share a text among several ``*``. What lies between two ``*`` is put where it fits first, and that is final, as a
later place would leave less for the rest: at most len(text) * len(pattern) characters are compared.
"""

from __future__ import annotations

from typing import Final

SIGNS: Final = frozenset("*?")


class Wild:
    """A pattern, taken apart once."""

    __slots__ = ("_first", "_last", "_middle", "_size", "_whole")

    def __init__(self, pattern: str) -> None:
        self._first, *rest = [_Segment(part) for part in pattern.split("*")]
        self._whole = not rest
        self._last = rest.pop() if rest else _Segment("")
        self._middle = [one for one in rest if one.size]
        self._size = self._first.size + self._last.size + sum(one.size for one in self._middle)

    def matches(self, text: str) -> bool:
        """Whether the whole of `text` is such a text."""
        if len(text) < self._size or (self._whole and len(text) > self._size):
            return False
        at, end = self._first.size, len(text) - self._last.size
        if not self._first.stands(text, 0) or not self._last.stands(text, end):
            return False
        for segment in self._middle:
            found = segment.find(text, at, end)
            if found < 0:
                return False
            at = found + segment.size
        return True


class _Segment:
    """What lies between two ``*``: runs of characters at their places, any character between them."""

    __slots__ = ("_key", "_others", "size")

    def __init__(self, text: str) -> None:
        self.size = len(text)
        runs, at = [], 0
        for run in text.split("?"):
            if run:
                runs.append((at, run))
            at += len(run) + 1
        runs.sort(key=lambda one: -len(one[1]))
        self._key = runs[0] if runs else (0, "")
        self._others = runs[1:]

    def stands(self, text: str, at: int) -> bool:
        """Whether it fits at a place, from where `text` has as many characters."""
        place, run = self._key
        return text.startswith(run, at + place) and all(text.startswith(one, at + off) for off, one in self._others)

    def find(self, text: str, at: int, end: int) -> int:
        """The first place between `at` and `end` where it fits; -1 for none."""
        place, run = self._key
        last = end - self.size
        while at <= last:
            found = text.find(run, at + place, last + place + len(run))
            if found < 0:
                return -1
            at = found - place
            if all(text.startswith(one, at + off) for off, one in self._others):
                return at
            at += 1
        return -1

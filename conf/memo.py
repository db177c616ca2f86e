"""Answers that are remembered, and no more memory for them than the standard's own lengths take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

UID_LENGTH = 64  # characters of a UID, and of LO (PS3.5 Table 6.2-1)
MOST = 256  # elements of a tuple, as keys of a query

Answer = TypeVar("Answer")


def remembered(size: int, *, longest: int = UID_LENGTH) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """`functools.lru_cache(size)` that remembers nothing of a call with a text of more than `longest` characters, among
    its arguments or in tuples of them: whoever sends them may send as many as he likes."""

    def remember(function: Callable[..., Answer]) -> Callable[..., Answer]:
        known = functools.lru_cache(size)(function)

        @functools.wraps(function)
        def answer(*arguments: Any) -> Answer:
            return known(*arguments) if _short(arguments, longest) else function(*arguments)

        answer.cache_clear = known.cache_clear  # type: ignore[attr-defined]  # as of lru_cache
        return answer

    return remember


def _short(arguments: tuple[Any, ...], longest: int) -> bool:
    for one in arguments:
        if isinstance(one, (str, bytes)):
            if len(one) > longest:
                return False
        elif isinstance(one, tuple):
            if len(one) > MOST or not _short(one, longest):
                return False
        elif len(getattr(one, "creator", "")) > longest:  # of a key
            return False
    return True

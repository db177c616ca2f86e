"""Whether an answer is still wanted: asked between pages and steps of a query, as none of them need match anything."""

from __future__ import annotations

from collections.abc import Callable

Cancelled = Callable[[], bool]
"""True as soon as nobody wants the answer any more. Asked by one thread at a time, not always the same one."""


def never() -> bool:
    """Of a query that is only cancelled by closing its iterator."""
    return False

"""Bodies as they are taken in: piece by piece, the next one coming while one is fed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from sphere.scp.web.incoming import take_in
from sphere.scp.web.problem import WebError

pytestmark = pytest.mark.unit


class Fed:
    """What was fed; `hold` keeps the first piece until it is set, `fails` is refused."""

    def __init__(self, *, fails: bytes = b"") -> None:
        self.pieces: list[bytes] = []
        self.hold = threading.Event()
        self.begun = threading.Event()
        self._fails, self._busy = fails, threading.Lock()

    def __call__(self, piece: bytes) -> None:
        assert self._busy.acquire(blocking=False), "two at a time"
        try:
            self.begun.set()
            assert self.hold.wait(30)
            if piece == self._fails:
                raise WebError("refused")
            self.pieces.append(piece)
        finally:
            self._busy.release()


def test_the_next_piece_comes_while_one_is_fed() -> None:
    fed = Fed()

    async def body() -> AsyncIterator[bytes]:
        yield b"1"
        await asyncio.to_thread(fed.begun.wait, 30)
        assert not fed.pieces, "the first one is being fed"
        fed.hold.set()
        for number in range(2, 50):
            yield b"%d" % number

    asyncio.run(take_in(body(), fed))
    assert fed.pieces == [b"%d" % number for number in range(1, 50)]


def test_what_the_body_raises_comes_when_nothing_is_fed_any_more() -> None:
    fed = Fed()

    async def body() -> AsyncIterator[bytes]:
        yield b"1"
        await asyncio.to_thread(fed.begun.wait, 30)
        asyncio.get_running_loop().call_later(0.2, fed.hold.set)
        raise WebError("the client went away")

    with pytest.raises(WebError, match="the client went away"):
        asyncio.run(take_in(body(), fed))
    assert fed.pieces == [b"1"]


def test_a_piece_that_is_refused_ends_it_though_no_other_comes() -> None:
    fed, ended = Fed(fails=b"1"), []

    async def body() -> AsyncIterator[bytes]:
        try:
            yield b"1"
            fed.hold.set()
            await asyncio.Event().wait()  # a client that sends nothing more
        finally:
            ended.append(True)

    with pytest.raises(WebError, match="refused"):
        asyncio.run(asyncio.wait_for(take_in(body(), fed), 30))
    assert ended == [True] and not fed.pieces

"""pynetdicom as a service class user in tests."""

from __future__ import annotations

import threading

from pynetdicom.association import Association


class _Hold(threading.Event):
    """A checkpoint that says when the thread it is for has reached it."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.reached.set()
        return super().wait(timeout)


def hold_reactor(assoc: Association) -> None:
    """Stop the thread that looks for messages on its own, until release or abort.

    pynetdicom pauses it before each request, but trusts a flag that is up before the thread has stopped: now and then
    it goes on, takes the response, and the request waits until its timeout.
    """
    hold = _Hold()
    assoc._reactor_checkpoint = hold
    while assoc.is_alive() and not hold.reached.wait(0.01):
        pass

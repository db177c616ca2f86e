"""Ctrl-C of a verb, at whatever moment: one line and status 130, and never the traceback of what it broke off.

PySpark takes SIGINT for itself while it starts. Its handler asks the JVM to cancel jobs, on the connection whose answer
is being waited for: what comes of that is no KeyboardInterrupt but an error of Py4J, and may come as one of ours.
So SIGINT is noted where no handler can hide it, and whatever a verb fails with afterwards is its end by Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

STATUS: Final = 130
"""Exit status: 128 and the number of SIGINT, as shells have it."""

LINE: Final = "sphere: interrupted"

AGAIN_S: Final = 0.05
"""Seconds until Ctrl-C is repeated that came during a finalizer, where what it raises goes nowhere."""


class Interrupts:
    """Whether SIGINT came while a verb ran."""

    def __init__(self, noted: int | None) -> None:
        self._noted = noted
        self._came = False

    def came(self) -> bool:
        """Whether it came, since the verb began."""
        if self._noted is not None:
            with suppress(BlockingIOError):
                self._came |= signal.SIGINT in os.read(self._noted, 4096)
        return self._came


@contextmanager
def noted() -> Iterator[Interrupts]:
    """Note SIGINT meanwhile, which raises KeyboardInterrupt; nothing of this where it is ignored, or outside of the
    main thread, to which signals come.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield Interrupts(None)
        return
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    hook = sys.unraisablehook
    woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # told by the interpreter, not by a handler
    signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _raise_again
    logging.getLogger().addFilter(_not_of_ctrl_c)
    try:
        yield Interrupts(read)
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(woken)
        sys.unraisablehook = hook
        logging.getLogger().removeFilter(_not_of_ctrl_c)
        os.close(read)
        os.close(write)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """As Python's own, which `sphere.jobs.session` does not keep; Py4J need not say what becomes of its connections."""
    logging.getLogger("py4j").setLevel(logging.CRITICAL + 1)
    raise KeyboardInterrupt


def _not_of_ctrl_c(record: logging.LogRecord) -> bool:
    """Py4J logs the KeyboardInterrupt that it lets go on, with its traceback."""
    return not (record.exc_info and isinstance(record.exc_info[1], KeyboardInterrupt))


def _raise_again(unraisable: UnraisableHookArgs) -> None:
    """Finalizers of Py4J wait for the JVM, so that Ctrl-C often comes to one."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        again = threading.Timer(AGAIN_S, signal.raise_signal, (signal.SIGINT,))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(unraisable)


def end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """The handler while no verb runs: there is nothing to put in order."""
    with suppress(OSError):
        os.write(2, f"{LINE}\n".encode())
    os._exit(STATUS)

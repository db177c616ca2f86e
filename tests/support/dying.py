"""A job that dies on its way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def killed_at(step: str, call: int) -> Callable[..., None]:
    """An `on_step` that has this process killed (SIGKILL) when it is called the `call`th time with the name `step`."""
    left = call

    def on_step(name: str, *_: object) -> None:
        nonlocal left
        left -= name == step
        if name == step and not left:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_step

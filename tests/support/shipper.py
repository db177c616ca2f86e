"""A shipper that is killed at a step: ``python -m tests.support.shipper SETTINGS_JSON STEP NUMBER``.

It ships once, and ends by SIGKILL when the step of that name is told for the NUMBERth time; status 0 where it never is.
"""

from __future__ import annotations

import os
import signal
import sys

from sphere.conf.settings import Settings
from sphere.ingest import shipping


def main() -> None:
    """One round."""
    settings, step, number = Settings.model_validate_json(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    seen = 0

    def on_step(name: str) -> None:
        nonlocal seen
        seen += name == step
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    with shipping.exclusive(settings):
        done = shipping.Shipper(settings, on_step=on_step).round()
    sys.exit(1 if done.error or done.damaged else 0)


if __name__ == "__main__":
    main()

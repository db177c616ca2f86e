"""An extraction that ends with SIGKILL: ``python -m tests.support.extract_until SETTINGS_JSON STEP CALL [early]``.

It kills itself when `on_step` is called for the CALLth time with the name STEP; `early` says that it will before Spark
has anything to do, which then is not started.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from sphere.conf.settings import Settings
from sphere.jobs.extract import run
from sphere.jobs.session import spark_session


def main() -> None:
    """Run, and die on the way."""
    settings = Settings.model_validate_json(sys.argv[1])
    step, left = sys.argv[2], int(sys.argv[3])

    def on_step(name: str, *_: object) -> None:
        nonlocal left
        left -= name == step
        if name == step and not left:
            os.kill(os.getpid(), signal.SIGKILL)

    spark: Any = None if sys.argv[4:] == ["early"] else spark_session(settings, app_name="extract until")
    run(spark, settings, on_step=on_step)


if __name__ == "__main__":
    main()

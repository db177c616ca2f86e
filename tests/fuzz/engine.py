"""The process that atheris takes over: ``python -m tests.fuzz.engine TARGET [libFuzzer's arguments]``."""

from __future__ import annotations

import logging
import sys
import tracemalloc
import warnings

import atheris

from tests.fuzz.targets import TRACED, target


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    with atheris.instrument_imports(include=["sphere.ingest", "sphere.catalog", "sphere.scp"]):
        run = target(sys.argv[1])
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    if sys.argv[1] in TRACED:
        tracemalloc.start()  # once: each start and stop leaves 8 KiB behind
    atheris.Setup([sys.argv[0], *sys.argv[2:]], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

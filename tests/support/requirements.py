"""What setup.cfg asks for besides PySpark, a line each: it is installed meanwhile (see Makefile)."""

from __future__ import annotations

import configparser
from pathlib import Path

SETUP = Path(__file__).parents[2] / "setup.cfg"


def others() -> list[str]:
    """Requirements of the package and of its tests as setup.cfg has them, without PySpark."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(SETUP, encoding="utf-8")
    lines = f"{parser['options']['install_requires']}\n{parser['options.extras_require']['test']}".splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("pyspark")]


if __name__ == "__main__":
    print("\n".join(others()))

"""The packages of constraints.txt, in parts that are installed beside each other (`... requirements PARTS FOLDER`).

All that is installed is pinned there, so that nothing has to be resolved. PySpark has a part of its own (see Makefile).
"""

from __future__ import annotations

import sys
from pathlib import Path

PINS = Path(__file__).parents[2] / "constraints.txt"
_SPARK = ("pyspark==", "py4j==")


def parts(count: int) -> list[list[str]]:
    """The pins in `count` lists, without PySpark's."""
    lines = [
        line for line in PINS.read_text(encoding="utf-8").splitlines() if line and not line.startswith(("#", *_SPARK))
    ]
    return [lines[number::count] for number in range(count)]


def main(count: int, folder: Path) -> None:
    """Write each part to FOLDER/pins-NUMBER.txt, numbered from 1."""
    for number, lines in enumerate(parts(count), 1):
        (folder / f"pins-{number}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

"""Install, where it may, what some tests need from Debian and npm: `python -m tests.support.install`.

What is missing is named, and the tests that need it are skipped (or fail with SPHERE_REQUIRE_ALL=1).
"""

from __future__ import annotations

from sphere.conf import viewer
from sphere.conf.errors import ExternalMissing
from tests.support import npm, packages


def main() -> None:
    """Install what is missing, or say what it was."""
    packages.install()
    if line := npm.install():
        print(f"tests with dcmjs-dimse will be skipped: {line}")
    try:
        plain = viewer.install(viewer.folder()).plain
        if plain:
            print(f"OHIF is not minified: {plain}")
    except ExternalMissing as error:
        print(f"tests with OHIF will be skipped: {error}")


if __name__ == "__main__":
    main()

"""What the program `sphere` begins with: Ctrl-C is one line while the command line is read in and while Python ends."""

from __future__ import annotations

import signal

from sphere.interrupts import end_at_once


def main() -> None:
    """The command line; does not return."""
    # Else it is ignored, as of what runs in the background.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
    from sphere.cli import main

    main(prog_name="sphere")


if __name__ == "__main__":
    main()

"""What a process has resident at most, as the kernel counts it (proc(5))."""

from __future__ import annotations

from pathlib import Path


def peak(pid: int, *, forget: bool = False) -> int:
    """The most bytes that the process ever had resident; `forget`: from now on."""
    process = Path("/proc") / str(pid)
    if forget:
        (process / "clear_refs").write_text("5")
    [line] = [line for line in (process / "status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024

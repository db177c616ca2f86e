"""What a compaction did, or would do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import orjson


@dataclass(frozen=True, slots=True)
class CompactReport:
    """Bundles looked at, of these written anew and removed as a whole; instances of which nothing is left now, the
    members that these were and their size in bytes; how many bytes the storage has more room for.

    ``waiting`` counts the deleted instances whose bytes stay for now, by why. ``failures`` says by bundle, or by table,
    what went wrong: they are as they were, and the next run tries again. ``vacuumed`` files of tables, of
    ``vacuumed_bytes``, went with their log. Of a ``dry_run`` it is what would be done, without `freed`.
    """

    bundles: int = 0
    rewritten: int = 0
    removed: int = 0
    instances: int = 0
    members: int = 0
    bytes: int = 0
    freed: int = 0
    waiting: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    vacuumed: int = 0
    vacuumed_bytes: int = 0
    dry_run: bool = False
    seconds: float = 0.0

    def to_json(self) -> str:
        """One JSON object."""
        return orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2).decode()

    def __str__(self) -> str:
        """One line for the person who ran the job."""
        would = "would be " if self.dry_run else ""
        parts = [
            f"{self.instances} instances ({self.members} members, {self.bytes / 1e6:.1f} MB) {would}erased from "
            f"{self.rewritten + self.removed} of {self.bundles} bundles, {self.removed} of them {would}removed"
        ]
        if not self.dry_run:
            parts.append(f"{self.freed / 1e6:.1f} MB given back")
        if self.waiting:
            why = ", ".join(f"{count} {reason}" for reason, count in sorted(self.waiting.items()))
            parts.append(f"staying: {why}")
        if self.vacuumed:
            parts.append(f"{self.vacuumed} old files of tables ({self.vacuumed_bytes / 1e6:.1f} MB) {would}removed")
        if self.failures:
            parts.append(f"{len(self.failures)} failed")
        return f"{'; '.join(parts)}; {self.seconds:.1f} s"

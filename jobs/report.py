"""What an extraction did, in numbers that add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Report:
    """Members of bundles, counted by what became of them: ``read == rows + duplicates + rejected``.

    ``rows`` are in `instances` now, ``updated`` of them in the place of another version. ``duplicates`` are other
    copies of an instance, ``conflicts`` the rows written about those whose bytes differ. ``rejected`` are in
    `quarantine`, counted by reason (a RejectReason) in ``reasons``. ``deleted`` members, not among those read, went to
    `tombstones`, ``restored`` of those read came from there. ``seconds`` says how long each step took, in the
    order of the steps.
    """

    read: int = 0
    rows: int = 0
    updated: int = 0
    duplicates: int = 0
    conflicts: int = 0
    rejected: int = 0
    deleted: int = 0
    restored: int = 0
    batches: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Report) -> Report:
        """Both together; a step of the same name counts its seconds together."""
        return Report(
            read=self.read + other.read,
            rows=self.rows + other.rows,
            updated=self.updated + other.updated,
            duplicates=self.duplicates + other.duplicates,
            conflicts=self.conflicts + other.conflicts,
            rejected=self.rejected + other.rejected,
            deleted=self.deleted + other.deleted,
            restored=self.restored + other.restored,
            batches=self.batches + other.batches,
            reasons=_sum(self.reasons, other.reasons),
            seconds=_sum(self.seconds, other.seconds),
        )

    @property
    def total_s(self) -> float:
        """Seconds from the lock to the end."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        """One line for the person who ran the job."""
        taken_out = f"{self.deleted} deleted; " if self.deleted else ""
        if not self.read:
            return f"{taken_out}nothing new to extract ({self.total_s:.1f} s)"
        why = ", ".join(f"{reason} {count}" for reason, count in sorted(self.reasons.items()))
        again = f" ({self.restored} restored)" if self.restored else ""
        return (
            f"{taken_out}{self.read} read{again}: {self.rows} rows ({self.updated} updated), "
            f"{self.duplicates} duplicates ({self.conflicts} conflicts), "
            f"{self.rejected} rejected{f' ({why})' if why else ''}; "
            f"{self.total_s:.1f} s, {self.read / self.total_s:.0f}/s"
        )


def _sum(left: Mapping[str, Number], right: Mapping[str, Number]) -> dict[str, Number]:
    return {name: left.get(name, 0) + right.get(name, 0) for name in {**left, **right}}

"""Which attributes become typed columns, and of which type: modules.toml read against the data dictionary (PS3.6)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

import pyarrow as pa
from pydicom.datadict import dictionary_VM, dictionary_VR, tag_for_keyword

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FLOAT_VRS: Final = frozenset(("DS", "FD", "FL"))
_INT_VRS: Final = frozenset(("IS", "US", "SS", "UL", "SL", "SV", "UV", "US or SS"))


@dataclass(frozen=True, slots=True)
class Column:
    """One typed column: an attribute of PS3.6 and the Arrow type of its values.

    DA is date32; DS, FD and FL are float64; IS and the binary integers int64; all other VRs text. A value multiplicity
    other than "1" makes a list of that.
    """

    keyword: str
    tag: int
    vr: str
    vm: str
    arrow: pa.DataType

    @property
    def multiple(self) -> bool:
        """Whether the column holds a list of values."""
        return self.vm != "1"


@dataclass(frozen=True, slots=True)
class Module:
    """A module of PS3.3, or a functional group macro (then ``name`` is the keyword of its sequence)."""

    name: str
    clause: str
    keywords: tuple[str, ...]


def _read() -> Mapping[str, Any]:
    text = files("sphere.ingest.header").joinpath("modules.toml").read_text(encoding="utf-8")
    data: Mapping[str, Any] = tomllib.loads(text)
    return data


def _arrow(vr: str, vm: str) -> pa.DataType:
    if vr == "DA":
        scalar = pa.date32()
    elif vr in _FLOAT_VRS:
        scalar = pa.float64()
    elif vr in _INT_VRS:
        scalar = pa.int64()
    else:
        scalar = pa.string()
    return scalar if vm == "1" else pa.list_(scalar)


def _column(keyword: str) -> Column:
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise KeyError(f"modules.toml: {keyword!r} is not a keyword of PS3.6")
    vr, vm = dictionary_VR(tag), dictionary_VM(tag)
    return Column(keyword, int(tag), vr, vm, _arrow(vr, vm))


_DATA = _read()
MODULES: Final = tuple(Module(m["name"], m["clause"], tuple(m["keywords"])) for m in _DATA["module"])
FUNCTIONAL_GROUPS: Final = tuple(
    Module(m["sequence"], m["clause"], tuple(m["keywords"])) for m in _DATA["functional_group"]
)
COLUMNS: Final[tuple[Column, ...]] = tuple(
    sorted(
        (_column(keyword) for keyword in {k for module in MODULES + FUNCTIONAL_GROUPS for k in module.keywords}),
        key=lambda column: column.tag,
    )
)

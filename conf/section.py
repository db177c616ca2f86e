"""What every section of sphere.toml is, and the kinds of values that several of them have."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

YEAR_S = 366 * 86_400
Port = Annotated[int, Field(ge=0, le=65535)]
AETitle = Annotated[str, Field(min_length=1, max_length=16, pattern=r"^[\x20-\x5b\x5d-\x7e]*[\x21-\x5b\x5d-\x7e]$")]
Seconds = Annotated[float, Field(ge=0, le=YEAR_S)]


def several(value: Any) -> Any:
    """One value may stand for a list of it."""
    return value if isinstance(value, list | tuple) else (value,)


def _network(value: str) -> str:
    try:
        ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise ValueError("is neither an IP address nor a network such as 10.0.0.0/8") from None
    return value


Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(several)]
Networks = Annotated[tuple[Annotated[str, AfterValidator(_network)], ...], BeforeValidator(several)]
CollectionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Collections = Annotated[tuple[CollectionName, ...], BeforeValidator(several)]
KeyValues = Annotated[tuple[Text | Mapping[str, Any], ...], BeforeValidator(several)]


class Section(BaseModel):
    """A table of sphere.toml; immutable, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_true(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation in (int, float):
            raise ValueError("is a number, not true or false")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("has a NUL character")
        return value

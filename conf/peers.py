"""Settings of who calls and is called: peers, what they may do, and rules for what comes from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from sphere.conf.section import AETitle, Collections, KeyValues, Networks, Port, Seconds, Section, Texts, several

NOT_AUTHORIZED = 0x0124  # Refused: not authorized (PS3.7 C.5.24)
Compression = Literal[
    "RLELossless", "JPEGLSLossless", "JPEG2000Lossless", "ExplicitVRLittleEndian", "ImplicitVRLittleEndian"
]


def _failure(value: int) -> int:
    """A C-STORE failure that a receiver may answer (PS3.4 Table B.2-1, PS3.7 9.1.1.1.9)."""
    ranges = (range(0xA700, 0xA800), range(0xA900, 0xAA00), range(0xC000, 0xD000))
    if value in (0x0110, 0x0111, 0x0117, 0x0122, 0x0124, 0x0212) or any(value in one for one in ranges):
        return value
    raise ValueError(
        "is no failure status of C-STORE: 0xA7xx out of resources, 0xA9xx or 0xCxxx data set, 0x0110, 0x0111, 0x0117, "
        "0x0122, 0x0124 not authorized or 0x0212"
    )


Right = Literal["store", "find", "retrieve"]


class Rights(Section):
    """What a caller may do, and how much of it at once: counted over all receiver processes of the host."""

    may: tuple[Right, ...] = Field(
        ("store", "find", "retrieve"),
        description="What it may ask of us: store (C-STORE), find (C-FIND), retrieve (C-MOVE, C-GET); C-ECHO always. "
        "Anything else is answered 0x0124, not authorized.",
    )
    max_associations: int = Field(
        0, ge=0, le=1024, description="Associations at once; 0: only dimse.max_associations of each receiver."
    )
    max_queries: int = Field(
        0, ge=0, le=1024, description="C-FIND at once, further ones are answered 0xA700; 0: any number."
    )
    max_instances_s: float = Field(
        0, ge=0, description="Instances per second that it may store; faster ones are answered later. 0: any rate."
    )
    max_mb_s: float = Field(0, ge=0, description="MB (10^6 bytes) per second, in the same way; 0: any rate.")
    idle_s: Seconds = Field(0, description="Seconds that its idle association is kept; 0: dimse.network_timeout_s.")
    dimse_timeout_s: Seconds = Field(
        0, description="Seconds to wait for its next DIMSE message of an exchange; 0: dimse.dimse_timeout_s."
    )


class Strangers(Rights):
    """Callers from loopback that are no peer; all of them together have these limits."""


class Peer(Rights):
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$", description="Name used on the command line.")
    ae_title: AETitle = Field(description="Its application entity title.")
    host: str = Field(min_length=1, description="Its address or host name.")
    port: Port = Field(104, description="Its TCP port.")
    transfer_syntaxes: tuple[Compression, ...] = Field(
        (),
        description="What it is sent where an instance lies in none of these, the best first; passed over are those "
        "that it does not take, or that cannot be made of an instance. None loses anything. Empty: as it lies, else "
        "uncompressed.",
    )
    tls: bool = Field(False, description="Whether it is called with TLS (PS3.15 B.12).")
    tls_ca: str = Field("", description="PEM file of CAs of its certificate; empty: dimse.tls_ca, else the system's.")
    tls_verify: Literal["name", "ca", "none"] = Field(
        "name",
        description="What is checked of its certificate: its CA and that it is for `host`; its CA alone (enough where "
        "the CA is a hospital's own); nothing, which protects from listeners only.",
    )


Way = Literal["dimse", "web", "import"]


class Condition(Section):
    """What an instance is like: everything that is given must hold; several values: any of them."""

    via: Annotated[tuple[Way, ...], BeforeValidator(several)] = Field(
        (), description="How it comes: dimse (C-STORE, C-GET), web (STOW-RS), import; a list means any of them."
    )
    calling_ae: Texts = Field((), description="AE title of the sender; * and ? are wild cards. A list: any of them.")
    peer: Texts = Field((), description="Name of the sender in [[peers]], by its AE title and address.")
    address: Networks = Field((), description="IP address or network of the sender: 10.0.0.5, 10.0.0.0/8.")
    modality: Texts = Field((), description="Modality (0008,0060); the same as that key in `keys`.")
    sop_class: Texts = Field((), description="SOP class: keyword (CTImageStorage), UID, or UID with wild cards.")
    transfer_syntax: Texts = Field((), description="Transfer syntax: keyword, UID, or UID with wild cards.")
    keys: Mapping[str, KeyValues] = Field(
        default_factory=dict,
        description="Any attributes of the header by keyword or tag, matched as in a query (PS3.4 C.2.2.2): "
        '{PatientID="TRIAL*", StudyDate="20240101-"}; a list of values: any of them; a table: the item of a '
        "sequence. All must match.",
    )


class Rule(Condition):
    """What is to be done with instances that are so."""

    name: str = Field("", description="What the log and the sender are told of a refusal; empty: its place, rules.0.")
    called_ae: Texts = Field((), description="AE title that the sender called; wild cards as in calling_ae.")
    action: Literal["tag", "accept", "reject"] = Field(
        description="tag: add the collections and look at the next rule; accept: add them and look at no further rule; "
        "reject: refuse the instance. Without a rule that rejects it, an instance is accepted."
    )
    collection: Collections = Field((), description="Collections that the instance is catalogued in.")
    status: Annotated[int, AfterValidator(_failure)] = Field(
        NOT_AUTHORIZED, description="DIMSE status of a refusal: a failure of C-STORE (0x0124, 292, is: not authorized)."
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Rule:
        if self.action == "tag" and not self.collection:
            raise ValueError("a rule that tags needs a `collection`")
        if self.action == "reject" and self.collection:
            raise ValueError("a rule that rejects takes no `collection`: nothing is catalogued")
        if self.action != "reject" and self.status != NOT_AUTHORIZED:
            raise ValueError("`status` is for a rule that rejects")
        return self


class Forward(Condition):
    """Instances that are so are sent to a peer once they are catalogued."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_.-]+$", description="Name of the forward, under which its queue is kept; only once."
    )
    to: str = Field(min_length=1, description="Name in [[peers]] of the peer that they are sent to.")
    collection: Collections = Field((), description="Collections that rules tagged them with; a list: any of them.")

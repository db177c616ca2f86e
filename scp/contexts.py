"""What is accepted in association negotiation (PS3.8 7.1.1.13, PS3.7 Annex D).

Storage: every storage SOP class, standard, retired, unknown to the library or private, in the first transfer syntax
that its presentation context proposes, whatever it is: data sets are kept as they come, so what the sender prefers is
best. Query, Retrieve and Verification: the first proposed transfer syntax that we can encode. Anything else is answered
"abstract syntax not supported".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from pydicom._uid_dict import UID_dictionary
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom import build_context
from pynetdicom.presentation import PresentationContext

from sphere.catalog.query import Features, Model

VERIFICATION = "1.2.840.10008.1.1"
FIND_MODELS: dict[str, Model] = {  # SOP classes of PS3.4 C.6
    "1.2.840.10008.5.1.4.1.2.1.1": "PATIENT_ROOT",
    "1.2.840.10008.5.1.4.1.2.2.1": "STUDY_ROOT",
    "1.2.840.10008.5.1.4.1.2.3.1": "PATIENT_STUDY_ONLY",  # retired
}
RetrieveModel = Literal["PATIENT_ROOT", "STUDY_ROOT", "PATIENT_STUDY_ONLY", "INSTANCE_ROOT"]
MOVE_MODELS: dict[str, RetrieveModel] = {  # PS3.4 C.6, Y.6
    "1.2.840.10008.5.1.4.1.2.1.2": "PATIENT_ROOT",
    "1.2.840.10008.5.1.4.1.2.2.2": "STUDY_ROOT",
    "1.2.840.10008.5.1.4.1.2.3.2": "PATIENT_STUDY_ONLY",  # retired
    "1.2.840.10008.5.1.4.1.2.4.2": "INSTANCE_ROOT",
}
GET_MODELS: dict[str, RetrieveModel] = {
    "1.2.840.10008.5.1.4.1.2.1.3": "PATIENT_ROOT",
    "1.2.840.10008.5.1.4.1.2.2.3": "STUDY_ROOT",
    "1.2.840.10008.5.1.4.1.2.3.3": "PATIENT_STUDY_ONLY",  # retired
    "1.2.840.10008.5.1.4.1.2.4.3": "INSTANCE_ROOT",
}
STORAGE_COMMITMENT = "1.2.840.10008.1.20.1"  # Push Model (PS3.4 J.3.5)
ENCODABLE = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian)
RELATIONAL = 1  # byte of a FIND, MOVE or GET class' application information (PS3.4 Tables C.5-1, C.5-3, C.5-5)
_FEATURES: Mapping[int, str] = {  # further bytes of a FIND class' (PS3.4 Table C.5-1); 5 is a conversion not offered
    RELATIONAL: "relational",
    2: "combined_datetime",
    3: "fuzzy_names",
    4: "timezone_adjustment",
    6: "empty_values",
    7: "multiple_values",
}
DICOM_ROOT = "1.2.840.10008."
COMPOSITE_STORAGE_ROOT = "1.2.840.10008.5.1.4.1.1."  # where PS3.6 puts new storage SOP classes
NOT_OVER_A_NETWORK = "1.2.840.10008.1.3.10"  # Media Storage Directory Storage: a DICOMDIR


def is_storage(uid: str) -> bool:
    """Whether a C-STORE of this SOP class can be meant: a storage class, or one that nothing is known of.

    A private UID can be anything; it is taken for storage, as private objects are by far its commonest use.
    """
    if not uid.startswith(DICOM_ROOT):
        return True
    if uid not in UID_dictionary:
        return uid.startswith(COMPOSITE_STORAGE_ROOT)
    name, kind = UID_dictionary[uid][:2]
    if kind != "SOP Class" or uid == NOT_OVER_A_NETWORK:
        return False
    if not name:  # retired so long ago that PS3.6 has dropped its name
        return uid.startswith(COMPOSITE_STORAGE_ROOT)
    return "Storage" in name and "Storage Commitment" not in name


def narrow(proposed: Iterable[PresentationContext]) -> list[PresentationContext]:
    """The proposed contexts, each left with the one transfer syntax that we choose for it.

    A context without abstract or transfer syntax is left out: PS3.8 9.3.2.2 allows none, and no answer refuses it.
    """
    narrowed = []
    for cx in proposed:
        if not cx.abstract_syntax or not cx.transfer_syntax:
            continue
        usable = cx.transfer_syntax
        if not is_storage(cx.abstract_syntax):
            usable = [syntax for syntax in usable if syntax in ENCODABLE] or usable
        cx.transfer_syntax = [usable[0]]
        narrowed.append(cx)
    return narrowed


def supported(narrowed: Iterable[PresentationContext]) -> list[PresentationContext]:
    """What we say we support to an association whose `narrow`ed contexts are these; one context per abstract syntax."""
    classes = (VERIFICATION, STORAGE_COMMITMENT, *FIND_MODELS, *MOVE_MODELS, *GET_MODELS)
    services = [build_context(uid, list(ENCODABLE)) for uid in classes]
    storage: dict[str, list[str | UID]] = {}
    for cx in narrowed:
        if is_storage(str(cx.abstract_syntax)):
            storage.setdefault(str(cx.abstract_syntax), []).append(cx.transfer_syntax[0])
    return services + [_either_role(build_context(uid, syntaxes)) for uid, syntaxes in storage.items()]


def _either_role(cx: PresentationContext) -> PresentationContext:
    """We receive instances, and send them to who asks by C-GET (PS3.4 C.5.3.1)."""
    cx.scu_role = cx.scp_role = True
    return cx


def is_extended(sop_class: str) -> bool:
    """Whether we answer SOP Class Extended Negotiation of this class."""
    return sop_class in FIND_MODELS or sop_class in MOVE_MODELS or sop_class in GET_MODELS


def extensions(sop_class: str, asked: bytes | None) -> bytes:
    """Our answer to SOP Class Extended Negotiation: relational retrieval is granted too (PS3.4 C.5.2.1, C.5.3.2)."""
    asked = asked or b""
    if sop_class in FIND_MODELS:
        return find_extensions(asked)
    return bytes(1 if value == 1 else 0 for value in asked[:1]) + bytes(max(0, len(asked) - 1))


def find_extensions(asked: bytes) -> bytes:
    """Our answer to SOP Class Extended Negotiation of a FIND class (PS3.4 C.5.1.1.2): what is asked for is granted, but
    for the conversion of enhanced multi-frame images, and what is not known, which is answered 0."""
    return bytes(int(value == 1 and number in _FEATURES) for number, value in enumerate(asked, 1))


def find_features(granted: bytes) -> Features:
    """What was agreed on for a FIND class."""
    return Features(**{name: extension(granted, number) for number, name in _FEATURES.items()})


def application_information(features: Features) -> bytes:
    """What asks for some features of a FIND class (PS3.4 Table C.5-1); no byte where there are none."""
    asked = [number for number, name in _FEATURES.items() if getattr(features, name)]
    return bytes(int(number in asked) for number in range(1, max(asked, default=0) + 1))


def not_granted(features: Features, granted: bytes) -> list[str]:
    """The features that were asked for and not granted, in words."""
    return [
        name.replace("_", " ")
        for number, name in _FEATURES.items()
        if getattr(features, name) and not extension(granted, number)
    ]


def extension(granted: bytes, number: int) -> bool:
    """Whether byte `number` (from 1) of granted application information says yes."""
    return len(granted) >= number and granted[number - 1] == 1

"""The tables of docs/conformance.md, read from the code: `python -m tests.support.conformance` writes them anew."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from pydicom._uid_dict import UID_dictionary

from sphere.catalog import known, match, match_parse, schema
from sphere.conf.loading import from_dict
from sphere.conf.peers import NOT_AUTHORIZED
from sphere.scp import contexts, find, handlers, store
from sphere.scp.commitment import handlers as commitment
from sphere.scp.commitment import report, transactions, verify
from sphere.scp.retrieve import service, transcode
from sphere.scp.upper import association
from sphere.scp.web import app

PAGE = Path(__file__).parent.parent.parent / "docs" / "conformance.md"

IDENTIFIER_WRONG = 0xA900  # of sphere.conf.errors.QueryError
REFUSED = ((NOT_AUTHORIZED, "Refused: the caller may not (`peers.may`, `strangers.may`)"),)
NOT_OURS = ((handlers.CLASS_NOT_SUPPORTED, "The command does not fit the SOP Class of the presentation context"),)
RETRIEVED = (
    (service.PENDING, "Sub-operations go on; the numbers are in it"),
    (service.SUCCESS, "All of them are done, without failure or warning; also where nothing matched"),
    (service.CANCELLED, "C-CANCEL; the numbers say what was done"),
    (service.SOME_FAILED, "Some failed or had a warning; Failed SOP Instance UID List, Error Comment of the first"),
    (service.NONE_PERFORMED, "None of them could be done"),
)
UNREADABLE = (
    (IDENTIFIER_WRONG, "The identifier breaks a rule; Offending Element, Error Comment"),
    (service.UNABLE, "The archive cannot answer; Error Comment"),
)
STATUSES: Mapping[str, Iterable[tuple[int, str]]] = {
    "C-ECHO": ((store.SUCCESS, "Success"), *NOT_OURS),
    "C-STORE": (
        (store.SUCCESS, "The instance is durable (see `ingest.durability`), or was already"),
        (
            store.MISMATCH,
            "Warning: durable, but the data set says another SOP Instance or SOP Class, or no UIDs, or the SOP Class "
            "is not that of the presentation context",
        ),
        (store.OUT_OF_RESOURCES, "Not stored, there is no room or the storage is away: send it again"),
        (store.PROCESSING_FAILURE, "Not stored: a defect, or a storage that fails"),
        (
            known.DUPLICATE_INSTANCE,
            'Not taken: another version is shown, and `ingest.on_conflict` is "reject"; '
            "the bytes are kept for `conflicts`",
        ),
        (
            NOT_AUTHORIZED,
            "Not stored: the caller may not, it was deleted here, the AE title is one of `[[snapshots]]`, or a rule "
            "refuses it (`rules.status` may say another failure)",
        ),
        (handlers.CANNOT_UNDERSTAND, "Not stored: no data set or no SOP Instance UID in the request"),
        *NOT_OURS,
    ),
    "C-FIND": (
        (find.PENDING, "A match"),
        (store.SUCCESS, "No further match"),
        (find.CANCELLED, "C-CANCEL"),
        (handlers.OUT_OF_RESOURCES, "More queries at once than `peers.max_queries`, or the storage is away"),
        (IDENTIFIER_WRONG, "The identifier breaks a rule; Offending Element, Error Comment"),
        (find.UNABLE, "No identifier, one of more than 4 MiB, or a defect"),
        (store.PROCESSING_FAILURE, "The catalog cannot answer, or has no such earlier state"),
        *REFUSED,
        *NOT_OURS,
    ),
    "C-MOVE": (
        *RETRIEVED,
        (service.UNKNOWN_DESTINATION, "The destination is no AE title of `[[peers]]`"),
        *UNREADABLE,
        *REFUSED,
        *NOT_OURS,
    ),
    "C-GET": (*RETRIEVED, *UNREADABLE, *REFUSED, *NOT_OURS),
    "N-ACTION": (
        (report.SUCCESS, "The request is kept; its report follows"),
        (commitment.NO_SUCH_INSTANCE, "Another Requested SOP Instance UID than the well-known one"),
        (commitment.INVALID_ARGUMENT, "The Transaction UID or the references cannot be read, or take more than 4 MiB"),
        (commitment.NO_SUCH_ACTION, "Another Action Type ID than 1"),
        (transactions.TooManyWaiting.dimse, f"{transactions.MAX_WAITING:,} reports wait"),
        (store.OUT_OF_RESOURCES, "The request cannot be kept"),
        (NOT_AUTHORIZED, "Refused: the caller may not store"),
        *NOT_OURS,
    ),
    "Failure Reason of N-EVENT-REPORT": (
        (verify.PROCESSING_FAILURE, "Its bytes are not those that arrived"),
        (verify.NO_SUCH_INSTANCE, "There is no such instance, or it is quarantined"),
        (verify.CLASS_CONFLICT, "It is of another SOP Class"),
        (report.DUPLICATE_TRANSACTION, "The Transaction UID is in use"),
    ),
    "any other command": ((association.UNRECOGNIZED_OPERATION, "Unrecognized operation"),),
}
"""Statuses of responses as SCP, by service."""


def sop_classes() -> str:
    """What is offered beside storage."""
    ours: dict[str, str] = {contexts.VERIFICATION: "SCU, SCP"}
    ours |= dict.fromkeys((*contexts.FIND_MODELS, *contexts.MOVE_MODELS, *contexts.GET_MODELS), "SCU, SCP")
    asked = {"PATIENT_ROOT", "STUDY_ROOT"}  # by sphere move and get
    for models in (contexts.MOVE_MODELS, contexts.GET_MODELS):
        ours |= {uid: "SCP" for uid, model in models.items() if model not in asked}
    ours[contexts.STORAGE_COMMITMENT] = "SCP"
    return _table(("SOP Class", "UID", "role"), [(_name(uid), f"`{uid}`", role) for uid, role in ours.items()])


def storage_classes() -> str:
    """Storage SOP classes that have a UID of PS3.6."""
    known = [uid for uid in UID_dictionary if contexts.is_storage(uid)]
    return _table(("SOP Class", "UID"), [(_name(uid), f"`{uid}`") for uid in known])


def transfer_syntaxes() -> str:
    """Those of PS3.6, and what is done with each."""
    rows = []
    for uid, entry in UID_dictionary.items():
        if entry[1] == "Transfer Syntax" and entry[0] and "Papyrus" not in entry[0]:
            made = uid in transcode.TARGETS or uid in transcode.ENCODERS
            rows.append((
                _name(uid), f"`{uid}`", "yes" if uid in map(str, contexts.ENCODABLE) else "",
                "yes" if uid in transcode.CONVERTIBLE else "", "yes" if made else "",
            ))  # fmt: skip
    return _table(("Transfer Syntax", "UID", "queries", "decoded", "made"), rows)


def statuses() -> str:
    """By service, what responses say."""
    rows = [(name, f"{code:04X}", what) for name, codes in STATUSES.items() for code, what in codes]
    return _table(("service", "status", "when"), rows)


def keys() -> str:
    """Keys of C-FIND and QIDO-RS by the level at which they may have a value."""
    rows = []
    for level in schema.LEVELS[:-1]:
        computed = [name for name, of in schema.COMPUTED.items() if of == level]
        rows.append((level, f"`{schema.UNIQUE_KEY[level]}`", _words(computed), _words(schema.ATTRIBUTES[level][1:])))
    of_images = [name for name in schema.BY_KEYWORD if schema.level_of(name) == "IMAGE"]
    rest = f'the other {len(of_images)} attributes that have a column (`sphere sql "DESCRIBE instances"`)'
    rows.append(("IMAGE", f"`{schema.UNIQUE_KEY['IMAGE']}`", "", rest))
    return _table(("level", "unique key", "computed", "further keys"), rows)


def matching() -> str:
    """Kinds of matching (PS3.4 C.2.2.2) by VR."""
    numbers = match_parse.INTEGER_VRS | match_parse.DECIMAL_VRS
    rows = [
        ("universal", "all"),
        ("single value", "all but " + _words(sorted(match_parse.NOT_MATCHED_VRS)) + "; PN without regard to case"),
        ("list of UID", "`UI`"),
        ("wild card", _words(sorted(match.WILD_CARD_VRS)) + ", `UN`"),
        ("range", "`DA`, `TM`, `DT`"),
        ("number", _words(sorted(numbers)) + ": equal as numbers"),
        ("sequence", "`SQ`, with one item"),
        ("empty value", "all, where it is negotiated"),
        ("multiple values", _words(sorted(match_parse.MULTIPLE_VALUE_VRS)) + ", where it is negotiated"),
        ("list of values", _words(sorted(match_parse.LISTS)) + ": any of them"),
    ]
    return _table(("matching", "value representations or keys"), rows)


def features() -> str:
    """Bytes of Service-class-application-information of a FIND class, and what we say to each."""
    names = {1: "relational queries", 2: "combined date-time matching", 3: "fuzzy semantic matching of person names",
             4: "timezone query adjustment", 5: "enhanced multi-frame image conversion", 6: "empty value matching",
             7: "multiple value matching"}  # fmt: skip
    granted = contexts.find_extensions(bytes([1] * len(names)))
    return _table(
        ("byte", "PS3.4 Table C.5-1", "granted"),
        [(str(number), name, "yes" if granted[number - 1] else "no") for number, name in names.items()],
    )


def resources() -> str:
    """What HTTP offers of DICOM, as /openapi.json has it."""
    paths = openapi()["paths"]
    rows = []
    for path, methods in paths.items():
        if not path.startswith(("/dicom-web", "/wado")):
            continue
        for method, one in methods.items():
            answers = {code: said for code, said in one["responses"].items() if code[0] in "23"}
            others = [code for code in one["responses"] if code in ("409",)]
            kinds = [kind for said in answers.values() for kind in said.get("content", {})]
            asked = [parameter["name"] for parameter in one["parameters"] if parameter["in"] == "query"]
            shown = [name if name != "PatientID" else "any attribute" for name in asked]
            rows.append((
                f"`{method.upper()} {path}`", ", ".join(shown), ", ".join((*answers, *others)),
                ", ".join(f"`{kind}`" for kind in dict.fromkeys(kinds)),
            ))  # fmt: skip
    return _table(("resource", "parameters", "statuses", "media types"), rows)


def openapi() -> Any:
    """The document of the default settings; nothing is asked of the services."""
    served = app.make_app(from_dict({}, base=Path("/nowhere")), MagicMock())
    [route] = [one for one in served.routes if getattr(one, "path", "") == "/openapi.json"]
    return json.loads(bytes(route.endpoint(None).body))  # type: ignore[attr-defined]


TABLES = (sop_classes, transfer_syntaxes, statuses, features, keys, matching, resources, storage_classes)


def rendered(page: str) -> str:
    """The page with its tables as the code has them now."""
    for table in TABLES:
        name = table.__name__
        block = re.compile(rf"(<!-- {name}: .*? -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)
        place = block.search(page)
        assert place, f"docs/conformance.md has no place for {name}"
        page = page[: place.end(1)] + table() + page[place.end() :]
    return page


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n" + "".join("| " + " | ".join(one) + " |\n" for one in lines) + "\n"


def _words(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _name(uid: str) -> str:
    name, _, _, retired, keyword = UID_dictionary[uid]
    shown = name.split(":")[0].strip() or keyword or "(named no more)"
    return f"{shown} (retired)" if retired and "etired" not in shown else shown


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

"""Settings: the sections of sphere.toml, each key with its unit and meaning; one frozen value, which is passed in.

They are read in sphere.conf.loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, Field, field_validator

from sphere.conf.peers import Forward, Peer, Rule, Strangers
from sphere.conf.section import YEAR_S, AETitle, Networks, Port, Seconds, Section


class Archive(Section):
    ae_title: AETitle = Field("SPHERE", description="Application entity title of this archive (PS3.8 9.3.2).")
    state_dir: Path = Field(
        Path("state"),
        description="Local folder for what can be rebuilt: locks, the query index, journals of this host, large "
        "instances while they arrive. Relative to the settings file.",
    )


class Dimse(Section):
    host: str = Field("127.0.0.1", description="Address that the DIMSE port listens on; 0.0.0.0 for every interface.")
    port: Port = Field(11112, description="TCP port; 0 takes a free one.")
    workers: int = Field(2, ge=1, le=64, description="Receiver processes that share the port.")
    max_associations: int = Field(64, ge=1, description="Associations at once, per receiver process.")
    max_pdu: int = Field(
        131072, ge=4096, le=1 << 24, description="Bytes of a P-DATA-TF PDU that we announce (PS3.8 D.1)."
    )
    artim_s: Seconds = Field(
        30.0, description="Seconds from TCP accept to A-ASSOCIATE-RQ (PS3.8 9.1.2), a TLS handshake among them."
    )
    dimse_timeout_s: Seconds = Field(60.0, description="Seconds to wait for the next DIMSE message of an exchange.")
    network_timeout_s: Seconds = Field(300.0, description="Seconds that an idle association is kept.")
    commitment_h: Annotated[float, Field(ge=0, le=YEAR_S / 3600)] = Field(
        72.0, description="Hours for which the report of a Storage Commitment is tried to be delivered."
    )
    tls_port: Port = Field(
        0,
        description="TCP port for TLS 1.2 and 1.3 (PS3.15 B.12; 2762 is registered for it), beside `port`, or the same "
        "number as `port`: then there is no port without TLS. 0: no TLS.",
    )
    tls_certificate: str = Field(
        "",
        description="PEM file of our certificate, followed by those between it and its CA. Shown by the TLS port, and "
        "to peers that ask for one. Relative to the settings file, as the other files are.",
    )
    tls_key: str = Field(
        "", description="PEM file of its private key, without password; empty: it is in `tls_certificate`."
    )
    tls_ca: str = Field("", description="PEM file of the CAs of peers' certificates.")
    tls_client: Literal["required", "optional", "none"] = Field(
        "required",
        description="Certificate of who calls the TLS port: must be shown and be of `tls_ca`; is checked if it is "
        "shown; is not asked for.",
    )


class Web(Section):
    enabled: bool = Field(True, description="Serve HTTP beside DIMSE.")
    host: str = Field("127.0.0.1", description="Address that HTTP listens on.")
    port: Port = Field(8080, description="TCP port; 0 takes a free one.")
    read_only: bool = Field(False, description="Refuse to store, and to delete, over HTTP.")
    delete: bool = Field(
        False, description="Offer DELETE of studies, series and instances to admins: they are shown no more."
    )
    auth: Literal["remote", "all"] = Field(
        "remote",
        description="Who must show a token: clients of other hosts, or all. Behind a reverse proxy on this host it has "
        "to be all: one that names itself in no header makes everybody a client of this host.",
    )
    public_url: str = Field(
        "",
        description="URL under which a reverse proxy offers this server, https://pacs.example, with the path before "
        "/dicom-web if there is one (the page and the viewer need it without): RetrieveURL, BulkDataURI and Link begin "
        "with it. Empty: as the client calls us.",
    )
    trusted_proxies: Networks = Field(
        (),
        description="IP addresses or networks of reverse proxies whose X-Forwarded-For and X-Forwarded-Proto, or "
        "Forwarded (RFC 7239), say for whom they ask: that address is in audit records, and `max_queries` counts by "
        "it. Requests from these addresses always need a token.",
    )
    tls_certificate: str = Field("", description="PEM file of the server's certificate and those up to its CA.")
    tls_key: str = Field("", description="PEM file of its private key; empty: it is in `tls_certificate`.")
    oidc_issuer: str = Field("", description="Issuer (iss) of bearer tokens of an OpenID Connect provider.")
    oidc_audience: str = Field("", description="Audience (aud) that they must be for.")
    oidc_jwks: str = Field("", description="File or https:// URL of the provider's key set; empty: none is trusted.")
    oidc_roles_claim: str = Field(
        "roles", description="Claim that lists roles (researcher, reader, writer, admin); full stops lead into objects."
    )
    oidc_collections_claim: str = Field(
        "collections", description="Claim that lists the collections that a researcher may see; empty: none does."
    )
    oidc_cohorts_claim: str = Field(
        "cohorts", description="Claim that lists the cohorts that a researcher may see; empty: none does."
    )
    viewer_dir: str = Field(
        "",
        description="Folder of the OHIF viewer that /viewer shows; empty: where `make viewer` puts it, beside the "
        "libraries.",
    )
    max_queries: int = Field(
        0,
        ge=0,
        le=1024,
        description="Searches (QIDO-RS) at once of one caller, known by its token, else by its address; further ones "
        "are answered 429; 0: any number.",
    )
    idle_s: Annotated[float, Field(ge=1, le=YEAR_S)] = Field(
        30.0, description="Seconds to wait for the head of a request, for more of its body, or for a client that reads."
    )

    @field_validator("public_url")
    @classmethod
    def _whole_url(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # no port, or no address
            whole = False
        if value and (not whole or "@" in parts.netloc or set('?# <>"\\^`{|}') & set(value) or not value.isprintable()):
            raise ValueError("must be such as https://pacs.example or https://example.org/pacs")
        return value.rstrip("/")


def _root(value: str) -> str:
    """A URL of a folder; raises ValueError for any other text."""
    parts = urlsplit(value)
    if parts.scheme not in ("file", "hdfs", "webhdfs"):
        raise ValueError("must begin with file:, hdfs:// or webhdfs://")
    if parts.scheme == "file" and parts.netloc:
        raise ValueError("names a host where a path is meant: file:///PATH, or file:PATH beside the settings file")
    if parts.scheme != "file" and not (parts.hostname and parts.port != 0):  # a port that is none raises ValueError
        raise ValueError(f"must be such as {parts.scheme}://NAMENODE:PORT/PATH")
    if "\0" in unquote(value):
        raise ValueError("has a NUL character")
    return value.rstrip("/") if value != "file:///" else value


class Storage(Section):
    root: str = Field(
        "file:storage",
        description="Where bundles and catalog live: file:///PATH (or file:PATH relative to the settings file), "
        "hdfs://NAMENODE:PORT/PATH, or webhdfs://NAMENODE:PORT/PATH.",
    )
    user: str = Field("", description="HDFS user name; empty takes the login name. Unused for file:.")
    seal_mib: int = Field(256, ge=1, description="MiB after which a bundle is sealed and a new one begun.")
    seal_age_s: Seconds = Field(300.0, description="Seconds after which an open bundle that holds members is sealed.")
    memory_mib: int = Field(8, ge=1, description="MiB up to which an arriving instance waits in memory, not on disk.")

    @field_validator("root")
    @classmethod
    def _root_url(cls, value: str) -> str:
        return _root(value)


class Annotations(Section):
    limit_mib: int = Field(1024, ge=1, description="MiB of one file that is linked to a study, series or instance.")


class Catalog(Section):
    mode: Literal["delta", "files"] = Field(
        "delta",
        description="Where answers come from: delta, the tables; files, the headers in the bundles, read anew for each "
        "query and never extracted (slow).",
    )
    scan_workers: int = Field(
        2, ge=0, le=64, description="Processes per serving process that read headers in mode files; 0: none beside it."
    )
    root: str = Field("", description="URL of the Delta tables (file:/// or hdfs://); empty: <storage.root>/catalog.")

    @field_validator("root")
    @classmethod
    def _root_url(cls, value: str) -> str:
        return _root(value) if value else ""


OnConflict = Literal["keep-first", "replace", "reject"]


class Ingest(Section):
    on_conflict: OnConflict = Field(
        "keep-first",
        description="Same SOPInstanceUID with other bytes: which version `instances` shows. reject: the first, and a "
        "C-STORE of another is answered 0x0111, duplicate SOP instance, where this host can know of the first: what it "
        "stored itself, and what other hosts and the catalog answer in time. All stay in the bundles, and `conflicts` "
        "says what happened.",
    )
    durability: Literal["storage", "spool"] = Field(
        "storage",
        description="What Success of a C-STORE promises: the instance is on `storage.root`, or it is synced in a spool "
        "on this host, from where `sphere serve` ships it to `storage.root`, also after that was away for hours.",
    )
    spool_dir: Path = Field(
        Path("spool"),
        description="Local folder of the spool, on a disk that is kept: what it holds is nowhere else yet. Relative to "
        "the settings file.",
    )
    spool_limit_mib: int = Field(
        20480, ge=1, description="MiB in the spool from which on instances are refused (0xA700) until some are shipped."
    )
    spool_seal_s: Seconds = Field(
        30.0,
        description="Seconds after which an open bundle of the spool is sealed, and shipped, as soon as nothing comes "
        "for one; at the latest after `storage.seal_age_s`.",
    )
    verify_sealed: bool = Field(
        True,
        description="Have `sphere serve` read each sealed bundle back once, in a process of low priority: every digest "
        "against its journal. What is not as promised is named by `sphere status`, counted, and kept. With durability "
        "spool, bundles are read back as they are shipped.",
    )
    verify_mib_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        32.0, description="MiB that are read back in a second, at most."
    )


class Spark(Section):
    master: str = Field("local[*]", description="Spark master: local[N], spark://HOST:PORT, yarn, k8s://URL.")
    driver_memory: str = Field("2g", description="Heap of the driver (of the whole job with a local master).")
    shuffle_partitions: int = Field(8, ge=1, description="spark.sql.shuffle.partitions.")
    conf: Mapping[str, str] = Field(default_factory=dict, description="Any further Spark settings, as a table.")


class Extract(Section):
    every_s: Seconds = Field(60.0, description="Seconds between extractions while serving; 0: only when asked.")
    batch: int = Field(200_000, ge=1, description="Members catalogued in one transaction.")
    max_header_mib: int = Field(
        64,
        ge=1,
        description="MiB of header, inflated where deflated, above which an instance is quarantined.",
    )
    lock_wait_s: Seconds = Field(60.0, description="Seconds to wait for another extraction before giving up.")


class Compact(Section):
    after_days: Annotated[float, Field(ge=0, le=36500)] = Field(
        7.0,
        description="Days for which what was deleted can be shown again (`sphere undelete`), before `sphere compact` "
        "erases its bytes.",
    )


class Snapshot(Section):
    ae_title: AETitle = Field(
        description="AE title that answers from an earlier state of the catalog; it takes no instances."
    )
    as_of: int | datetime = Field(
        description="A version of table `bundles`, which counts batches of extraction, or a time (UTC where it has no "
        "zone): the last batch complete by then."
    )

    @field_validator("as_of", mode="before")
    @classmethod
    def _version_or_time(cls, value: object) -> object:
        if isinstance(value, bool | float) or (isinstance(value, int) and value < 0):
            raise ValueError("is neither a version (0, 1, ...) nor a time")
        return value


class Forwarding(Section):
    every_s: Annotated[float, Field(gt=0, le=YEAR_S)] = Field(
        5.0, description="Seconds between looks for what is to be sent."
    )
    retry_s: Annotated[float, Field(gt=0, le=YEAR_S)] = Field(
        10.0, description="Seconds until what did not arrive is sent again; doubled each time that nothing did."
    )
    retry_max_s: Annotated[float, Field(gt=0, le=YEAR_S)] = Field(
        3600.0, description="Seconds between attempts at most."
    )


LISTS: Mapping[str, type[Section]] = {"peers": Peer, "rules": Rule, "forwards": Forward, "snapshots": Snapshot}
"""Sections that are lists of tables."""


class Settings(Section):
    """Everything that can be set, by section of sphere.toml."""

    archive: Archive = Archive()
    dimse: Dimse = Dimse()
    web: Web = Web()
    storage: Storage = Storage()
    catalog: Catalog = Catalog()
    ingest: Ingest = Ingest()
    spark: Spark = Spark()
    extract: Extract = Extract()
    compact: Compact = Compact()
    annotations: Annotations = Annotations()
    strangers: Strangers = Strangers()
    peers: tuple[Peer, ...] = ()
    rules: tuple[Rule, ...] = ()
    forwarding: Forwarding = Forwarding()
    forwards: tuple[Forward, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()

    @property
    def catalog_root(self) -> str:
        """URL of the folder of Delta tables."""
        return self.catalog.root or f"{self.storage.root}/catalog"


def documented_keys() -> list[tuple[str, Any]]:
    """(dotted key, pydantic FieldInfo) of every setting, in the order of the file."""
    keys: list[tuple[str, Any]] = []
    for section, info in Settings.model_fields.items():
        model = LISTS.get(section) or info.annotation
        assert isinstance(model, type) and issubclass(model, BaseModel)
        fields = list(model.model_fields.items())
        if section in LISTS:  # what must be given, first
            fields.sort(key=lambda item: not item[1].is_required())
        keys += [(f"{section}.{name}", field) for name, field in fields]
    return keys

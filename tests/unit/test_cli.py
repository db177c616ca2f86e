"""The command line where no Spark is needed: help, errors, init, import, status."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import tarfile
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import orjson
import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from pydicom.data import get_testdata_file

import sphere
from sphere.cli import Late, main
from sphere.conf.errors import SettingsError, StatementError
from sphere.conf.loading import from_dict, load
from sphere.output import as_csv, as_json, as_table, write_rows
from sphere.serve import banner, with_ports
from tests.support.landing import changed, slices

pytestmark = pytest.mark.unit

VERBS = sorted(main.commands)
HEAVY = {"deltalake", "duckdb", "gdcm", "numpy", "pandas", "PIL", "pyarrow", "pydicom", "pynetdicom", "pyspark", "rich"}


def call(*arguments: str | Path, config: Path | None = None) -> Result:
    before = ["--config", str(config)] if config else []
    return CliRunner().invoke(main, [*before, *map(str, arguments)])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    result = call(verb, "--help")
    assert result.exit_code == 0
    assert f"sphere {'--config archive/sphere.toml ' if verb == 'serve' else ''}{verb}" in result.output or (
        verb == "completion" and "sphere completion bash" in result.output
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command"),
        (["import"], "Missing argument"),
        (["sql", "SELECT 1", "--format", "parquet"], "needs -o FILE"),
        (["sql", "SELECT 1", "--format", "xml"], "'xml' is not one of"),
        (["find", "X@127.0.0.1:1", "--level", "FRAME"], "'FRAME' is not one of"),
        (["find", "-k", "PatientNam=x"], "did you mean PatientName?"),
        (["find", "X@127.0.0.1:1", "-k", "PatientNam=x"], "did you mean PatientName?"),
        (["find", "-k", "StudyDate=foo"], "StudyDate: "),
        (["find", "--model", "patient-study", "-k", "Modality=CT"], "Modality is a key of SERIES, below STUDY"),
        (["find", "--timezone", "foo"], "Invalid value for '--timezone': 'foo' is not an offset from UTC"),
        (
            ["find", "X@127.0.0.1:1", "--timezone", "foo"],
            "Invalid value for '--timezone': 'foo' is not an offset from UTC",
        ),
        (["find", "--as-of", "foo"], "Invalid value for '--as-of': as of 'foo': neither a version"),
        (["find", "--offset", str(2**63 - 1), "--limit", str(2**63 - 1)], "offset and limit count answers"),
        (["find", "--offset", "9" * 24, "-k", "PatientName"], "offset and limit count answers"),
        (["find", "X@127.0.0.1:1", "--limit", "922337203685477580700"], "offset and limit count answers"),
        (["find", "nobody"], "neither a name in the settings"),
        (["store", "X@127.0.0.1:1", "--where", "PatientNam=x"], "PatientNam"),
        (["delete", "--yes", "--where", "PatientNam=x"], "PatientNam"),
        (["delete", "--yes", "--where", "PatientID"], "PatientID: this value chooses everything"),
        (["delete", "--yes", "--where", "PatientID=1", "--where", "StudyDate="], "StudyDate: this value chooses"),
        (["delete", "--yes", "--where", "PatientID=1", "--where", "PatientID=2"], "PatientID is given twice"),
        (["delete", "--yes", "--where", "RequestAttributesSequence=1"], "is a sequence: it has no value"),
        (["store", "X@127.0.0.1:1", "--where", "PatientID"], "PatientID: this value chooses everything"),
        (["store", "X@127.0.0.1:1", "--where", "RequestAttributesSequence=1"], "is a sequence: it has no value"),
        (["store", "X@127.0.0.1:1", "--where", "PatientID=1", "--all"], "or --all"),
        (["get", "X@127.0.0.1:1", "-k", "RequestAttributesSequence=1"], "is a sequence: it has no value"),
        (["get", "X@127.0.0.1:1", "-k", "StudyInstanceUID"], "choose everything that the peer has"),
        (["move", "X@127.0.0.1:1", "--to", "Y", "-k", "PatientName=*"], "choose everything that the peer has"),
        (["find", "-k", "RequestAttributesSequence=1"], "is a sequence: it has no value"),
        (["find", "X@127.0.0.1:1", "-k", "RequestAttributesSequence=1"], "is a sequence: it has no value"),
        (["find", "-k", "PatientID.CodeValue=1"], "PatientID is not a sequence"),
        (["find", "-k", "PatientID=1", "-k", "00100020"], "00100020 is given twice"),
        (["find", "X@127.0.0.1:1", "-k", "PatientID=1", "-k", "00100020"], "00100020 is given twice"),
        (["delete", "--yes", "--study", "a"], "is not a UID"),
        (["move", "X@127.0.0.1:1", "--to", "Y", "-k", "PatientNam=x"], "PatientNam"),
        (["get", "X@127.0.0.1:1", "-k", "PatientNam=x"], "PatientNam"),
        (["move", "X@127.0.0.1:1", "--to", "MORE THAN SIXTEEN", "-k", "StudyInstanceUID=1.2"], "--to"),
        (["annotate", "list", "--uid", "a"], "is not a UID"),
        (["token", "create", "--role", "reader", "--name", "x", "--expires", "soon"], "--expires"),
        (["cohort", "create", "a b", "/dev/null"], "a b"),
        (["init", "x", "--root", "ftp://there"], "storage.root"),
        (["init", "x", "--port", "70000"], "dimse.port"),
        (["peers", "--timeout", "0"], "--timeout"),
        (["compact", "--after", "soon"], "is not a time"),
    ],
)
def test_wrong_usage_is_status_2(config: Path, arguments: list[str], message: str) -> None:
    result = call(*arguments, config=config)
    assert (result.exit_code, result.exception.__class__) == (2, SystemExit), result.output
    assert message in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve"],
        ["import", "x.dcm"],
        ["extract"],
        ["status"],
        ["sql", "SELECT 1"],
        ["find", "-k", "PatientID=1"],
        ["ship"],
        ["verify"],
        ["store", "X@127.0.0.1:1", "--where", "PatientID=1"],
        ["get", "X@127.0.0.1:1", "-k", "StudyInstanceUID=1.2"],
        ["move", "X@127.0.0.1:1", "--to", "Y", "--existing", "-k", "StudyInstanceUID=1.2"],
        ["delete", "--study", "1.2"],
        ["undelete", "--study", "1.2"],
        ["compact"],
        ["cohort", "list"],
        ["token", "list"],
        ["annotate", "list"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_archive_is_made_where_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SPHERE_")]:
        monkeypatch.delenv(name)
    result = call(*arguments)
    assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
    assert f"no sphere.toml in {tmp_path}" in result.output
    assert all(word in result.output for word in ("--config", "SPHERE_CONFIG", "SPHERE_STORAGE__ROOT", "sphere init"))
    assert list(tmp_path.iterdir()) == []


def test_an_archive_is_named_by_a_file_here_or_by_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPHERE_CONFIG", raising=False)
    assert call("echo", "X@127.0.0.1:1").exit_code == 1, "who only asks a peer needs none"
    monkeypatch.setenv("SPHERE_STORAGE__ROOT", "file:elsewhere")
    assert orjson.loads(call("status", "--json").stdout)["storage_root"] == (tmp_path / "elsewhere").as_uri()
    monkeypatch.delenv("SPHERE_STORAGE__ROOT")
    with pytest.raises(SettingsError, match="which archive"):
        sphere.open()
    (tmp_path / "sphere.toml").write_text('[storage]\nroot = "file:here"\n')
    assert orjson.loads(call("status", "--json").stdout)["storage_root"] == (tmp_path / "here").as_uri()
    assert sphere.open().settings.storage.root == (tmp_path / "here").as_uri()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["echo", "nobody"], 2, "sphere: peer 'nobody' is neither a name in the settings (none) nor AET@HOST:PORT"),
        (["echo", ""], 2, "sphere: peer '' is neither a name in the settings (none) nor AET@HOST:PORT"),
        (["store", "", "--all"], 2, "sphere: peer '' is neither a name"),
        (["find", ""], 2, "sphere: peer '' is neither a name"),  # an empty variable of a script is not this archive
        (["echo", "X@127.0.0.1:1"], 1, "sphere: peer X at 127.0.0.1:1"),
    ],
)
def test_errors_are_one_clear_line(config: Path, arguments: list[str], status: int, message: str) -> None:
    result = call(*arguments, config=config)
    assert result.exit_code == status
    assert result.output.startswith(message)
    assert len(result.output.splitlines()) == 1


def test_a_missing_settings_file_is_status_2(tmp_path: Path) -> None:
    result = call("status", config=tmp_path / "none.toml")
    assert result.exit_code == 2
    assert "sphere init DIR" in result.output


def test_help_loads_no_library_of_the_work_and_neither_does_a_child_of_serve() -> None:
    code = (
        "import sys, sphere.serve, sphere.cli as cli; cli.main(['--help'], standalone_mode=False); print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(run.stdout.splitlines()[-1].split())


def test_the_list_of_verbs_says_what_each_verb_says() -> None:
    late = [command for command in main.commands.values() if isinstance(command, Late)]
    assert len(late) > 5
    assert [one.short_help for one in late] == [one.load().get_short_help_str(200) for one in late]


def test_the_banner_names_the_page_where_there_is_one() -> None:
    values = {"archive": {"state_dir": "state"}, "web": {"port": 8080}}
    settings = from_dict(values, base=Path())
    assert "its page on http://127.0.0.1:8080/, DICOMweb on http://127.0.0.1:8080/dicom-web;" in banner(settings)
    without = from_dict({**values, "web": {"enabled": False}}, base=Path())
    assert "http" not in banner(without)


def test_init_writes_settings_that_load(config: Path) -> None:
    settings = load(config, environ={})
    assert settings.storage.root == (config.parent / "storage").as_uri()
    assert settings.archive.state_dir.is_dir()


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("find", "-k", "QueryRetrieveLevel=STUDY"), 1, "index: Not a directory"),
        (("serve",), 2, "archive.state_dir: {state} cannot be written to: {error}; choose another folder"),
    ],
)
def test_a_state_folder_that_cannot_be_written_to_is_one_line(
    config: Path, arguments: tuple[str, ...], status: int, says: str
) -> None:
    """A file in its place, as who is root may write everywhere."""
    state = config.parent / "state"
    state.rmdir()
    state.write_bytes(b"")
    found = call(*arguments, config=config)
    assert (found.exit_code, found.output.count("\n")) == (status, 1), found.output
    assert says.format(state=state, error="File exists") in found.output


def test_tables_over_webhdfs_are_refused_and_init_puts_them_elsewhere(tmp_path: Path) -> None:
    config = tmp_path / "sphere.toml"
    config.write_text('[storage]\nroot = "webhdfs://127.0.0.1:9870/x"\n')
    refused = call("serve", config=config)
    assert refused.exit_code == 2
    assert (
        "catalog.root: Delta tables cannot be read over webhdfs://; set catalog.root to file:/// or" in refused.output
    )
    for more, root in (
        ((), (tmp_path / "0" / "catalog").as_uri()),
        (("--catalog-root", "hdfs://nn:1/c"), "hdfs://nn:1/c"),
    ):
        folder = tmp_path / str(len(more))
        made = call("init", folder, "--root", "webhdfs://127.0.0.1:9870/x", *more)
        assert made.exit_code == 0, made.output
        assert load(folder / "sphere.toml").catalog_root == root


def test_init_does_not_overwrite(config: Path) -> None:
    before = config.read_bytes()
    result = call("init", config.parent)
    assert result.exit_code == 2
    assert "exists already" in result.output
    assert config.read_bytes() == before


def test_import_names_what_failed_and_goes_on(config: Path, tmp_path: Path) -> None:
    real = Path(str(get_testdata_file("CT_small.dcm")))
    (tmp_path / "note.txt").write_text("not DICOM at all")
    result = call("import", real, tmp_path / "missing.dcm", tmp_path / "note.txt", config=config)
    assert result.exit_code == 1
    assert "missing.dcm: No such file or directory" in result.output
    assert "2 stored, 0 skipped, 1 failed" in result.output
    [bundle] = (config.parent / "storage" / "bundles").rglob("*.tar")
    with tarfile.open(bundle) as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert real.read_bytes() in contents.values()
    assert b"not DICOM at all" in contents.values()


def test_what_is_no_dicom_is_stored_once_as_well(config: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("not DICOM at all")
    (tmp_path / "empty").touch()
    for answer in ("2 stored, 0 skipped, 0 failed", "0 stored, 2 skipped, 0 failed"):
        assert answer in call("import", tmp_path / "note.txt", tmp_path / "empty", config=config).output


def test_files_of_any_name_that_cannot_be_sent_are_named(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"not\xffutf-8\x1b[31m.txt")).write_text("not DICOM at all")
    result = call("store", "X@127.0.0.1:1", tmp_path)
    assert (result.exit_code, result.exception.__class__) == (1, SystemExit), result.output
    assert r"not\udcffutf-8\x1b[31m.txt" in result.output


def test_help_that_cannot_be_written_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "sphere.cli", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (run.returncode, run.stderr) == (1, "sphere: No space left on device\n")


def test_import_can_leave_out_what_is_not_dicom(config: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("not DICOM at all")
    result = call("import", "--only-dicom", tmp_path / "note.txt", config=config)
    assert result.exit_code == 0
    assert "0 stored, 1 skipped, 0 failed" in result.output


@pytest.mark.parametrize(
    ("policy", "answer"), [("keep-first", "1 stored, 1 skipped, 0"), ("reject", "0 stored, 1 skipped, 1")]
)
def test_an_import_stores_the_same_bytes_once(config: Path, tmp_path: Path, policy: str, answer: str) -> None:
    """In one call and in the next; other bytes as ingest.on_conflict says."""
    text = config.read_text()
    assert 'on_conflict = "keep-first"' in text
    config.write_text(re.sub('#? ?on_conflict = "keep-first"', f'on_conflict = "{policy}"', text))
    one, other = tmp_path / "1.dcm", tmp_path / "2.dcm"
    one.write_bytes(slices(1)[0])
    other.write_bytes(changed(slices(1)[0], PatientComments="corrected"))
    assert "1 stored, 2 skipped, 0 failed" in call("import", one, one, one, config=config).output
    result = call("import", one, other, config=config)
    assert answer in result.output
    assert ("another version of this instance is stored" in result.output) == (policy == "reject")
    found = orjson.loads(call("status", "--json", config=config).stdout)
    assert found["landed"] == 2


def test_a_data_set_without_meta_becomes_a_complete_file(config: Path, tmp_path: Path) -> None:
    bare = Path(str(get_testdata_file("rtstruct.dcm"))).read_bytes()
    (tmp_path / "bare.dcm").write_bytes(bare)
    assert call("import", tmp_path / "bare.dcm", config=config).exit_code == 0
    [bundle] = (config.parent / "storage" / "bundles").rglob("*.tar")
    with tarfile.open(bundle) as tar:
        [member] = tar.getmembers()
        data = tar.extractfile(member).read()  # type: ignore[union-attr]
    assert data[128:132] == b"DICM"
    assert data.endswith(bare)


def test_status_counts_what_waits(config: Path) -> None:
    call("import", str(get_testdata_file("CT_small.dcm")), str(get_testdata_file("MR_small.dcm")), config=config)
    report = orjson.loads(call("status", "--json", config=config).stdout)
    assert (report["landed"], report["waiting"], report["bundles_open"]) == (2, 2, 0)
    assert "waiting     2 members (sphere extract)" in call("status", config=config).stdout


def test_verify_reads_bundles_whole_and_names_what_is_wrong(config: Path) -> None:
    assert call("import", get_testdata_file("CT_small.dcm"), config=config).exit_code == 0
    whole = call("verify", config=config)
    assert (whole.exit_code, whole.stdout) == (0, "1 bundles with 1 members read, 0 of them not as promised\n")
    [bundle] = config.parent.glob("storage/bundles/*/*/*/*.tar")
    data = bytearray(bundle.read_bytes())
    data[len(data) // 2] ^= 1
    bundle.write_bytes(data)
    damaged = call("verify", config=config)
    assert damaged.exit_code == 1
    assert "sha256 differs" in damaged.stderr
    assert call("verify", "bundles/none.tar", config=config).exit_code == 1


def test_a_taken_port_is_named(config: Path) -> None:
    import socket

    from sphere.conf.errors import SettingsError
    from sphere.conf.loading import from_dict

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = from_dict({"dimse": {"port": port}}, base=config.parent)
        with pytest.raises(SettingsError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
            with_ports(settings)
    assert with_ports(from_dict({"dimse": {"port": 0}, "web": {"port": 0}}, base=config.parent)).dimse.port > 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    assert "_SPHERE_COMPLETE" in call("completion", shell).output


def test_output_formats() -> None:
    table = pa.table({"PatientName": ['Åse, "A"', None], "n": [1, 2], "many": [["a", "b"], []]})
    assert as_csv(table).splitlines() == ["PatientName,n,many", '"Åse, ""A""",1,"[""a"",""b""]"', ",2,[]"]
    assert orjson.loads(as_json(table))[0] == {"PatientName": 'Åse, "A"', "n": 1, "many": ["a", "b"]}
    text = as_table(table)
    assert "PatientName" in text and text.endswith("(2 rows)\n")


def test_json_loses_nothing() -> None:
    utc = pa.timestamp("us", tz="UTC")
    table = pa.table(
        {
            "binary": pa.array([b"\0\xff", None]),
            "map": pa.array([[("a", 1.5), ("b", None)], []], pa.map_(pa.string(), pa.float64())),
            "numbered": pa.array([[(1, b"x")], None], pa.map_(pa.int32(), pa.binary())),
            "days": pa.array([[(date(2026, 1, 31), [1])], None], pa.map_(pa.date32(), pa.list_(pa.int8()))),
            "struct": pa.array(
                [{"a": {"b": [b"y", None]}}, None], pa.struct({"a": pa.struct({"b": pa.list_(pa.binary())})})
            ),
            "decimal": pa.array([Decimal("0.10"), Decimal("-12345678901234567890.12")], pa.decimal128(38, 2)),
            "double": pa.array([float("nan"), float("-inf")]),
            "float": pa.array([float("inf"), 0.5], pa.float32()),
            "long": pa.array([2**63 - 1, None], pa.int64()),
            "at": pa.array([datetime(2026, 1, 31, 12, 0, 0, 250000), None], utc),
            "local": pa.array([datetime(2026, 1, 31, 12), None], pa.timestamp("us")),
            "day": pa.array([date(2026, 1, 31), None]),
            "span": pa.array([timedelta(hours=1, microseconds=1), None]),
            "flag": pa.array([True, None]),
        }
    )
    first, second = json.loads(as_json(table), parse_constant=pytest.fail)
    assert first == {
        "binary": "AP8=", "map": {"a": 1.5, "b": None}, "numbered": {"1": "eA=="}, "days": {"2026-01-31": [1]},
        "struct": {"a": {"b": ["eQ==", None]}}, "decimal": "0.10", "double": "NaN", "float": "Infinity",
        "long": 9223372036854775807, "at": "2026-01-31T12:00:00.250000Z", "local": "2026-01-31T12:00:00",
        "day": "2026-01-31", "span": "1:00:00.000001", "flag": True,
    }  # fmt: skip
    assert (second["decimal"], second["double"], second["map"]) == ("-12345678901234567890.12", "-Infinity", {})
    values = dict(zip(*csv.reader(as_csv(table).splitlines()[:2]), strict=True))
    assert (values["binary"], values["map"], values["double"]) == ("AP8=", '{"a":1.5,"b":null}', "NaN")


def test_columns_of_one_name_are_shown_or_refused_never_lost(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], names=["a", "b", "a"])
    assert as_csv(twice) == "a,b,a\r\n1,2,3\r\n"
    assert as_table(twice).splitlines()[-2].split() == ["1", "2", "3"]
    for format_ in ("json", "parquet"):
        with pytest.raises(StatementError, match="several columns are called a: give each a name of its own"):
            write_rows(twice, format=format_, output=tmp_path / "rows")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hosts", [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0")])
def test_one_port_for_dimse_and_http_is_refused(tmp_path: Path, hosts: tuple[str, str]) -> None:
    """Also where one of them listens on every address: the other one would never start."""
    dimse, web = hosts
    both = {"dimse": {"port": 21112, "host": dimse}, "web": {"port": 21112, "host": web}}
    with pytest.raises(SettingsError, match=rf"web\.port: 21112 is a port of dimse on {re.escape(dimse)} too"):
        with_ports(from_dict(both, base=tmp_path))


def test_no_path_is_no_folder(config: Path) -> None:
    result = call("import", "", config=config)
    assert (result.exit_code, "PATH...': is empty" in result.stderr) == (2, True)


def test_a_terminal_is_shown_what_it_would_obey(config: Path, tmp_path: Path) -> None:
    (tmp_path / "\x1b[31mred\n.dcm").symlink_to("/nowhere")
    result = call("import", tmp_path / "\x1b[31mred\n.dcm", config=config)
    assert result.exit_code == 1
    assert r"\x1b[31mred\n.dcm: " in result.stderr and "\x1b" not in result.stderr
    text = as_table(pa.table({"PatientName": ["A\x1b]0;title\x07^B", "Müller^二"], "Comments": ["one\ntwo", "\u202e"]}))
    assert r"A\x1b]0;title\x07^B" in text and "Müller^二" in text and r"\u202e" in text

"""Settings: defaults, the file, variables over it, and errors that say what to change."""

from __future__ import annotations

from pathlib import Path

import pytest

from sphere.conf.errors import SettingsError
from sphere.conf.loading import from_dict, load, nearest_key
from sphere.conf.settings import LISTS, documented_keys
from sphere.template import default_of, markdown, render

pytestmark = pytest.mark.unit


def write(folder: Path, text: str) -> Path:
    file = folder / "sphere.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_defaults_listen_on_loopback_only(tmp_path: Path) -> None:
    settings = from_dict({}, base=tmp_path)
    assert settings.dimse.host == settings.web.host == "127.0.0.1"
    assert settings.peers == ()


def test_relative_paths_are_seen_from_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, '[storage]\nroot = "file:here it is"\n[archive]\nstate_dir = "s"\n')
    settings = load(file, environ={})
    assert settings.storage.root == (tmp_path / "here it is").as_uri()
    assert settings.archive.state_dir == tmp_path / "s"
    assert settings.catalog_root == settings.storage.root + "/catalog"


def test_a_file_url_is_read_as_a_url(tmp_path: Path) -> None:
    given = (tmp_path / "a b%c").as_uri()
    assert from_dict({"storage": {"root": given}}, base=tmp_path).storage.root == given


def test_variables_win_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "[dimse]\nport = 104\n")
    assert load(file, environ={"SPHERE_DIMSE__PORT": "4242"}).dimse.port == 4242


def test_the_file_is_found_by_variable(tmp_path: Path) -> None:
    file = write(tmp_path, "[dimse]\nport = 105\n")
    assert load(environ={"SPHERE_CONFIG": str(file)}).dimse.port == 105


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[dimse]\nprot = 1\n", r"sphere\.toml: unknown key 'dimse\.prot'; the nearest known key is 'dimse\.port'"),
        ("[dimsee]\nport = 1\n", r"unknown key 'dimsee'; the nearest known key is 'dimse"),
        ("[dimse]\nport = 70000\n", r"sphere\.toml: dimse\.port: .*65535.*got 70000"),
        ("[dimse]\nport = true\n", r"dimse\.port: is a number, not true or false"),
        ("[forwarding]\nretry_s = false\n", r"forwarding\.retry_s: is a number"),
        ("[extract]\nevery_s = 1e300\n", r"extract\.every_s: .*31622400"),
        ("[extract]\nevery_s = nan\n", r"extract\.every_s"),
        ('[archive]\nae_title = "WAY TOO LONG A TITLE"\n', r"archive\.ae_title: .*16"),
        ('[archive]\nae_title = "   "\n', r"archive\.ae_title"),
        ('[storage]\nroot = "s3://bucket"\n', r"storage\.root: must begin with file:, hdfs:// or webhdfs://"),
        ('[storage]\nroot = "file://host/path"\n', r"storage\.root: names a host where a path is meant"),
        ('[storage]\nroot = "webhdfs://nn:9870/x"\n', r"catalog\.root: .*webhdfs"),
        ('[storage]\nroot = "file:odd[1]"\n', r"catalog\.root: .*\[ or \]"),
        ('[ingest]\non_conflict = "maybe"\n', r"ingest\.on_conflict: .*keep-first"),
        ('[[peers]]\nname = "a"\n', r"peers\.0\.ae_title"),
        ("[dimse\n", r"sphere\.toml is not valid TOML"),
        ("a = " + 2000 * "[", r"sphere\.toml cannot be read: values within values, too deep"),
        ("dimse = 5\n", r"dimse: is a table, under a line \[dimse\]"),
        ("[[dimse]]\nport = 5\n", r"dimse: is a table, under a line \[dimse\]"),
        ('[peers]\nname = "a"\n', r"peers: is a list of tables, each under a line \[\[peers\]\]"),
        ('[catalog]\nroot = "s3://bucket"\n', r"catalog\.root: must begin with file:, hdfs:// or webhdfs://"),
        ('[catalog]\nroot = "/a/path"\n', r"catalog\.root: must begin with"),
        ('[catalog]\nroot = "hdfs:///c"\n', r"catalog\.root: must be such as hdfs://NAMENODE:PORT/PATH"),
        ('[storage]\nroot = "hdfs:///x"\n', r"storage\.root: must be such as hdfs://NAMENODE:PORT/PATH"),
        ('[storage]\nroot = "hdfs://nn:99999/x"\n', r"storage\.root: Port out of range"),
        ('[storage]\nroot = "file:a%00b"\n', r"storage\.root: has a NUL character"),
        ('[archive]\nstate_dir = "a\\u0000b"\n', r"archive\.state_dir: has a NUL character"),
        ("[web]\nidle_s = inf\n", r"web\.idle_s: .*31622400"),
        ("[dimse]\ncommitment_h = inf\n", r"dimse\.commitment_h: .*8784"),
        ("[ingest]\nverify_mib_s = inf\n", r"ingest\.verify_mib_s: .*finite"),
        ('[[snapshots]]\nae_title = "X"\nas_of = true\n', r"snapshots\.0\.as_of: is neither a version .* nor a time"),
        ('[[snapshots]]\nae_title = "X"\nas_of = -5\n', r"snapshots\.0\.as_of: is neither a version"),
    ],
)
def test_errors_name_key_file_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        load(write(tmp_path, text), environ={})
    assert str(tmp_path / "sphere.toml") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SPHERE_DIMSEE__PORT", "1", r"unknown key 'dimsee'; the nearest known key is 'dimse"),
        ("SPHERE_DIMSE__PROT", "1", r"unknown key 'dimse\.prot'; the nearest known key is 'dimse\.port'"),
        ("SPHERE_DIMSE__PORT", "70000", r"dimse\.port: .*65535.*got"),
        ("SPHERE_PEERS__NAME", "ward", r"\[\[peers\]\] is a list and cannot be set by a variable"),
    ],
)
def test_errors_of_variables_name_the_variable(tmp_path: Path, name: str, value: str, message: str) -> None:
    with pytest.raises(SettingsError, match=f"^variable {name}: {message}"):
        load(write(tmp_path, "[dimse]\nhost = '127.0.0.1'\n"), environ={name: value})


def test_a_mark_of_the_byte_order_is_no_part_of_the_settings(tmp_path: Path) -> None:
    """Editors of Windows put one in front of UTF-8."""
    file = tmp_path / "sphere.toml"
    file.write_bytes(b"\xef\xbb\xbf[dimse]\r\nport = 104\r\n")
    assert load(file, environ={}).dimse.port == 104


def test_two_peers_of_one_name_are_refused(tmp_path: Path) -> None:
    peer = '[[peers]]\nname = "a"\nae_title = "A"\nhost = "h"\n'
    with pytest.raises(SettingsError, match=r"sphere\.toml: peers: each name may stand once only"):
        load(write(tmp_path, peer + peer), environ={})


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="sphere init"):
        load(tmp_path / "none.toml", environ={})


def test_settings_are_frozen(tmp_path: Path) -> None:
    settings = from_dict({}, base=tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        settings.dimse.port = 1  # type: ignore[misc]


def test_every_key_is_documented_and_in_the_template(tmp_path: Path) -> None:
    text = render({})
    for key, field in documented_keys():
        assert field.description, key
        assert f"\n# {key.partition('.')[2]} = " in text, key
        assert f"`{key}`" in markdown()


def test_the_template_uncommented_is_the_defaults(tmp_path: Path) -> None:
    lines = [line[2:] if " = " in line and line.startswith("# ") else line for line in render({}).splitlines()]
    text = "\n".join(line.removeprefix("# ") if line.startswith("# [[") else line for line in lines)
    settings = load(write(tmp_path, text), environ={})
    assert (settings.peers[0].name, settings.rules[0].name) == ("ward", "trial")
    assert settings.model_copy(update={"peers": (), "rules": (), "forwards": (), "snapshots": ()}) == from_dict(
        {}, base=tmp_path
    )


@pytest.mark.parametrize("titles", ["SPHERE", "A A"])
def test_a_snapshot_has_a_title_of_its_own(tmp_path: Path, titles: str) -> None:
    tables = [{"ae_title": title, "as_of": 3} for title in titles.split()]
    with pytest.raises(SettingsError, match="snapshots: each ae_title may stand once only"):
        from_dict({"snapshots": tables}, base=tmp_path)


def test_nearest_key_ignores_list_positions() -> None:
    assert nearest_key("peers.0.aetitle") == "peers.ae_title"


def test_every_default_is_valid_toml() -> None:
    assert all(default_of(field) is not None for key, field in documented_keys() if key.split(".")[0] not in LISTS)


def test_the_user_guide_lists_exactly_these_settings() -> None:
    guide = (Path(__file__).parent.parent.parent / "docs" / "guide.md").read_text(encoding="utf-8")
    assert guide.endswith(markdown()), "run: python -m sphere.template"

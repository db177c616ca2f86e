"""Annotations in the archive itself: versions, files, what several processes do, the table."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sphere.catalog.annotations import JOURNAL, About, Annotations, Target, file_name, file_path
from sphere.conf.errors import BundleDamaged, NotThere, Overtaken, StorageError
from sphere.conf.settings import Settings
from sphere.ingest.storage import open_storage
from sphere.ingest.storage.local import LocalStorage
from sphere.jobs.annotations import follow, waiting
from sphere.jobs.tables import Tables
from tests.support.annotated import files
from tests.support.landing import archive, table_rows

pytestmark = pytest.mark.unit

TARGET = Target.unknown("STUDY", "1.2.3.4.5")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return archive(tmp_path, annotations={"limit_mib": 1})


@pytest.fixture
def annotations(settings: Settings) -> Iterator[Annotations]:
    one = Annotations(settings)
    yield one
    one.close()


def added(annotations: Annotations, data: bytes = b"one", target: Target = TARGET, **about: str) -> str:
    draft = annotations.begin(About(**about), made_by="test")
    draft.write(data)
    return draft.commit(target).id


def test_another_process_sees_it_at_once(settings: Settings, annotations: Annotations) -> None:
    id = added(annotations)
    other = Annotations(settings)
    assert [one.id for one in other.find()[0]] == [id]
    elsewhere = settings.model_copy(
        update={"archive": settings.archive.model_copy(update={"state_dir": settings.archive.state_dir / "host"})}
    )
    third = Annotations(elsewhere)
    draft = third.begin_version(id, About(), made_by="there")
    draft.write(b"two")
    draft.commit()
    assert b"".join(annotations.read(annotations.version(id))) == b"two"
    assert [one.version for one in other.history(id)] == [2, 1]
    other.close()
    third.close()


def test_of_two_new_versions_at_once_one_is_made(settings: Settings, annotations: Annotations) -> None:
    id = added(annotations)
    others = [Annotations(settings) for _ in range(4)]
    drafts = [one.begin_version(id, About(), made_by=str(number)) for number, one in enumerate(others)]
    outcomes: list[str] = []

    def commit(number: int) -> None:
        drafts[number].write(b"%d" % number)
        try:
            outcomes.append(drafts[number].commit().made_by)
        except Overtaken:
            drafts[number].discard()

    threads = [threading.Thread(target=commit, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 1
    assert [(one.version, one.made_by) for one in annotations.history(id)] == [(2, outcomes[0]), (1, "test")]
    assert len(files(settings)) == 2
    for one in others:
        one.close()


def test_a_version_whose_maker_died_is_passed_over_later(
    settings: Settings, annotations: Annotations, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = added(annotations)
    open_storage(settings.storage.root).write(file_path(id, 2), b"of a process that was killed")
    with pytest.raises(Overtaken, match="is being made"):
        annotations.begin_version(id, About(), made_by="x")
    monkeypatch.setattr("sphere.catalog.annotations.CLAIM_S", 0.0)
    draft = annotations.begin_version(id, About(), made_by="x")
    assert draft.commit().version == 3


def test_bytes_that_changed_are_not_given(settings: Settings, annotations: Annotations) -> None:
    version = annotations.version(added(annotations, b"as it was"))
    storage = open_storage(settings.storage.root)
    storage.write(version.path, b"AS IT WAS")
    with pytest.raises(BundleDamaged, match="digest"):
        list(annotations.read(version))
    storage.write(version.path, b"short")
    with pytest.raises(BundleDamaged, match="9 bytes"):
        annotations.read(version)


def test_the_cache_can_go_at_any_time(settings: Settings, annotations: Annotations) -> None:
    id = added(annotations, name="n")
    for path in (settings.archive.state_dir / "events").iterdir():
        path.write_bytes(b"rubbish")
    again = Annotations(settings)
    assert [one.id for one in again.find()[0]] == [id]
    again.close()
    root = open_storage(settings.storage.root)
    [journal] = [entry.path for entry in root.walk(JOURNAL)]
    root.append(journal).write([b'{"id":"torn'])
    third = Annotations(settings)
    assert [one.id for one in third.find()[0]] == [id]
    third.close()


def test_what_the_storage_refuses_leaves_nothing(
    settings: Settings, annotations: Annotations, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("no room")

    draft = annotations.begin(About(), made_by="x")
    draft.write(b"data")
    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "rename", full)
        with pytest.raises(StorageError, match="no room"):
            draft.commit(TARGET)
    draft.discard()
    assert files(settings) == []
    with pytest.raises(NotThere):
        annotations.version(draft.id)


def test_names_lead_nowhere() -> None:
    named = {
        "../../etc/passwd": "passwd",
        "C:\\a\\b.txt": "b.txt",
        "\0\n": "",
        "..": "",
        ".hidden": "hidden",
        "a" * 300: "a" * 200,
    }
    assert {name: file_name(name) for name in named} == named
    assert replace(TARGET, level="STUDY").uid == "1.2.3.4.5"


def test_the_table_follows_and_following_again_changes_nothing(settings: Settings, annotations: Annotations) -> None:
    assert not waiting(settings)
    assert follow(Tables(settings), settings) == 0
    kept, gone = added(annotations, type="t", name="n"), added(annotations)
    draft = annotations.begin_version(kept, About(), made_by="x")
    draft.commit()
    assert waiting(settings)
    assert follow(Tables(settings), settings) == 3
    assert not waiting(settings)
    annotations.delete(gone, made_by="x")
    assert follow(Tables(settings), settings) == 2
    rows = table_rows(settings, "annotations")
    shown = {(row["id"], row["version"]): row["state"] for row in rows}
    assert shown == {(kept, 1): "superseded", (kept, 2): "current", (gone, 1): "superseded", (gone, 2): "deleted"}
    for path in (settings.archive.state_dir / "events").iterdir():
        path.unlink()
    assert follow(Tables(settings), settings) == 4, "as from another host"
    assert table_rows(settings, "annotations") == rows

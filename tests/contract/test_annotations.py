"""What annotations promise, on every storage."""

from __future__ import annotations

import pytest

from sphere.catalog.annotations import About, Annotations, Target
from sphere.conf.errors import NotThere, Overtaken
from sphere.conf.settings import Settings
from tests.contract.backends import Backend, Hdfs, Local, WebHdfs


class AnnotationsContract(Backend):
    """Every promise once."""

    def test_versions_from_two_hosts(self, archive: Settings) -> None:
        state_dir = archive.archive.state_dir / "elsewhere"
        elsewhere = archive.model_copy(update={"archive": archive.archive.model_copy(update={"state_dir": state_dir})})
        here, there = Annotations(archive), Annotations(elsewhere)
        draft = here.begin(About(type="t"), made_by="here")
        for _ in range(3):
            draft.write(b"x" * (1 << 20))
        made = draft.commit(Target.unknown("SERIES", "1.2.3"))
        assert b"".join(there.read(there.version(made.id))) == b"x" * (3 << 20)
        drafts = [one.begin_version(made.id, About(), made_by="two") for one in (here, there)]
        drafts[1].write(b"two")
        drafts[1].commit()
        with pytest.raises(Overtaken, match="was made meanwhile"):
            drafts[0].commit()
        drafts[0].discard()
        assert [one.version for one in here.history(made.id)] == [2, 1]
        here.delete(made.id, made_by="here", onto=2)
        with pytest.raises(NotThere, match="deleted"):
            there.version(made.id)
        assert there.find(uid="1.2.3") == ([], 0)
        assert b"".join(there.read(there.version(made.id, 2))) == b"two"
        here.close()
        there.close()


class TestLocal(Local, AnnotationsContract):
    """file:///"""


class TestHdfs(Hdfs, AnnotationsContract):
    """hdfs://"""


class TestWebHdfs(WebHdfs, AnnotationsContract):
    """webhdfs://"""

"""Whether what arrives was deleted here: it is not let in again before somebody undoes the deletion."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from queue import SimpleQueue
from typing import Final

from sphere.catalog.tombstones import open_tombstones
from sphere.conf.settings import Settings
from sphere.ingest.spool import in_use

log = logging.getLogger(__name__)

PATIENCE_S: Final = 0.5  # seconds that a sender to a spool waits for the storage: it may be away for hours
AWAY_S: Final = 30.0  # seconds until a storage that did not answer is asked again


class Deleted:
    """Asked for every instance that arrives; one per process, shared by its threads.

    Never raises: what is let in because the storage did not answer is left out by extraction and by every query.
    """

    def __init__(self, settings: Settings) -> None:
        self._tombstones = open_tombstones(settings)
        self._hurried = in_use(settings)
        self._away_until = 0.0

    def holds(self, sop_instance_uid: str) -> bool:
        """Whether the instance is deleted, as far as that can be seen now."""
        if time.monotonic() < self._away_until:
            return False
        try:
            if not self._hurried:
                return bool(self._tombstones.deleted([sop_instance_uid]))
            answer: SimpleQueue[bool] = SimpleQueue()
            threading.Thread(target=self._ask, args=(sop_instance_uid, answer), daemon=True).start()
            return answer.get(timeout=PATIENCE_S)
        except Exception as error:  # noqa: BLE001  whatever is wrong with it, what arrives is not lost for it
            self._away_until = time.monotonic() + AWAY_S
            log.warning("what was deleted cannot be seen for now: %s", type(error).__name__)
            return False

    def _ask(self, sop_instance_uid: str, answer: SimpleQueue[bool]) -> None:
        with suppress(Exception):  # then nobody is answered, and who waits goes on
            answer.put(bool(self._tombstones.deleted([sop_instance_uid])))

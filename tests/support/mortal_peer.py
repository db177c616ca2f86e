"""A C-STORE SCP that is killed in the midst of an instance: `python -m tests.support.mortal_peer PORT NUMBER`."""

from __future__ import annotations

import os
import signal
import sys
from itertools import count
from typing import Any

from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, evt

from tests.support.samples import CT_STORAGE


def main() -> None:
    """Say `ready`, and take instances until the one of that number."""
    port, last = map(int, sys.argv[1:])
    numbers = count(1)

    def store(event: Any) -> int:
        if next(numbers) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0x0000

    ae = AE(ae_title="DEST")
    ae.add_supported_context(CT_STORAGE, ExplicitVRLittleEndian)
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    assert server is not None
    print("ready", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()

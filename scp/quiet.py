"""What libraries may say: nothing of what is in data sets."""

from __future__ import annotations

import logging

import pydicom.config
from pynetdicom import _config


def quiet_libraries() -> None:
    """Keep data sets out of this process's output: pynetdicom logs identifiers, pydicom warns of bad values."""
    _config.LOG_HANDLER_LEVEL = "none"
    _config.LOG_REQUEST_IDENTIFIERS = False
    _config.LOG_RESPONSE_IDENTIFIERS = False
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

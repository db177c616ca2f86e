"""The libraries as a process that speaks DICOM needs them: silent about data, tolerant of what arrives."""

from __future__ import annotations

import logging

import pydicom.config
from pydicom.uid import UID
from pynetdicom import _config

from sphere.conf import logs


def prepare_libraries() -> None:
    """Set the process-wide switches of pynetdicom and pydicom.

    Nothing of data sets goes to this process's output (pynetdicom logs identifiers, pydicom warns of bad values), and a
    UID that breaks PS3.5 9.1 does not end an association: what carries it is kept, and judged by extraction.
    """
    _config.LOG_HANDLER_LEVEL = "none"
    _config.LOG_REQUEST_IDENTIFIERS = False
    _config.LOG_RESPONSE_IDENTIFIERS = False
    _config.VALIDATORS["UI"] = _any_uid
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
    logs.quiet()
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE


def _any_uid(value: UID) -> tuple[bool, str]:
    return True, ""

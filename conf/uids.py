"""What is taken as a UID, wherever one comes from outside."""

from __future__ import annotations

import re
from typing import Final

UID_LENGTH: Final = 64  # characters (PS3.5 9.1)
UID: Final = re.compile(rf"[0-9.]{{1,{UID_LENGTH}}}", re.ASCII)
"""Digits and periods (PS3.5 9.1), leading zeros and empty components too: what is held has to be found."""

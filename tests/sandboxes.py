"""Marks tests that run programs; they are skipped, with the reason, where this machine has no sandbox."""

from __future__ import annotations

import pytest

from papo.engines.sandbox import Sandbox
from papo.errors import SetupError


def _reason() -> str:
    try:
        Sandbox().check()
    except SetupError as error:
        return str(error)
    return ""


REASON = _reason()
sandboxed = pytest.mark.skipif(bool(REASON), reason=f"no sandbox here: {REASON}")

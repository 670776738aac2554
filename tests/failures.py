"""What a person is told when something fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from papo.errors import PapoError


def failure(kind: type[PapoError], call: Callable[[], Any]) -> PapoError:
    """The error of exactly this kind that the call raises; it says where, and what to do."""
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert caught.value.where
    assert caught.value.fix
    return caught.value

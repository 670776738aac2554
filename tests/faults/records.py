"""A tracker that appends what it is told to a file, a line a call."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class FileTracker:
    """In the place of MLflow's; what a kill leaves of it is what had been told."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        self._tell("start")

    def stage(self, stage: str, round_: int | None, manifest: Mapping[str, Any]) -> None:
        self._tell("stage", stage, round_)

    def trace(self, call: Mapping[str, Any]) -> None: ...

    def artifact(self, path: Path) -> None: ...

    def policy(self, path: Path, name: str, metrics: Mapping[str, float]) -> None: ...

    def tag(self, key: str, value: str) -> None: ...

    def settle(self) -> None: ...

    def link(self) -> None: ...

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        if status == "FINISHED":
            self._tell("finish")

    def _tell(self, *call: Any) -> None:
        os.write(self._file, (json.dumps(call) + "\n").encode())

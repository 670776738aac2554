"""One server for all tests of this folder, which are skipped where there is no vLLM or no model.

The folder is not named vllm: tests/ is on the import path, and libraries that ask whether vllm is installed would find it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from servers.vllm import ROOT, vllm_python, vllm_server

MODEL = ROOT / "models/smollm2-135m"
MAX_MODEL_LEN = 2048


@pytest.fixture(scope="session")
def with_vllm() -> Path:
    """A python that has vLLM."""
    try:
        return vllm_python()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct."""
    if not MODEL.is_dir():
        pytest.skip(f"{MODEL.relative_to(ROOT)} is not there; `make test-vllm` puts it in place")
    return MODEL


@pytest.fixture(scope="session")
def vllm_url(with_vllm: Path, smollm2: Path) -> Iterator[str]:
    """Of SmolLM2-135M-Instruct in float32: with half of the bits, what else is computed beside a reply changes it."""
    with vllm_server(smollm2, max_model_len=MAX_MODEL_LEN, dtype="float32", enforce_eager=True) as url:
        yield url

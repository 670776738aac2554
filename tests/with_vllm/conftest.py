"""One server for all tests of this folder, which are skipped where there is no vLLM or no model.

The folder is not named vllm: tests/ is on the import path, and libraries that ask whether vllm is installed would find it.
"""

from __future__ import annotations

import json
import shutil
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


@pytest.fixture(scope="module")
def policy(started: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The warm start of a tiny run, with settings beside it that would bend the distribution and end completions early."""
    folder = Path(shutil.copytree(started / "artifacts/warmstart", tmp_path_factory.mktemp("warm") / "policy"))
    settings = {"repetition_penalty": 1.5, "temperature": 0.6, "top_k": 2, "do_sample": True, "eos_token_id": [1, 7, 8]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder

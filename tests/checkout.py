"""A checkout of its own for tests that write where a person would: a copy of the files that git knows, under git and DVC."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]

# Libraries that take seconds to import, or a GPU build of hundreds of megabytes to install.
HEAVY = frozenset(
    [
        "torch",
        "transformers",
        "trl",
        "datasets",
        "mlflow",
        "prefect",
        "dvc",
        "math_verify",
        "sympy",
        "rich",
        "matplotlib",
        "openai",
    ]
)

# Everything small: seconds instead of minutes, the same stages.
TINY: dict[str, Any] = {
    "run": {"rounds": 2},
    "prepare": {
        "sums": {
            "train": {"min_terms": 2, "max_terms": 3, "problems": 24},
            "eval": {
                "sums-in-range": {"min_terms": 3, "max_terms": 3, "problems": 4},
                "sums-hard": {"min_terms": 4, "max_terms": 4, "problems": 4},
            },
            "traces": 128,
        }
    },
    "warmstart": {"steps": 4},
    "rollout": {"prompts_per_round": 4, "max_new_tokens": 12},
    "train": {"minibatch_prompts": 2},
    "evaluate": {"max_new_tokens": 12},
    "tracking": {"enabled": False},
}

# A run of seconds whose policy is too small to do anything.
TINIEST: dict[str, Any] = {
    "run": {"rounds": 1},
    "prepare": {
        "sums": {
            "train": {"min_terms": 3, "max_terms": 4, "problems": 8},
            "eval": {"tiny": {"min_terms": 3, "max_terms": 4, "problems": 4}},
            "traces": 32,
        }
    },
    "warmstart": {
        "steps": 2,
        "batch_size": 8,
        "microbatch": 8,
        "model": {"hidden_size": 24, "intermediate_size": 32, "layers": 1, "heads": 3},
    },
    "rollout": {"prompts_per_round": 2, "group_size": 2, "max_new_tokens": 8, "prompts_per_shard": 2},
    "train": {"minibatch_prompts": 2},
    "evaluate": {"benchmarks": ["tiny"], "samples_per_problem": 2, "max_new_tokens": 8},
    "tracking": {"enabled": False},
}


class Checkout:
    """A folder with the project in it, and the commands that a person would type there."""

    def __init__(self, folder: Path, *, params: dict[str, Any] | None = None) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"], capture_output=True, check=True
        )
        for name in listed.stdout.decode().split("\0"):
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self.run("git", "init", "-q")
        self.run("git", "add", "-A")
        self.run("git", "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-qm", "copy")
        if params is not None:
            self.set_params(params)

    def set_params(self, params: dict[str, Any]) -> None:
        """Lays `params` over params.yaml and writes dvc.yaml anew."""
        path = self.folder / "params.yaml"
        path.write_text(yaml.safe_dump(_merged(yaml.safe_load(path.read_text()), params)))
        self.papo("dvc")

    def papo(self, *arguments: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "papo", *arguments, ok=ok)

    def dvc(self, *arguments: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "dvc", *arguments, ok=ok)

    def run(self, *command: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert not ok or done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    @property
    def environment(self) -> dict[str, str]:
        # The copy's own code, and `papo` for the commands of dvc.yaml.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"PATH": path, "PYTHONPATH": str(self.folder), "DVC_NO_ANALYTICS": "true"}


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged

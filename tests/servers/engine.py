"""What stands in for the package vllm under the worker of the sampler: the table of `completions`, an engine by steps, faults by plan.

`save_package(folder)` makes a folder that has it as `vllm` 0.32.0, and `python_of(folder)` an interpreter that has that folder alone on its
path. The plan is the JSON of the environment's PAPO_ENGINE_PLAN. Each process notes its arguments in `started-PID.json` of its folder, and
for each step how many rows it computes in `steps-PID`.
"""

from __future__ import annotations

import enum
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PLAN = {
    "fault": "none",  # of rows: those of completions.ROW_FAULTS
    "load_s": 0.0,
    "load_error": "",
    "context": 0,  # 0: as asked for
    "rows": 8,  # at a time
    "step_s": 0.0,
    "dies": 0,  # so many processes kill themselves ...
    "hangs": 0,  # so many processes stop for good, likewise
    "after": 5,  # ... after so many rows; 0: as they load
    "refuses": False,  # each row, as add_request
}
OPTIONS = {"max_model_len", "enforce_eager", "tensor_parallel_size"}

__version__ = "0.32.0"


def _taken(what: str, turns: int) -> bool:
    """Whether it was there for this process to take one of the turns: no two processes that ask at once get the same."""
    for turn in range(turns):
        try:
            Path(f"{what}-{turn}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return True
    return False


def save_package(folder: Path) -> Path:
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm/__init__.py").write_text(Path(__file__).read_text())
    (folder / "vllm/sampling_params.py").write_text("from vllm import RequestOutputKind\n")
    for name, version in (("vllm", "0.32.0"), ("transformers", "9.9.9")):
        about = folder / f"{name}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "transformers.py").write_text("")
    return folder


def python_of(*folders: Path, at: Path) -> str:
    """An interpreter, as a script at that path, that imports from these folders first."""
    path = os.pathsep.join(map(str, folders))
    at.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(path)} exec {shlex.quote(sys.executable)} "$@"\n')
    at.chmod(0o755)
    return str(at)


class RequestOutputKind(enum.Enum):
    CUMULATIVE = 0
    FINAL_ONLY = 2


class SamplingParams(SimpleNamespace):
    def __init__(
        self, *, n: int, max_tokens: int, temperature: float, top_p: float, top_k: int, min_p: float, ignore_eos: bool,
        stop_token_ids: list[int], logprobs: int, detokenize: bool, seed: int, flat_logprobs: bool, output_kind: Any,
    ) -> None:  # fmt: skip
        assert (n, top_k, min_p, ignore_eos, logprobs, detokenize) == (1, 0, 0.0, True, 0, False)
        assert flat_logprobs
        assert output_kind is RequestOutputKind.FINAL_ONLY
        assert 0 <= seed < 2**63
        super().__init__(
            max_tokens=max_tokens, temperature=temperature, top_p=top_p, stop_token_ids=stop_token_ids, seed=seed
        )


def TokensPrompt(*, prompt_token_ids: list[int]) -> dict[str, Any]:  # noqa: N802  # vLLM's name
    return {"prompt_token_ids": prompt_token_ids}


class LLM:
    def __init__(self, model: str, dtype: str, logprobs_mode: str, generation_config: str, **options: Any) -> None:
        print("INFO loading")  # noqa: T201  # as vLLM does, to standard output
        if unknown := options.keys() - OPTIONS:
            raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument {min(unknown)!r}")
        plan = PLAN | json.loads(os.environ.get("PAPO_ENGINE_PLAN", "{}"))
        assert plan.keys() == PLAN.keys()
        started = {"dtype": dtype, "generation_config": generation_config, "options": options, "model": model}
        started["device"] = os.environ.get("CUDA_VISIBLE_DEVICES")
        Path(f"started-{os.getpid()}.json").write_text(json.dumps(started))
        time.sleep(plan["load_s"])
        if plan["load_error"]:
            raise ValueError(plan["load_error"])
        self.llm_engine = Engine(plan, logprobs_mode, model, plan["context"] or options["max_model_len"])


class Engine:
    """Computes a token of up to `rows` rows a step."""

    def __init__(self, plan: dict[str, Any], mode: str, model: str, context: int) -> None:
        from servers.completions import Plan

        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=context),
            scheduler_config=SimpleNamespace(max_num_seqs=plan["rows"]),
        )
        table = Path(model) / "table"
        self._plan, self._table = plan, Plan(policy=int(table.read_text()) if table.is_file() else 0, mode=mode)
        self._rows: dict[str, tuple[Any, list[int]]] = {}
        self._done = 0
        self._die()

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> str:
        from servers.completions import complete, spoil

        if self._plan["refuses"]:
            raise ValueError("no such row")
        body = vars(params) | {"prompt": prompt["prompt_token_ids"], "logprobs": 1}
        choice = complete(body, self._table)
        length = len(choice["token_ids"])
        spoil(choice, self._plan["fault"], body)
        noted = SimpleNamespace(
            start_indices=list(range(len(choice["token_ids"] or ()))), token_ids=choice["token_ids"],
            logprobs=choice["logprobs"]["token_logprobs"],
        )  # fmt: skip
        found = SimpleNamespace(token_ids=choice["token_ids"], logprobs=noted, finish_reason=choice["finish_reason"])
        self._rows[request_id] = (SimpleNamespace(request_id=request_id, finished=True, outputs=[found]), [length])
        return request_id

    def has_unfinished_requests(self) -> bool:
        return bool(self._rows)

    def step(self) -> list[Any]:
        time.sleep(self._plan["step_s"])
        now = list(self._rows)[: self._plan["rows"]]
        with Path(f"steps-{os.getpid()}").open("a") as steps:
            steps.write(f"{len(now)}\n")
        ended = []
        for name in now:
            output, left = self._rows[name]
            left[0] -= 1
            if left[0] == 0:
                ended.append(output)
                del self._rows[name]
        self._done += len(ended)
        self._die()
        return ended

    def _die(self) -> None:
        """Killed, with the rows that just ended, or stopped for good, if it is its turn."""
        if self._done < self._plan["after"]:
            return
        if _taken("hung", self._plan["hangs"]):
            time.sleep(3600)
        if _taken("died", self._plan["dies"]):
            sys.stderr.write("about to die\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)

"""What starts servers, with the real vLLM: it takes the flags, and the try on the CPU answers and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from compose import compose
from servers.vllm import START_S, free_port

from papo.engines.serving import Server
from papo.params import load_params

ROOT = Path(__file__).parents[2]
SERVE = ROOT / "infra/judge/serve"

# As the server reads its command line, which it does before it looks for a GPU or the weights.
PARSE = """\
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

given = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
validate_parsed_serve_args(given)
names = ("model_tag", "revision", "tokenizer_revision", "served_model_name", "max_model_len", "gpu_memory_utilization",
         "enable_prefix_caching", "generation_config", "tensor_parallel_size", "dtype", "logprobs_mode", "host", "port")
print(json.dumps({name: getattr(given, name) for name in names}))
"""

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


def test_vllm_takes_the_flags_of_the_default_judge(with_vllm: Path, tmp_path: Path) -> None:
    parse = tmp_path / "parse.py"
    parse.write_text(PARSE)
    port = free_port()
    done = subprocess.run(
        [SERVE, "gpt-oss-20b", "--tensor-parallel-size", "2"],
        env=_environment() | {"VLLM": f"{with_vllm} {parse}", "PORT": str(port)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr[-3000:]
    revision = "6cee5e81ee83917806bbde320786a8fb61efebee"
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "model_tag": "openai/gpt-oss-20b",
        "revision": revision,
        "tokenizer_revision": revision,
        "served_model_name": ["gpt-oss-20b"],
        "max_model_len": 16384,
        "gpu_memory_utilization": 0.9,
        "enable_prefix_caching": True,
        "generation_config": "vllm",
        "tensor_parallel_size": 2,
        "dtype": "auto",
        "logprobs_mode": "raw_logprobs",
        "host": "127.0.0.1",
        "port": port,
    }


def test_vllm_takes_the_flags_of_the_containers_and_of_the_presets(with_vllm: Path, tmp_path: Path) -> None:
    services = compose(VLLM_API_KEY="a-secret")["services"]
    params = load_params(ROOT / "params.yaml", preset=ROOT / "infra/presets/rollout-vllm-server.yaml").rollout.server
    own = Server(params.model_copy(update={"command": f"{sys.executable} serve"}), tmp_path, tmp_path / "log")
    policy, judge, preset = (
        parsed(with_vllm, flags, tmp_path)
        for flags in (services["policy"]["command"], services["judge"]["command"], own.command()[2:])
    )
    assert (policy["model_tag"], policy["served_model_name"]) == ("/policy", ["policy"])
    assert (policy["max_model_len"], policy["gpu_memory_utilization"]) == (-1, 0.45)  # -1: what memory has room for
    assert (judge["model_tag"], judge["served_model_name"]) == ("/judge", ["gpt-oss-20b"])
    assert (judge["max_model_len"], judge["enable_prefix_caching"]) == (16384, True)
    assert (preset["max_model_len"], preset["gpu_memory_utilization"]) == (-1, 0.85)
    for one in (policy, preset):
        assert (one["logprobs_mode"], one["generation_config"], one["dtype"]) == (
            "processed_logprobs",
            "vllm",
            "bfloat16",
        )
    for one in (policy, judge):
        assert (one["host"], one["port"]) == ("0.0.0.0", 8000)


def parsed(python: Path, flags: list[str], folder: Path) -> dict[str, Any]:
    """What vLLM reads in the flags of `vllm serve`."""
    program = folder / "parse.py"
    program.write_text(PARSE)
    done = subprocess.run(
        [python, program, *flags], env=_environment(), capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.stdout, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("preset", ["rollout-vllm", "paper-qwen2.5-7b"])
def test_vllm_knows_the_arguments_of_the_presets(with_vllm: Path, tmp_path: Path, preset: str) -> None:
    options = load_params(ROOT / "params.yaml", preset=ROOT / f"infra/presets/{preset}.yaml").rollout.vllm.options
    program = tmp_path / "known.py"
    program.write_text(
        "import dataclasses, json, sys\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "print(sorted(set(json.loads(sys.argv[1])) - {field.name for field in dataclasses.fields(EngineArgs)}))"
    )
    for given, unknown in ((options, "[]"), (options | {"imagine": 1}, "['imagine']")):
        done = subprocess.run(
            [with_vllm, program, json.dumps(given)],
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.stdout.splitlines()[-1:] == [unknown], done.stderr[-3000:]


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_the_try_on_the_cpu_answers_and_ends(with_vllm: Path, smollm2: Path, tmp_path: Path) -> None:
    port = free_port()
    environment = _environment() | {
        "VLLM": f"{with_vllm} -m vllm.entrypoints.openai.api_server --model",
        "MODEL": str(smollm2),
        "PORT": str(port),
        "START_S": str(int(START_S)),
    }
    log = tmp_path / "log"
    with log.open("wb") as stream:
        script = subprocess.Popen(
            [SERVE, "smollm2-135m"], env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
    with script:
        below: list[psutil.Process] = []
        try:
            while "\nsmollm2-135m answers: " not in log.read_text():
                assert script.poll() is None, log.read_text()[-3000:]
                time.sleep(0.5)
            below = psutil.Process(script.pid).children(recursive=True)
            body = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "What is 2+3?"}], "max_tokens": 9}
            asked = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/chat/completions",
                json.dumps(body).encode(),
                {"content-type": "application/json"},
            )
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=120) as response:
                assert json.loads(response.read())["choices"][0]["message"]["content"]
            script.terminate()
            assert script.wait(60) == 143
            _, left = psutil.wait_procs(below, timeout=30)
            assert [one for one in left if one.status() != psutil.STATUS_ZOMBIE] == []
        finally:
            for one in [*below, psutil.Process(script.pid)] if script.poll() is None else below:
                if one.is_running():
                    one.send_signal(signal.SIGKILL)

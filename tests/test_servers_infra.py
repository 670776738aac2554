"""infra/compose.yaml, infra/servers and infra/kubernetes, read: what starts, with which secrets, and who may reach it.

tests/test_servers.py starts the same commands; no test starts a container.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from compose import COMPOSE, GIVEN, SECRETS, UnsetError, compose
from packaging.requirements import Requirement
from servers.postgres import needs_postgres
from servers.processes import clean_environment

from papo.params import load_params

ROOT = Path(__file__).parents[1]
SERVE = ROOT / "infra/servers/serve"
DOCKERFILE = ROOT / "infra/servers/Dockerfile"
KUBERNETES = ROOT / "infra/kubernetes"
BUILT = ("prefect", "mlflow", "mlflow-users", "worker")
PUBLISHED = {"prefect": "4200", "mlflow": "5000", "policy": "8001", "judge": "8000"}


def services(**variables: str) -> dict[str, Any]:
    found = compose(**GIVEN, **variables)["services"]
    assert isinstance(found, dict)
    return found


def lock() -> dict[str, str]:
    """Versions by name, as PyPI writes it."""
    lines = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    return {_plain(name): version for name, version in lines}


def _plain(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


# ---- the compose file ----


def test_the_compose_file_is_one() -> None:
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    check = jsonschema.validators.validator_for(schema)(schema)
    found = compose(**GIVEN)
    check.validate(found)
    with pytest.raises(jsonschema.ValidationError, match="imagine"):
        check.validate(found | {"services": {"policy": {"imagine": "x"}}})


@pytest.mark.parametrize("name", SECRETS)
def test_nothing_starts_without_a_secret(name: str) -> None:
    for value in ({}, {name: ""}):
        with pytest.raises(UnsetError, match="infra/servers/secrets makes it"):
            compose(**{one: GIVEN[one] for one in SECRETS if one != name} | value)


def test_each_service_is_told_its_own_secrets_only() -> None:
    told = {
        name: {secret for secret in SECRETS if GIVEN[secret] in json.dumps(service)}
        for name, service in services().items()
    }
    assert told == {
        "postgres": {"POSTGRES_PASSWORD", "PREFECT_DB_PASSWORD", "MLFLOW_DB_PASSWORD"},
        "prefect": {"PREFECT_DB_PASSWORD", "PREFECT_AUTH"},
        "mlflow": {"MLFLOW_DB_PASSWORD", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY"},
        "mlflow-users": {"MLFLOW_ADMIN_PASSWORD", "MLFLOW_WORKER_PASSWORD"},
        "worker": {"PREFECT_AUTH", "MLFLOW_WORKER_PASSWORD", "VLLM_API_KEY"},
        "policy": {"VLLM_API_KEY"},
        "judge": {"VLLM_API_KEY"},
    }
    commands = json.dumps([service.get("command") for service in services().values()])
    assert not [secret for secret in SECRETS if GIVEN[secret] in commands]


def test_ports_are_those_of_this_machine_unless_told_otherwise() -> None:
    for bind in ("127.0.0.1", "10.0.0.1"):
        ports = {name: service["ports"] for name, service in services(BIND=bind).items() if "ports" in service}
        inner = {"prefect": "4200", "mlflow": "5000", "policy": "8000", "judge": "8000"}
        assert ports == {name: [f"{bind}:{port}:{inner[name]}"] for name, port in PUBLISHED.items()}
    assert services()["prefect"]["ports"] == ["127.0.0.1:4200:4200"]


def test_only_prefect_and_mlflow_reach_the_database() -> None:
    assert {name for name, service in services().items() if "database" in service["networks"]} == {
        "postgres",
        "prefect",
        "mlflow",
    }
    assert services()["postgres"]["networks"] == ["database"]
    assert compose(**GIVEN)["networks"]["database"] == {"internal": True}


def test_what_needs_no_gpu_is_confined_and_what_needs_one_starts_when_asked() -> None:
    for name, service in services().items():
        if name in ("policy", "judge"):
            assert service["profiles"] == ["vllm"]
            continue
        assert "profiles" not in service
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"]), name
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["mem_limit"]
        assert service["user"] != "root" if name in ("postgres", "worker") else True
        assert not service.get("privileged")
    assert {service["user"] for service in services().values() if "user" in service} == {"postgres", "1000:1000"}
    assert re.findall("^USER (.*)$", DOCKERFILE.read_text(), re.MULTILINE) == ["10001:10001"] * 3


def test_a_service_starts_when_what_it_needs_is_healthy() -> None:
    needs = {
        name: {one: how["condition"] for one, how in service["depends_on"].items()}
        for name, service in services().items()
        if "depends_on" in service
    }
    assert needs == {
        "prefect": {"postgres": "service_healthy"},
        "mlflow": {"postgres": "service_healthy"},
        "mlflow-users": {"mlflow": "service_healthy"},
        "worker": {"prefect": "service_healthy", "mlflow-users": "service_completed_successfully"},
    }
    assert {name for name, service in services().items() if "healthcheck" not in service} == {"mlflow-users"}
    assert {
        name: service["restart"] for name, service in services().items() if service["restart"] != "unless-stopped"
    } == {"mlflow-users": "on-failure:3"}


def test_what_has_to_stay_is_in_a_volume() -> None:
    assert services()["postgres"]["volumes"][0] == "database:/var/lib/postgresql/data"
    assert services()["mlflow"]["volumes"] == ["artifacts:/artifacts"]
    assert set(compose(**GIVEN)["volumes"]) == {"database", "artifacts"}
    roles = services()["postgres"]["volumes"][1]
    assert (COMPOSE.parent / roles["source"]).is_file()
    assert roles["target"].startswith("/docker-entrypoint-initdb.d/")


def test_versions_are_those_of_the_lock() -> None:
    versions = lock()
    images = {name: service["image"] for name, service in services().items() if "image" in service}
    assert images["prefect"] == f"papo-prefect:{versions['prefect']}"
    assert images["mlflow"] == images["mlflow-users"] == f"papo-mlflow:{versions['mlflow']}"
    assert images["worker"] == f"papo-worker:{metadata.version('papo')}"
    for name in BUILT:
        if name != "mlflow-users":
            build = services()[name]["build"]
            assert (COMPOSE.parent / build["context"] / build["dockerfile"]).resolve() == DOCKERFILE
            assert f" AS {build['target']}\n" in DOCKERFILE.read_text()


@needs_postgres
def test_postgres_is_the_release_that_the_tests_start() -> None:
    from servers.postgres import binaries

    tools = binaries()
    assert tools is not None
    said = subprocess.run([tools / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"postgres:(\d+)\.\d+-", services()["postgres"]["image"])
    assert release is not None
    assert re.search(rf"\) {release[1]}\.", said), said


def test_every_variable_is_named_with_its_default_at_the_top() -> None:
    text = COMPOSE.read_text()
    top = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    found = re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", text)
    assert len(found) == 28
    for name, default in found:
        assert (f"{name}={default}" if default and name not in ("POLICY", "JUDGE", "CHECKOUT") else name) in top, name
        assert default in top


# ---- the images ----


def needed(requirement: str, seen: set[str]) -> set[str]:
    """What installing it takes, by the packages that are installed here."""
    wanted = Requirement(requirement)
    for extra in ("", *wanted.extras):
        if (key := f"{_plain(wanted.name)}[{extra}]") in seen:
            continue
        seen.add(key)
        for line in metadata.requires(wanted.name) or ():
            below = Requirement(line)
            if below.marker is None or below.marker.evaluate({"extra": extra}):
                needed(line, seen)
    return seen


def test_an_image_holds_nothing_that_the_lock_does_not_pin() -> None:
    versions = lock()
    installed = re.findall(
        r"^RUN pip install --constraint requirements.lock (.*?)(?: \\)?$", DOCKERFILE.read_text(), re.MULTILINE
    )
    assert len(installed) == 2
    for line in installed:
        for requirement in line.replace('"', "").split():
            names = {key.split("[")[0] for key in needed(requirement, set())}
            assert names <= set(versions), f"{requirement}: {names - set(versions)}"
    # Extras may not stand in a file of constraints.
    assert "[" not in re.sub("#.*", "", (ROOT / "requirements.lock").read_text())


def test_the_builder_is_sent_what_is_copied_and_no_secret() -> None:
    copied = [
        source
        for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
        for source in line.split()
    ]
    sent = {
        line[1:]
        for line in DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(source == one or source.startswith(f"{one}/") for one in sent), source
    assert "infra" not in sent, "infra/.env would be sent"
    ignored = subprocess.run(["git", "-C", str(ROOT), "check-ignore", "infra/.env"], capture_output=True, check=False)
    assert ignored.returncode == 0


# ---- by hand ----


def noted(tmp_path: Path, *arguments: str, **variables: str) -> tuple[list[str], dict[str, str]]:
    """The command and the environment that `serve` ends in."""
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, os, pathlib, sys\n"
        f"pathlib.Path({str(tmp_path / 'noted')!r}).write_text(json.dumps([sys.argv[1:], dict(os.environ)]))"
    )
    python.chmod(0o755)
    environment = clean_environment(
        {"PYTHON": str(python), "SECRETS": "/nowhere", "DATA": str(tmp_path / "data"), **GIVEN, **variables}
    )
    subprocess.run([SERVE, *arguments], env=environment, check=True, timeout=60)
    words, found = json.loads((tmp_path / "noted").read_text())
    return words, found


@pytest.mark.parametrize("name", ["prefect", "mlflow", "worker"])
def test_a_container_starts_as_the_script_starts_it(name: str, tmp_path: Path) -> None:
    words, environment = noted(
        tmp_path, name, BIND="0.0.0.0", ARTIFACTS="/artifacts", POSTGRES_HOST="postgres", MLFLOW_HOSTS="localhost:5000",
        PREFECT_API_URL="http://prefect:4200/api",
    )  # fmt: skip
    service = services()[name]
    assert service["command"] == ["python", *words]
    elsewhere = {
        "HOME", "NO_PROXY", "no_proxy", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL",
        "PREFECT_HOME", "PREFECT_UI_STATIC_DIRECTORY", "MLFLOW_AUTH_CONFIG_PATH",
    }  # fmt: skip
    told = {key: value for key, value in service["environment"].items() if key not in elsewhere}
    assert told == {key: environment.get(key) for key in told}
    said = {key for key in environment if key.startswith(("PREFECT_", "MLFLOW_", "PG"))} - elsewhere - {"MLFLOW_HOSTS"}
    assert said <= set(told) | {"PREFECT_API_URL"}, "the script says more than the compose file"


def test_postgres_starts_in_a_container_as_the_script_starts_it() -> None:
    (line,) = re.findall(r'"\$bin/postgres" (.*) "\$\{@:2\}" &', SERVE.read_text())
    values = {"$bind": "0.0.0.0", "$db_port": "5432", "$PGDATA": "/var/run/postgresql"}
    words = re.sub(r"\$\w+", lambda found: values[found[0]], line.replace('"', "")).split()
    assert services()["postgres"]["command"] == ["postgres", *words]


def test_only_this_machine_is_served_unless_told_otherwise(tmp_path: Path) -> None:
    for name in ("prefect", "mlflow"):
        words, _ = noted(tmp_path, name)
        assert words[words.index("--host") + 1] == "127.0.0.1"
    assert "bind=${BIND:-127.0.0.1}" in SERVE.read_text()


def test_flags_of_ones_own_are_passed_on(tmp_path: Path) -> None:
    words, _ = noted(tmp_path, "worker", "--name", "night shift")
    assert words[-2:] == ["--name", "night shift"]


@pytest.mark.parametrize(
    ("name", "secrets"),
    [
        ("postgres", ("POSTGRES_PASSWORD", "PREFECT_DB_PASSWORD", "MLFLOW_DB_PASSWORD")),
        ("prefect", ("PREFECT_DB_PASSWORD", "PREFECT_AUTH")),
        ("mlflow", ("MLFLOW_DB_PASSWORD", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY")),
        ("mlflow-users", ("MLFLOW_ADMIN_PASSWORD", "MLFLOW_WORKER_PASSWORD")),
        ("worker", ("PREFECT_AUTH", "MLFLOW_WORKER_PASSWORD")),
    ],
)
def test_a_server_refuses_to_start_without_its_secrets(name: str, secrets: tuple[str, ...], tmp_path: Path) -> None:
    base = clean_environment({"PYTHON": "/bin/false", "SECRETS": "/nowhere", "DATA": str(tmp_path)})
    base = {key: value for key, value in base.items() if key not in SECRETS}
    for missing in secrets:
        given = {secret: "x" for secret in secrets if secret != missing}
        for empty in ({}, {missing: ""}):
            done = subprocess.run([SERVE, name], env=base | given | empty, capture_output=True, text=True, check=False)
            assert done.returncode == 2
            assert f"{name}: {missing} is not set; infra/servers/secrets makes it" in done.stderr
    assert not list(tmp_path.iterdir()), "nothing was made"


def test_a_name_that_is_none_is_refused() -> None:
    done = subprocess.run([SERVE, "mysql"], env=clean_environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.startswith("usage: ")) == (2, True)


def test_secrets_are_made_once_and_only_their_owner_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "secrets"
    make = [SERVE.with_name("secrets")]
    environment = clean_environment({"SECRETS": str(file)})
    subprocess.run(make, env=environment, capture_output=True, check=True)
    first = file.read_text()
    found = dict(line.split("=") for line in first.splitlines())
    assert set(found) == set(SECRETS)
    assert len(set(found.values())) == len(SECRETS)
    assert all(re.fullmatch("(papo:)?[0-9a-f]{48}", value) for value in found.values())
    assert file.stat().st_mode & 0o777 == 0o600
    again = subprocess.run(make, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "its secrets stay" in again.stderr
    assert file.read_text() == first


def test_the_environment_goes_before_the_file_and_the_file_is_no_program(tmp_path: Path) -> None:
    file = tmp_path / "secrets"
    file.write_text(f"PREFECT_AUTH=a:of-the-file\nMLFLOW_WORKER_PASSWORD=$(touch {tmp_path}/ran)\n")
    _, environment = noted(tmp_path, "worker", SECRETS=str(file), PREFECT_AUTH="a:given", MLFLOW_WORKER_PASSWORD="")
    assert environment["PREFECT_API_AUTH_STRING"] == "a:given"
    assert environment["MLFLOW_TRACKING_PASSWORD"] == f"$(touch {tmp_path}/ran)"
    assert not (tmp_path / "ran").exists()


def test_a_terminal_is_told_what_clients_need_and_nothing_of_the_servers(tmp_path: Path) -> None:
    odd = {"PREFECT_AUTH": "papo:it's $HOME `x`"}
    environment = {key: value for key, value in clean_environment().items() if key not in SECRETS}
    given = environment | {"SECRETS": "/nowhere"} | GIVEN | odd
    lines = subprocess.run([SERVE, "env"], env=given, capture_output=True, text=True, check=True).stdout
    done = subprocess.run(
        ["bash", "-c", f"{lines}\nenv -0"], env=environment, capture_output=True, text=True, check=True
    )
    told = dict(line.split("=", 1) for line in done.stdout.split("\0") if "=" in line)
    assert told["PREFECT_API_AUTH_STRING"] == odd["PREFECT_AUTH"]
    assert set(told) - set(environment) - {"_", "SHLVL", "PWD", "OLDPWD"} == {
        "PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "VLLM_API_KEY"
    }  # fmt: skip


def test_the_scripts_are_bash(tmp_path: Path) -> None:
    for script in (SERVE, SERVE.with_name("secrets")):
        assert os.access(script, os.X_OK)
        subprocess.run(["bash", "-n", script], check=True)


def test_the_preset_records_where_mlflow_is_served() -> None:
    params = load_params(ROOT / "params.yaml", preset=ROOT / "infra/presets/servers.yaml")
    assert params.tracking.uri == f"http://{services()['mlflow']['ports'][0].rsplit(':', 1)[0]}"


# ---- Kubernetes ----


def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    found = list(yaml.safe_load_all((KUBERNETES / "servers.yaml").read_text()))
    result = {(one["kind"], one["metadata"]["name"]): one for one in found}
    assert len(result) == len(found)
    return result


def pods() -> dict[str, dict[str, Any]]:
    """The spec of each pod of servers.yaml, and that of a flow run's, by the name of its container."""
    found = [
        one["spec"]["template"]["spec"]
        for one in manifests().values()
        if "template" in one["spec" if "spec" in one else "kind"]
    ]
    return {pod["containers"][0]["name"]: pod for pod in [*found, job()["spec"]["template"]["spec"]]}


def job(**values: Any) -> dict[str, Any]:
    """The job of a flow run, as Prefect fills in the template."""
    from prefect.utilities.templating import apply_values

    template = json.loads((KUBERNETES / "pool.json").read_text())
    defaults = {
        name: about["default"] for name, about in template["variables"]["properties"].items() if "default" in about
    }
    jsonschema.Draft202012Validator.check_schema(template["variables"])
    jsonschema.validate(values, template["variables"])
    filled = apply_values(template["job_configuration"], defaults | {"name": "run", "command": "prefect"} | values)
    found: dict[str, Any] = filled["job_manifest"]
    return found


def test_the_template_of_the_pool_leaves_no_placeholder_and_has_no_variable_too_many() -> None:
    from prefect.utilities.templating import find_placeholders

    template = json.loads((KUBERNETES / "pool.json").read_text())
    used = {one.name for one in find_placeholders(template["job_configuration"])}
    assert used == set(template["variables"]["properties"])
    assert not find_placeholders(job())


def test_prefect_takes_the_template_for_a_pool() -> None:
    from prefect.server.schemas.actions import WorkPoolCreate

    template = json.loads((KUBERNETES / "pool.json").read_text())
    WorkPoolCreate(name="papo-kubernetes", type="kubernetes", base_job_template=template)
    broken = json.loads(json.dumps(template).replace("{{ gpus }}", "{{ gpu }}"))
    with pytest.raises(ValueError, match="gpu"):
        WorkPoolCreate(name="papo-kubernetes", type="kubernetes", base_job_template=broken)


def test_a_flow_run_is_a_job_that_is_tried_once_with_a_gpu_and_the_checkout() -> None:
    made = job(gpus=2, checkout="mine", grace_s=300)
    assert (made["apiVersion"], made["kind"], made["spec"]["backoffLimit"]) == ("batch/v1", "Job", 0)
    pod = made["spec"]["template"]["spec"]
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 300)
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert container["workingDir"] == "/checkout"
    assert {"name": "checkout", "persistentVolumeClaim": {"claimName": "mine"}} in pod["volumes"]
    for wrong in ({"gpus": -1}, {"gpus": "two"}, {"image_pull_policy": "Sometimes"}, {"env": {"A": 1}}):
        with pytest.raises(jsonschema.ValidationError):
            job(**wrong)


def test_secrets_are_references_to_keys_that_the_file_of_secrets_has() -> None:
    seen = set()
    for name, pod in pods().items():
        for variable in pod["containers"][0]["env"]:
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                assert (reference["name"], reference["key"] in SECRETS) == ("papo", True), name
                seen.add(reference["key"])
            else:
                assert not re.search("PASSWORD$|AUTH_STRING$|API_KEY$|SERVER_SECRET_KEY$", variable["name"]), variable
    assert seen == set(SECRETS)
    (worker,) = pods()["papo-worker"]["containers"]
    handed = {one["name"]: one.get("value") for one in worker["env"]}
    prefix = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET"
    assert (handed[f"{prefix}_NAME"], handed[f"{prefix}_KEY"]) == ("papo", "PREFECT_AUTH")


def test_pods_start_what_containers_start_and_are_confined_as_these() -> None:
    found = pods()
    assert set(found) == {"postgres", "prefect", "mlflow", "mlflow-users", "papo-worker", "prefect-job"}
    for name, service in services(WORKER_USER="10001:10001").items():
        if name in ("policy", "judge"):
            continue
        (container,) = found["papo-worker" if name == "worker" else name]["containers"]
        assert container["image"] == service["image"]
        if name == "worker":
            continue  # another kind of pool
        assert container["args"] == service["command"]
        told = {one["name"]: one.get("value") for one in container["env"] if "valueFrom" not in one}
        same = {key: value for key, value in service["environment"].items() if key in told}
        assert told == same | {key: told[key] for key in ("PGDATA", "MLFLOW_SERVER_ALLOWED_HOSTS") if key in told}
    assert found["prefect-job"]["containers"][0]["image"] == found["papo-worker"]["containers"][0]["image"]
    for name, pod in found.items():
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"], name
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
        }  # fmt: skip
        assert container["resources"]["limits"]["memory"]
        assert (name == "papo-worker") == pod.get("automountServiceAccountToken", True), "only it asks Kubernetes"
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        claims = {"database"} if name == "postgres" else set()
        assert mounted == {volume["name"] for volume in pod["volumes"]} | claims
    assert found["postgres"]["securityContext"]["runAsUser"] == 999  # of the official image


def test_what_a_manifest_names_is_there() -> None:
    found = manifests()
    assert {one["metadata"]["namespace"] for one in found.values()} == {
        "papo",
    }
    made = {name for kind, name in found if kind == "PersistentVolumeClaim"}
    for name, pod in pods().items():
        for volume in pod["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in made, name
    for (kind, name), one in found.items():
        if kind == "Service":
            (owner,) = (
                other
                for other in found.values()
                if other["kind"] in ("Deployment", "StatefulSet") and other["metadata"]["name"] == name
            )
            assert owner["spec"]["template"]["metadata"]["labels"] == one["spec"]["selector"]
        if kind in ("Deployment", "StatefulSet"):
            assert one["spec"]["selector"]["matchLabels"] == one["spec"]["template"]["metadata"]["labels"]
    rules = found["Role", "papo-worker"]["rules"]
    assert {resource for rule in rules for resource in rule["resources"]} == {
        "jobs",
        "pods",
        "pods/log",
        "pods/status",
        "events",
    }
    assert (
        found["RoleBinding", "papo-worker"]["subjects"][0]["name"]
        == found["ServiceAccount", "papo-worker"]["metadata"]["name"]
    )


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_makes_the_objects_that_need_no_cluster(tmp_path: Path) -> None:
    secrets = tmp_path / ".env"
    secrets.write_text("".join(f"{name}={value}\n" for name, value in GIVEN.items()))
    command = [
        "kubectl",
        "create",
        "secret",
        "generic",
        "papo",
        f"--from-env-file={secrets}",
        "--dry-run=client",
        "--output=json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert set(json.loads(done.stdout)["data"]) == set(SECRETS)

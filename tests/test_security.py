"""What is trusted (params, code) and what is not (checkpoints, data sets, model output), held by tests; see docs/security.md."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from papo import paths
from papo.engines import policy as policies
from papo.engines.tracking import resolved, without_password
from papo.errors import CheckpointError, DataError, ParamsError, SetupError
from papo.params import Params, PathMark, TrackingParams, WarmstartParams, load_params, validate_params
from papo.paths import check_paths
from papo.secrets import secret_in, secrets_of, without_secrets

ROOT = Path(__file__).parents[1]
SECRETS = {
    "tracking.uri": "postgresql://papo:hunter2@host/mlflow",
    "prepare.source": "https://host/data.jsonl?token=hunter2",
    "score_prm.rubric": "sk-proj-hunter2hunter2hunter2",
    "report.title": "hf_hunter2hunter2hunter2hunter2",
    "warmstart.revision": "AKIAHUNTER2HUNTER2AA",
    "warmstart.checkpoint": "https://ghp_hunter2hunter2hunter2@github.com/me/it",
    "rollout.server.command": "vllm serve --api-key hunter2",
    "rollout.server.reload": "curl -H 'Authorization: Bearer hunter2hunter2' http://host/load",
    "rollout.server.options": "{hf-token: hunter2}",
    "rollout.vllm.options": "{hunter2: 1, auth_token: hunter2}",
    "prepare.eval_sources": "{ghp_hunter2hunter2hunter2: data.jsonl}",
}


# ---- secrets in params ----


@pytest.mark.parametrize("key", SECRETS)
@pytest.mark.parametrize("by", ["set", "preset", "file"])
def test_a_secret_in_a_param_is_refused_and_not_repeated(tmp_path: Path, key: str, by: str) -> None:
    value: Any = yaml.safe_load(SECRETS[key])
    for part in reversed(key.split(".")):
        value = {part: value}
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(value))
    ways: dict[str, dict[str, Any]] = {
        "set": {"base": ROOT / "params.yaml", "overrides": [f"{key}={SECRETS[key]}"]},
        "preset": {"base": ROOT / "params.yaml", "preset": tmp_path / "given.yaml"},
        "file": {"base": tmp_path / "given.yaml"},
    }
    with pytest.raises(ParamsError, match="looks like a secret") as caught:
        load_params(**ways[by])
    assert key in caught.value.what
    assert "hunter2" not in str(caught.value).lower()
    assert "environment variable" in caught.value.fix


@pytest.mark.parametrize("override", ["hf_hunter2hunter2hunter2", "report.title=[sk-hunter2hunter2hunter2"])
def test_nor_is_one_in_an_override_that_cannot_be_read(override: str) -> None:
    with pytest.raises(ParamsError) as caught:
        load_params(ROOT / "params.yaml", overrides=[override])
    assert "hunter2" not in str(caught.value)


def test_what_the_project_ships_holds_nothing_that_looks_like_a_secret() -> None:
    for path in (ROOT / "params.yaml", ROOT / "prefect.yaml", *(ROOT / "infra/presets").glob("*.yaml")):
        assert list(secrets_of(yaml.safe_load(path.read_text()))) == [], path


@pytest.mark.parametrize(
    "text",
    [
        "sk-learn-something-longer", "risk-1234567890123456", "https://host:8000/v1", "postgresql://host/db", "vllm serve --api-key $KEY",
        "curl -H 'Authorization: Bearer $VLLM_API_KEY' http://h", "openai/gsm8k", "a token of 128 words", "me@host.org", "max_tokens=3",
        "sqlite:////data/mlflow.db", "artifacts/warmstart@main",
    ],
)  # fmt: skip
def test_ordinary_values_are_no_secrets(text: str) -> None:
    assert secret_in(text) is None
    assert without_secrets(text) == text


def test_the_address_of_the_record_may_be_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolved(TrackingParams(uri="sqlite:///a.db")).uri == "sqlite:///a.db"
    monkeypatch.setenv("RECORD", "postgresql://papo:hunter2@host/mlflow")
    params = TrackingParams(uri_env="RECORD")
    assert resolved(params).uri == "postgresql://papo:hunter2@host/mlflow"
    assert "hunter2" not in json.dumps(params.model_dump())
    assert "hunter2" not in without_password("cannot reach postgresql://papo:hunter2@host/mlflow?password=hunter2")
    monkeypatch.delenv("RECORD")
    with pytest.raises(SetupError, match="RECORD holds no address"):
        resolved(params)


# ---- paths in params ----

NO_PATHS = {
    "split", "subset", "revision", "prompt", "eval_split", "prompt_template", "answer", "reference_solution", "tier", "pass_rate",
    "model", "reload", "command", "options", "devices", "python", "image", "base_url", "base_urls",
    "api_key_env", "benchmarks", "choose_on", "address",
    "attention", "targets", "title", "uri_env", "experiment", "trust_code", "prices",
}  # fmt: skip
"""Texts that are no files of a run: names, templates, addresses, and the commands and interpreters that a person trusts."""


def texts(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, field) of every param that may be a text."""
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *paths._marks(field.annotation)]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from texts(kind, f"{prefix}{name}.")
        if str in kinds:
            yield f"{prefix}{name}", field


def test_every_param_that_is_a_text_is_a_path_or_known_to_be_none() -> None:
    found = dict(texts(Params))
    marked = {
        key
        for key, field in found.items()
        if any(isinstance(mark, PathMark) for mark in (*field.metadata, *paths._marks(field.annotation)))
    }
    assert marked >= {
        "prepare.source", "prepare.eval_sources.source", "warmstart.checkpoint", "score_prm.rubric", "score_prm.store", "tracking.uri",
    }  # fmt: skip
    left = {key for key in found if key not in marked and key.split(".")[-1] not in NO_PATHS}
    # Their keys are names; `Name` says what such a name may be.
    assert left == {"prepare.sums.eval", "prepare.programs.eval", "prepare.eval_sources"}, (
        "mark it as ProjectPath, or name it in NO_PATHS"
    )


def given(**values: Any) -> Params:
    sections: dict[str, Any] = {}
    for key, value in values.items():
        section, name = key.split("__")
        sections.setdefault(section, {})[name] = value
    return validate_params(sections, origin="test")


PATHS: dict[str, Callable[[str], Params]] = {
    "prepare.source": lambda path: given(prepare__source=path, evaluate__benchmarks=["holdout"], prepare__holdout=1),
    "prepare.eval_sources.mine.source": lambda path: given(prepare__eval_sources={"mine": path}),
    "warmstart.checkpoint": lambda path: given(warmstart__checkpoint=path),
    "score_prm.rubric": lambda path: given(score_prm__rubric=path),
    "score_prm.store": lambda path: given(score_prm__store=path),
    "tracking.uri": lambda path: given(tracking__uri=f"sqlite:///{path}"),
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (folder / "link").symlink_to(tmp_path / "outside")
    monkeypatch.chdir(folder)
    monkeypatch.delenv(paths.ALLOWED, raising=False)
    return folder


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("path", ["/etc/passwd", "../outside/x", "data/../../outside/x", "~/x", "link/x"])
def test_a_path_may_not_leave_the_project(project: Path, key: str, path: str) -> None:
    params = PATHS[key](path)
    with pytest.raises(ParamsError, match="outside of the project") as caught:
        check_paths(params, project)
    assert f"  - {key}: " in caught.value.what
    assert caught.value.exit_code == 2
    check_paths(params, project, overrides=[f"{key}={path}"])  # a person named it
    with pytest.raises(ParamsError):
        check_paths(params, project, overrides=["report.title=x"])


@pytest.mark.parametrize("key", PATHS)
def test_a_path_within_the_project_the_workspace_or_what_is_allowed_may_be_used(
    project: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = project.parent / "outside"
    for path in ("data/x.jsonl", str(project / "x"), "openai/gsm8k", "levels", "data/../x"):
        check_paths(PATHS[key](path), project)
    check_paths(PATHS[key](str(outside / "x")), outside)
    monkeypatch.setenv(paths.ALLOWED, f"/nowhere:{outside}")
    check_paths(PATHS[key](str(outside / "x")), project)
    check_paths(PATHS[key]("link/x"), project)
    with pytest.raises(ParamsError):
        check_paths(PATHS[key]("/nowhere-else"), project)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "postgresql://host/db", "databricks", "sqlite:///mlflow.db"])
def test_a_server_is_no_path(project: Path, uri: str) -> None:
    check_paths(given(tracking__uri=uri), project)


@pytest.mark.parametrize("uri", ["file:///etc/mlruns", "/etc/mlruns", "sqlite+pysqlite:////etc/a.db"])
def test_a_file_is_one_in_each_form_of_its_address(project: Path, uri: str) -> None:
    with pytest.raises(ParamsError):
        check_paths(given(tracking__uri=uri), project)


def test_the_commands_hold_to_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from papo.cli import main

    (project / "params.yaml").write_text(
        yaml.safe_dump({"prepare": {"source": "/etc/passwd", "holdout": 4}, "evaluate": {"benchmarks": ["holdout"]}})
    )
    assert main(["prepare"]) == 2
    assert "prepare.source: /etc/passwd" in capsys.readouterr().err
    assert not (project / "data/problems").exists()


@pytest.mark.parametrize(
    "name", ["../../evil", "a/b", "/etc/evil", ".hidden", "", "a\nb", "x" * 101, "a b", "\u202eabc"]
)
@pytest.mark.parametrize("where", ["eval_sources", "sums", "programs"])
def test_a_benchmark_is_no_path(name: str, where: str) -> None:
    values: dict[str, Any] = {"eval_sources": {name: "data.jsonl"}}
    if where == "sums":
        values = {"sums": {"eval": {name: {"min_terms": 2, "max_terms": 2, "problems": 1}}}}
    if where == "programs":
        values = {"programs": {"eval": {name: {"min_operations": 2, "max_operations": 2, "problems": 1}}}}
    with pytest.raises(ParamsError):
        validate_params({"prepare": values}, origin="test")


# ---- nothing that is loaded is run ----

MAY = {
    ("papo/engines/in_sandbox.py", "exec"): "runs a model's program, inside of the sandbox",
    (
        "papo/engines/judges/rubrics.py",
        "yaml.load",
    ): "with a safe loader of its own, which also refuses a key that stands twice",
    ("papo/engines/in_sandbox.py", "compile"): "what the line before is about",
    **{
        (
            "flows/spread.py",
            name,
        ): "chunks of this run, which it hands to its own cluster; Ray pickles what it sends anyway"
        for name in ("import pickle", "pickle.dumps", "pickle.loads")
    },
}
LOADS = re.compile(
    r"^(?:(?:c?[pP]ickle|dill|joblib|cloudpickle|shelve|marshal)\.\w+|torch\.(?:load|save|jit\.load|hub\.load)|(?:np|numpy)\.(?:load|fromfile)"
    r"|yaml\.(?:load|unsafe_load|full_load|load_all)|eval|exec|compile|__import__|os\.(?:system|popen)|pd\.read_pickle)$"
)


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def sources() -> list[Path]:
    return sorted(path for folder in ("papo", "flows") for path in (ROOT / folder).rglob("*.py"))


def offences(tree: ast.AST) -> set[str]:
    """Names of calls that read or make a pickle or run a text, imports of what does, and settings that let others do so."""
    found = {name for name, _ in calls(tree) if LOADS.match(name)}
    for name, call in calls(tree):
        for word in call.keywords:
            on = not (isinstance(word.value, ast.Constant) and word.value.value is False)
            if word.arg in ("allow_pickle", "shell") and on:
                found.add(f"{name}({word.arg})")
            if word.arg == "use_safetensors" and not (
                isinstance(word.value, ast.Constant) and word.value.value is True
            ):
                found.add(f"{name}(use_safetensors)")
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        found |= {
            f"import {name}"
            for name in names
            if name.split(".")[0] in ("pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal")
        }
    return found


def test_no_pickle_is_read_or_written_and_no_text_is_run() -> None:
    found = {
        (str(path.relative_to(ROOT)), name) for path in sources() for name in offences(ast.parse(path.read_text()))
    }
    assert found <= MAY.keys() | SHELLS.keys()
    assert MAY.keys() <= found, "an entry of the list is not needed any more"


SHELLS = {
    (
        "papo/engines/serving.py",
        "subprocess.Popen(shell)",
    ): "rollout.server.reload is a shell command of the params, which are trusted"
}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from cloudpickle import loads", "torch.load(path)", "torch.save(x, path)", "numpy.load(p)", "yaml.load(t)",
        "eval(text)", "np.load(path, allow_pickle=True)", "M.from_pretrained(n, use_safetensors=False)", "subprocess.run(c, shell=True)",
    ],
)  # fmt: skip
def test_each_way_to_do_so_is_found(code: str) -> None:
    assert offences(ast.parse(code))


def test_whatever_is_loaded_by_name_says_whether_its_code_runs() -> None:
    for path in sources():
        for name, call in calls(ast.parse(path.read_text())):
            if name.endswith(".from_pretrained"):
                words = {word.arg for word in call.keywords}
                assert None in words or "trust_remote_code" in words, f"{path}: {ast.unparse(call)}"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A whole small policy."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from papo.engines.tokenizer import build_tokenizer

    folder = tmp_path / "checkpoint"
    tokenizer = build_tokenizer(sorted("0123456789+-=? "))
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def take(checkpoint: Path, out: Path) -> None:
    from papo.engines.warmstart import make_warm_starter

    out.mkdir()
    make_warm_starter(WarmstartParams(checkpoint=str(checkpoint))).fit([], out, lambda done: None)


def test_pickled_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    weights = checkpoint / "model.safetensors"
    torch.save(load_file(weights), checkpoint / "pytorch_model.bin")
    take(checkpoint, tmp_path / "both")  # the safetensors are read
    assert not list((tmp_path / "both").glob("*.bin"))
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"the weights are pickled \(pytorch_model.bin\)") as caught:
        take(checkpoint, tmp_path / "pickled")
    assert "save_pretrained" in caught.value.fix


RAN = "ran.txt"
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

(Path(__file__).parent / "ran.txt").write_text("x")
Path({marker!r}).write_text("ran")


class OwnConfig(LlamaConfig):
    model_type = "own-of-this-test"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint, with Python code that it cannot be loaded without; the code leaves a file."""
    (checkpoint / "own.py").write_text(CODE.format(marker=str(tmp_path / RAN)))
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {
        "model_type": "own-of-this-test",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv(policies.TRUSTED, "")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return checkpoint


def test_code_of_a_checkpoint_does_not_run_unless_it_is_allowed_by_name(own_code: Path, tmp_path: Path) -> None:
    for number, names in enumerate([[], ["other"], [f"{own_code}x"], [own_code.name]]):
        policies.allow_code(names)
        with pytest.raises(CheckpointError, match="needs Python code of its own") as caught:
            take(own_code, tmp_path / f"refused-{number}")
        assert f"warmstart.trust_code: [{own_code}" in caught.value.fix
    assert not (tmp_path / RAN).exists()


def test_allowed_code_goes_with_the_policy_and_no_other_is_run(own_code: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    policies.allow_code([str(own_code)])
    take(own_code, taken)
    assert (tmp_path / RAN).exists()
    model, _ = policies.load_policy(taken, device="cpu")
    assert type(model).__name__ == "OwnModel"
    policies.allow_code([])
    with pytest.raises(CheckpointError, match="needs Python code of its own"):
        policies.load_policy(taken)
    policies.allow_code([str(own_code)])
    (taken / "own.py").write_text((taken / "own.py").read_text() + "\n# other code\n")
    with pytest.raises(CheckpointError, match="needs Python code of its own"):
        policies.load_policy(taken)


def test_a_model_of_the_hub_is_allowed_at_one_revision_only(monkeypatch: pytest.MonkeyPatch) -> None:
    policies.allow_code(["org/model@abc", "org/other"])
    allowed = [
        ("org/model", "abc"),
        ("org/model", "abd"),
        ("org/model", None),
        ("org/other", None),
        ("org/other", "abc"),
    ]
    assert [policies._runs_code(*one) for one in allowed] == [True, False, False, False, False]
    monkeypatch.setenv(policies.TRUSTED, "")


@pytest.mark.parametrize(
    "override",
    [
        "rollout.vllm.options={trust_remote_code: true}",
        "rollout.server.options={trust-remote-code: true}",
        "rollout.server.command=vllm serve --trust-remote-code",
    ],
)
def test_vllm_runs_no_code_of_a_checkpoint_either(override: str) -> None:
    with pytest.raises(ParamsError, match=r"only if warmstart\.trust_code names it"):
        load_params(ROOT / "params.yaml", overrides=[override])
    load_params(ROOT / "params.yaml", overrides=[override, "warmstart.trust_code=[org/model@abc]"])


def test_a_data_set_that_is_a_program_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from papo.engines.sources.rows import read_rows

    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "dataset.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / RAN)!r}).write_text('ran')\n")
    monkeypatch.chdir(tmp_path)
    for source in (str(folder), "dataset", str(folder / "dataset.py")):
        with pytest.raises(DataError, match=r"cannot be loaded|needs Python code"):
            read_rows(source, split="train")
    assert not (tmp_path / RAN).exists()


# ---- what is shown ----


def test_the_page_shows_texts_as_texts() -> None:
    from papo.engines.reporting import page

    sources = [path.read_text() for path in Path(page.__file__).parent.glob("*.j2")]
    assert len(sources) >= 3
    found = [text for source in sources for text in re.findall(r"\{\{[^}]*\|\s*safe", source)]
    assert set(found) == {"{{ svg | safe"}  # drawn by papo, of numbers
    assert not any("autoescape" in source for source in sources)
    assert "autoescape=True" in Path(page.__file__).read_text()
    assert all(
        "default-src 'none'" in source for source in sources if "<html" in source
    )  # were a text markup, no browser would run it


EVIL = "[/] [red] \x1b[2J | <script>alert(1)</script>\n| new row |"


def test_a_tier_of_a_data_set_is_a_text_in_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    from flows.show import _table as markdown
    from papo.console import _output, _table

    rows = [{"benchmark": "b", "tier": EVIL, "accuracy": "1 %"}]
    _output().print(_table(rows))
    shown = capsys.readouterr().out
    assert "[/] [red]" in shown
    assert "\x1b" not in shown
    lines = markdown(rows).splitlines()
    assert len(lines) == 3
    assert "<script>" not in lines[2]
    assert len(re.findall(r"(?<!\\)\|", lines[2])) == 4


def test_lines_of_the_log_cannot_steer_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    from papo.console import configure_logging, log

    configure_logging()
    log.warning("a reply said: %s", "\x1b[2J\x1b]0;title\x07 \r12:00:00 INFO all is well\x9b31m \u202e\nsecond line")
    shown = capfd.readouterr().err
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown)
    assert "all is well" in shown
    assert [line[:2] for line in shown.splitlines()[1:]] == ["  "]  # no line of its own


def test_servers_are_bound_to_this_machine() -> None:
    from papo.cli import _parser

    assert _parser().parse_args(["serve-policy"]).host == "127.0.0.1"
    everywhere = {
        str(path.relative_to(ROOT))
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::")
    }
    assert everywhere <= {"papo/engines/serving.py"}  # where the address of a server that a person bound so is shown


# ---- what is installed ----


def named(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;#]", requirement.strip(), maxsplit=1)[0]).lower()


def test_the_lock_pins_all_that_the_project_asks_for() -> None:
    lines = [
        line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", line)] == []
    locked = [named(line) for line in lines]
    assert len(locked) == len(set(locked))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {named(one) for group in (project["dependencies"], *extras.values()) for one in group}
    built = {"papo", *map(named, extras["deepspeed"])}  # itself, and what pyproject.toml says is not in the lock
    optional = set(map(named, extras["optimizer-8bit"]))
    assert wanted - built - optional <= set(locked)

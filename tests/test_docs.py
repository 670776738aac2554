"""The commands of README and docs by the test that runs each, and their results. What else pages say is tested in test_pages.py."""

from __future__ import annotations

import ast
import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT, blocks, commands, pages

from papo.ablations.markdown import as_markdown

# Each command of papo by the test that runs it; what a page writes behind it is parsed, and its params are loaded.
OF_PAPO = {
    "run": "test_ahead.py::test_a_run_gives_the_same_tables_with_and_without_overlap",
    "params": "test_cli.py::test_params_prints_what_is_in_force",
    "prepare": "test_cli.py::test_a_stage_says_when_it_had_been_done_before",
    "advantage": "test_cli.py::test_compare_shows_every_variant_and_writes_nothing",
    "evaluate": "test_session.py::test_policies_compared_by_hand",
    "pass-rates": "test_session.py::test_pass_rates_of_a_reference_policy",
    "explain": "test_cli.py::test_explain_shows_scores_reasons_and_texts",
    "alarms": "test_session.py::test_alarms_of_a_workspace",
    "calibrate-judge": "test_calibration.py::test_the_command_shows_tables_and_where_the_rows_are",
    "judge-cache": "test_cli.py::test_stored_verdicts_are_counted_copied_and_verified",
    "serve-policy": "test_cli.py::test_a_policy_is_served_beside_a_run_until_ctrl_c",
    "track": "test_cli.py::test_what_waits_for_mlflow_is_shown_and_delivered",
    "cost": "core/test_cost_model.py::test_the_command_writes_and_reads_rates_and_says_what_it_does_not_know",
    "lineage": "lineage/test_record.py::test_a_killed_run_is_on_record_as_killed_and_then_as_finished",
    "diff": "lineage/test_reproduce.py::test_two_runs_with_two_rubrics_differ_from_the_judge_on_and_one_is_made_again_without_a_call",
    "reproduce": "lineage/test_reproduce.py::test_a_run_is_made_again_from_its_commit_and_what_differed_from_it",
    "ablate": "ablations/test_work.py::test_a_person_runs_a_plan_kills_it_and_goes_on",
}
# What is no command of papo: how it begins, and the test that runs it; or why none does, in words.
OTHERS = {
    "make test": "CI is made of it",
    "make demo": "test_learning.py",
    "make audit": "asks a server that CI does not reach",
    "make test-vllm": "takes an environment of 3.5 GB",
    "dvc repro": "test_dvc.py::test_a_second_repro_runs_nothing",
    "dvc params diff": "test_dvc.py::test_metrics_params_and_plots_say_something",
    "dvc metrics diff": "test_dvc.py::test_metrics_params_and_plots_say_something",
    "dvc plots show": "test_dvc.py::test_metrics_params_and_plots_say_something",
    "dvc remote add": "test_dvc.py::test_a_remote_is_one_command_away",
    "dvc push": "test_dvc.py::test_a_remote_is_one_command_away",
    "mlflow ui": "test_servers.py, by its other name, mlflow server",
    "prefect deployment run papo/train-eval": "flows/test_deployments.py::test_train_eval_runs_in_the_checkout",
    "prefect deployment run papo/nightly-ablations": "flows/test_deployments.py::test_the_ablations_are_scheduled_every_night_and_complete",
    "prefect deployment run papo/evaluate": "flows/test_deployments.py::test_the_flow_has_its_deployments",
    "prefect deploy": "flows/test_deployments.py::test_the_flow_has_its_deployments",
    "prefect server start": "flows/test_deployments.py",
    "prefect worker start --pool papo": "flows/test_deployments.py",
    "python -m flows.setup": "flows/test_deployments.py::test_the_flow_has_its_deployments",
    "python -m flows.pipeline": "flows/test_spread.py::test_a_run_scored_by_ray_is_the_run_of_one_process",
    "python -m flows.pause": "test_watch.py",
    "python infra/docs/publish.py": "test_docs.py::test_results_are_published_as_they_were_measured",
    "python tests/": "a benchmark, or the table of a page: its options are looked up",
    "pytest": "its files are there",
    "infra/judge/serve": "test_judge_server.py::test_the_default_judge_is_started_by_its_revision_and_ends_with_the_script",
    "infra/servers/secrets": "test_servers_infra.py::test_secrets_are_made_once_and_only_their_owner_reads_them",
    "infra/servers/serve": "test_servers.py",
    "ray start": "flows/test_spread.py, by its function of the same name",
    "docker compose": "test_servers_infra.py::test_a_container_starts_as_the_script_starts_it",
    "kubectl": "test_servers_infra.py::test_kubectl_makes_the_objects_that_need_no_cluster",
    "pg_dump": "test_servers.py::test_a_dump_holds_the_record",
    "pg_restore": "test_servers.py::test_a_dump_holds_the_record",
    "systemctl": "a machine of a cluster",
    "systemd-run": "a machine of a cluster",
    "exec": "the shell's own",
    "export": "the shell's own",
    "cd": "the shell's own",
    "bash -c": "the shell's own",
    "pip install": "downloads",
    "python3 -m venv": "downloads",
    "hf download": "downloads",
    "eval": "test_servers_infra.py::test_a_terminal_is_told_what_clients_need_and_nothing_of_the_servers",
}


def test_every_command_of_the_pages_is_one_that_a_test_runs() -> None:
    wrong, used = [], set()
    for command in (one for page in pages(commands=True) for block in blocks(page) for one in commands(block)):
        row = row_of(command.words)
        if row is None:
            wrong.append(f"{command.page}:{command.line}: {shlex.join(command.words)}")
        used.add(row)
    assert not wrong, "name the test that runs it at the top of this file, or why none does:\n" + "\n".join(wrong)
    assert used == OF_PAPO.keys() | OTHERS.keys(), "rows that no page needs"


def row_of(words: tuple[str, ...]) -> str | None:
    """The key of a table that stands for a command."""
    if words[0] == "papo":
        return words[1] if words[1] in OF_PAPO else None
    text = " ".join(Path(word).name if word.startswith(".venv") else word for word in words)
    return max(
        (row for row in OTHERS if f"{text} ".startswith(row if row.endswith("/") else f"{row} ")), key=len, default=None
    )


@pytest.mark.parametrize("row", [*OF_PAPO.values(), *(value for value in OTHERS.values() if ".py" in value)])
def test_the_test_that_runs_a_command_is_there(row: str) -> None:
    file, _, name = row.split(",")[0].partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert not name or name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_command_that_nothing_runs_is_seen() -> None:
    assert row_of(("papo", "fly")) is None
    assert row_of(("make", "coffee")) is None
    assert row_of(("python", "tests/benchmarks/bench_judge.py")) == "python tests/"


# ---- results ----


@pytest.fixture(scope="module")
def publish() -> Any:
    spec = importlib.util.spec_from_file_location("publish", ROOT / "infra/docs/publish.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_are_published_as_they_were_measured(publish: Any) -> None:
    contents = publish.published()
    assert {"claims", "judge-noise"} <= {content["plan"] for content in contents}
    for content in contents:
        assert (ROOT / f"docs/results/{content['plan']}.md").read_text() == as_markdown(content, content["plan"])
        for plot in content["plots"]:
            assert (ROOT / f"docs/results/{content['plan']}/{plot['name']}.svg").is_file()
    for page, folder in (("docs/results.md", "results"), ("README.md", "docs/results")):
        text = (ROOT / page).read_text()
        assert publish.BEGIN in text
        assert publish.with_claims(text, contents, folder) == text


def test_a_report_is_published(publish: Any, tmp_path: Path) -> None:
    report = tmp_path / "report"
    (report / "plots").mkdir(parents=True)
    content = json.loads((ROOT / "docs/results/claims.json").read_text())
    for plot in content["plots"]:
        (report / f"plots/{plot['name']}.svg").write_text("<svg/>")
    (report / "results.json").write_text(json.dumps(content))
    (tmp_path / "docs").mkdir()
    for page in ("docs/results.md", "README.md"):
        (tmp_path / page).write_text(f"before\n{publish.BEGIN}\nof yesterday\n{publish.END}\nafter\n")
    publish.main([str(report)], tmp_path)
    told = (tmp_path / "README.md").read_text()
    assert told.startswith("before\n")
    assert told.endswith("after\n")
    assert "of yesterday" not in told
    assert "| 1. PAPO ends above ORM |" in told
    assert "[claims](docs/results/claims.md)" in told

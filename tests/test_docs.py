"""README and docs: links, paths, tables, and every command in them, which a test runs or which the table here says why not."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from papo import cli
from papo.ablations.markdown import as_markdown
from papo.ablations.plan import Plan, expand, read_plan
from papo.params import Params, load_params

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "infra").rglob("README.md"))]
MADE = [ROOT / "CHANGELOG.md", *sorted((ROOT / "docs/results").glob("*.md"))]

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
    "pip install": "downloads",
    "python3 -m venv": "downloads",
    "hf download": "downloads",
    "eval": "test_servers_infra.py::test_a_terminal_is_told_what_clients_need_and_nothing_of_the_servers",
}
PROGRAMS = ("papo", "make", "dvc", "mlflow", "prefect", "python", "python3", "pytest", "ray", "docker", "kubectl", "pip", "export",
            "infra/judge/serve", "infra/servers/serve", "infra/servers/secrets")  # fmt: skip
ASSIGNED = re.compile(r"^[A-Z_]+=\S*$")


@dataclass(frozen=True)
class Block:
    """A block of code: the page, its first line, and its text without indentation."""

    page: Path
    line: int
    text: str

    @property
    def commands(self) -> bool:
        words = [word for word in self.text.split() if not ASSIGNED.match(word)]
        return bool(words) and words[0] in PROGRAMS and not re.match(r"\w+: ", self.text)


@dataclass(frozen=True)
class Command:
    where: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)


def blocks(page: Path) -> Iterator[Block]:
    """Those that are indented by four spaces after an empty line, each up to the next one, and those between fences."""
    lines = page.read_text().splitlines()
    number = 0
    while number < len(lines):
        first = number
        if lines[number].startswith("```"):
            number += 1
            while not lines[number].startswith("```"):
                number += 1
            yield Block(page, first + 2, "\n".join(lines[first + 1 : number]))
        elif lines[number].startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            while number < len(lines) and lines[number].startswith("    "):
                number += 1
            yield Block(page, first + 1, "\n".join(line[4:] for line in lines[first:number]).rstrip())
            number -= 1
        number += 1


def commands() -> list[Command]:
    """Those of all pages: lines are joined at a backslash, split at `;` and `&&`, and lose comments and variables before them."""
    found = []
    for page in PAGES:
        for block in (one for one in blocks(page) if one.commands):
            for offset, line in enumerate(re.sub(r"\\\n\s*", " ", block.text).splitlines()):
                lexer = shlex.shlex(line, posix=True, punctuation_chars=";&")
                lexer.whitespace_split, lexer.commenters = True, "#"
                words: list[str] = []
                for word in [*lexer, ";"]:
                    if word not in (";", "&&"):
                        words.append(word)
                        continue
                    while words and ASSIGNED.match(words[0]):
                        words.pop(0)
                    if words and words[0] != "export" and words != ["..."]:
                        found.append(Command(f"{page.relative_to(ROOT)}:{block.line + offset}", tuple(words)))
                    words = []
    return found


def test_every_command_is_one_that_a_test_runs_and_is_written_as_it_is_today(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parser, wrong, used = cli._parser(), [], set()
    for command in commands():
        try:
            if command.words[0] == "papo":
                used.add(command.words[1])
                _papo(parser, command.words[1:])
            elif " ".join(command.words[:3]) == "prefect deployment run":
                _deployment(command.words[3:])
            else:
                used.add(_other(command))
        except (AssertionError, Exception, SystemExit) as error:
            wrong.append(f"{command.where}: {command}: {type(error).__name__} {error}")
    assert not wrong, "correct the page, or the table at the top of this file:\n" + "\n".join(wrong)
    assert used == OF_PAPO.keys() | OTHERS.keys(), "rows of the tables that no page needs"


def _papo(parser: object, words: tuple[str, ...]) -> None:
    assert words[0] in OF_PAPO, "no test is named that runs it"
    words = tuple(word for word in words if word != "...")
    options = parser.parse_args(words)  # type: ignore[attr-defined]
    if words[0] == "ablate":
        expand(read_plan(options.plan), overrides=options.overrides)
    elif words[0] not in ("lineage", "diff", "reproduce"):
        preset = getattr(options, "preset", None)
        _load(preset, getattr(options, "overrides", []))


def _load(preset: str | None, overrides: list[str]) -> Params:
    return load_params(preset=preset, overrides=overrides)


def _deployment(words: tuple[str, ...]) -> None:
    from flows.ablations import nightly_ablations
    from flows.evaluate import evaluate
    from flows.pipeline import train_eval

    flows = {"train-eval": train_eval, "nightly-ablations": nightly_ablations, "evaluate": evaluate}
    flow, name = words[0].split("/")
    assert flow == "papo"
    assert name in {one["name"] for one in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
    given = [words[number + 1].split("=", 1) for number, word in enumerate(words) if word == "--param"]
    flows[name].validate_parameters({key: _plain(value) for key, value in given})
    unknown = {key for key, _ in given} - flows[name].parameters.properties.keys()
    assert not unknown, f"no parameters of {name}: {unknown}"


def _plain(value: str) -> object:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _other(command: Command) -> str:
    words = [Path(word).name if word.startswith(".venv") else word for word in command.words]
    text = " ".join(words)
    found = max((row for row in OTHERS if text == row or text.startswith((f"{row} ", row if row.endswith("/") else "\0"))), key=len,
                default=None)  # fmt: skip
    assert found is not None, "no test is named that runs it, and no reason why none does"
    if words[0] == "make":
        assert (
            subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, check=False).returncode
            == 0
        )
    elif words[0] == "python":
        file = ROOT / (f"{words[2].replace('.', '/')}.py" if words[1] == "-m" else words[1])
        _options(file, [word for word in words[2:] if word.startswith("--")])
    elif words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    elif words[0].startswith("infra/"):
        assert (ROOT / words[0]).is_file()
    return found


def _options(file: Path, options: list[str]) -> None:
    text = file.read_text()
    shared = (ROOT / "papo/cli.py").read_text() if file.parent.name == "flows" else ""
    for option in options:
        assert f'"{option}"' in text + shared, f"{file.name} has no option {option}"


@pytest.mark.parametrize(
    "row", [*OF_PAPO.values(), *(value for value in OTHERS.values() if value.startswith(("test_", "flows/")))]
)
def test_the_test_that_runs_a_command_is_there(row: str) -> None:
    file, _, name = row.split(",")[0].partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert not name or name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_what_is_wrong_with_a_command_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parser = cli._parser()
    for words in ("run --set advantage.lambda=1", "run --preset none", "run --often", "ablate none", "fly"):
        with pytest.raises((Exception, SystemExit, AssertionError)):
            _papo(parser, tuple(words.split()))
    for words in ("papo/none", "papo/evaluate --param policies=final", "papo/train-eval --param rounds=many"):
        with pytest.raises((Exception, AssertionError)):
            _deployment(tuple(words.split()))
    for words in ("make coffee", "python tests/benchmarks/bench_none.py", "python -m flows.setup --nothing", "curl x"):
        with pytest.raises((Exception, AssertionError)):
            _other(Command("here", tuple(words.split())))


# ---- links and paths ----


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, *MADE], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_paths_are_there(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            anchors = [slug(heading) for heading in re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)]
            assert anchor in anchors, f"{page.name}: {target}"
    for path in re.findall(r"`((?:papo|docs|tests|infra|flows)/[\w./*-]+)`", text):
        elsewhere = path == "infra/.env" or path.startswith(
            ("papo/train-eval", "papo/evaluate", "papo/nightly-ablations")
        )
        assert elsewhere or any(ROOT.glob(path.rstrip("/"))), f"{page.name}: {path}"


def test_python_and_plans_in_pages_are_valid() -> None:
    plans = 0
    for page in PAGES:
        for block in blocks(page):
            if re.match(r"(from|import) ", block.text):
                ast.parse(block.text)
            elif block.text.startswith("title: "):
                Plan.model_validate(yaml.safe_load(block.text))
                plans += 1
    assert plans >= 1


# ---- the site ----


class Seen(HTMLParser):
    """What a page asks for, and the text of its paragraphs."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.paragraphs: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "link", "iframe"):
            self.asked.append(given.get("src") or given.get("href") or "")
        if tag == "p":
            self._inside = True
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.paragraphs[-1] += data


def test_the_site_is_built_without_a_warning_and_asks_for_nothing_elsewhere(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= 20
    for page in pages:
        seen = Seen()
        seen.feed(page.read_text())
        assert not [address for address in seen.asked if address.startswith(("http", "//"))], page
        # A list or a table right after a paragraph is one on GitHub, and text here.
        swallowed = [text for text in seen.paragraphs if re.search(r"^(- |\d+\. |\|)", text, re.MULTILINE)]
        assert not swallowed, f"{page.name}: {swallowed[0][:200]}"


# ---- results ----


def _publish() -> object:
    spec = importlib.util.spec_from_file_location("publish", ROOT / "infra/docs/publish.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_are_published_as_they_were_measured() -> None:
    publish = _publish()
    contents = publish.published()  # type: ignore[attr-defined]
    assert {"claims", "judge-noise"} <= {content["plan"] for content in contents}
    for content in contents:
        assert (ROOT / f"docs/results/{content['plan']}.md").read_text() == as_markdown(content, content["plan"])
        for plot in content["plots"]:
            assert (ROOT / f"docs/results/{content['plan']}/{plot['name']}.svg").is_file()
    for page, folder in ((ROOT / "docs/results.md", "results"), (ROOT / "README.md", "docs/results")):
        text = page.read_text()
        assert publish.BEGIN in text
        assert publish.with_claims(text, contents, folder) == text  # type: ignore[attr-defined]


def test_a_report_is_published(tmp_path: Path) -> None:
    publish = _publish()
    report = tmp_path / "report"
    (report / "plots").mkdir(parents=True)
    content = json.loads((ROOT / "docs/results/claims.json").read_text())
    for plot in content["plots"]:
        (report / f"plots/{plot['name']}.svg").write_text("<svg/>")
    (report / "results.json").write_text(json.dumps(content))
    (tmp_path / "docs").mkdir()
    for page in ("docs/results.md", "README.md"):
        (tmp_path / page).write_text(f"before\n{publish.BEGIN}\nold\n{publish.END}\nafter\n")  # type: ignore[attr-defined]
    publish.main([str(report)], tmp_path)  # type: ignore[attr-defined]
    told = (tmp_path / "README.md").read_text()
    assert told.startswith("before\n")
    assert told.endswith("after\n")
    assert "old" not in told
    assert "| 1. PAPO ends above ORM |" in told
    assert "[claims](docs/results/claims.md)" in told

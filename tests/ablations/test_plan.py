"""Plans: what they expand to, what they share, and what is wrong with a bad one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ablations.made import plan
from pydantic import ValidationError

from papo.ablations.plan import PLANS, expand, pairs, read_plan
from papo.errors import ParamsError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path.stem for path in (ROOT / PLANS).glob("*.yaml"))


@pytest.fixture(autouse=True)
def _here(checkout: Path) -> None:
    """In a folder with a params.yaml."""


def test_arms_are_every_label_with_every_other() -> None:
    assert [arm.name for arm in plan().arms] == ["orm, steps", "orm, gullible", "papo, steps", "papo, gullible"]


def test_arms_that_come_to_the_same_run_share_it() -> None:
    runs = expand(plan(seeds=[3, 5]))
    assert [(run.name, [arm.name for arm in run.arms]) for run in runs[:3]] == [
        ("orm-steps-seed3", ["orm, steps", "orm, gullible"]),  # which asks no judge
        ("papo-steps-seed3", ["papo, steps"]),
        ("papo-gullible-seed3", ["papo, gullible"]),
    ]
    assert {run.seed for run in runs} == {3, 5}
    assert len({run.lineage for run in runs}) == 6
    assert len({run.start for run in runs}) == 1  # one warm start for all
    assert all(run.params.run.seed == run.seed for run in runs)


def test_the_guard_makes_no_run_of_its_own_where_the_judge_has_no_weight() -> None:
    axes = {"advantage.lam": [0, 2], "advantage.guard": ["none", "rank"]}
    runs = expand(plan(base={"advantage.variant": "papo"}, axes=axes, compare=[], seeds=1))
    assert [[arm.name for arm in run.arms] for run in runs] == [
        ["lam 0, guard none", "lam 0, guard rank"],
        ["lam 2, guard none"],
        ["lam 2, guard rank"],
    ]


def test_what_has_another_warm_start_does_not_share_it() -> None:
    sizes = {"small": {"warmstart.steps": 2}, "large": {"warmstart.steps": 3}}
    assert len({run.start for run in expand(plan(axes={"size": sizes}, compare=[]))}) == 2


def test_values_of_one_param_are_labels() -> None:
    found = plan(axes={"advantage.lam": [0, 0.5], "rollout.group_size": [4]}, compare=[])
    assert [arm.name for arm in found.arms] == ["lam 0, group_size 4", "lam 0.5, group_size 4"]
    assert found.arms[1].overrides["advantage.lam"] == 0.5


def test_each_comparison_is_made_once_between_arms_that_differ_in_it_alone() -> None:
    twice = [{"against": {"variant": "orm"}, "measures": ["accuracy/sums-hard"]}] * 2
    assert [(arm.name, other.name) for _, arm, other in pairs(plan(compare=twice))] == [
        ("papo, steps", "orm, steps"),
        ("papo, gullible", "orm, gullible"),
    ]
    some = [{"against": {"variant": "orm"}, "arms": {"judge": "steps"}, "measures": ["accuracy/sums-hard"]}]
    assert len(list(pairs(plan(compare=some)))) == 1


def test_a_plan_has_the_digest_of_what_it_says(tmp_path: Path) -> None:
    assert plan().digest == plan().digest != plan(seeds=5).digest


NEED = {"measure": "accuracy/sums-hard", "arm": {"variant": "papo", "judge": "steps"}, "is": "higher"}


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "a seed is named twice"),
        ({"axes": {}}, "axes"),
        ({"axes": {"variant": {}}}, "axes.variant has no labels"),
        ({"sedes": 3}, "sedes"),
        ({"compare": [{"against": {"varaint": "orm"}, "measures": ["verdicts"]}]}, "there is no axis 'varaint'; axes: variant, judge"),
        ({"compare": [{"against": {"variant": "ppo"}, "measures": ["verdicts"]}]}, "no label 'ppo'; labels: orm, papo"),
        ({"compare": [{"against": {"variant": "orm"}, "measures": ["acuracy/tiny"]}]}, "is no measure: it begins with one of accuracy"),
        ({"compare": [{"against": {"variant": "orm"}, "measures": ["accuracy"]}]}, "write accuracy/<benchmark>"),
        ({"margins": {"acc": 0.1}}, "'acc' is no measure"),
        ({"margins": {"accuracy": 0.0}}, "greater than 0"),
        ({"claims": [{"name": "1", "says": "x", "needs": [NEED | {"is": "bigger"}]}]}, "is"),
        ({"claims": [{"name": "1", "says": "x", "needs": [NEED | {"is": "same"}]}], "margins": {}}, "`same` needs a margin"),
        ({"along": "lam"}, "along: there is no axis 'lam'"),
        ({"scaling": {"benchmark": "sums-hard", "size": "N"}}, "scaling.size: there is no axis 'N'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_plan_is_named(given: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError) as error:
        plan(**given)
    assert what in str(error.value)


def test_a_plan_is_read_by_name_or_file_and_its_errors_name_the_key(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="there is no ablation plan 'clams'"):
        read_plan("clams")
    path = tmp_path / "mine.yaml"
    path.write_text("title: [")
    with pytest.raises(ParamsError, match="not readable as YAML"):
        read_plan(path)
    path.write_text("title: x\nseeds: 2\naxes: {a: {b: {c.d: 1}}}\nmargin: 2\n")
    with pytest.raises(ParamsError, match="margin: extra inputs"):
        read_plan(path)
    path.write_text("just words")
    with pytest.raises(ParamsError, match="valid dictionary"):
        read_plan(path)
    path.write_text(yaml.safe_dump({"title": "x", "seeds": 1, "axes": {"v": {"one": {"advantage.lamda": 1}}}}))
    with pytest.raises(ParamsError, match=r"(?s)arm one: .*did you mean advantage.lam\?"):
        expand(read_plan(path))


def test_a_plan_takes_over_what_another_says_and_changes_some_of_it(tmp_path: Path) -> None:
    whole, more = tmp_path / "whole.yaml", tmp_path / "more.yaml"
    whole.write_text(
        "{title: Whole, base: {run.rounds: 4, advantage.lam: 1}, seeds: 3, axes: {advantage.variant: [orm, papo]}}"
    )
    more.write_text(f"{{title: More, extends: {whole}, base: {{run.rounds: 8}}, seeds: 2}}")
    found = read_plan(more)
    assert (found.title, found.seeds, list(found.axes)) == ("More", [0, 1], ["advantage.variant"])
    assert found.base == {"run.rounds": 8, "advantage.lam": 1}
    more.write_text("{title: More, extends: nothing}")
    with pytest.raises(ParamsError, match="there is no ablation plan 'nothing'") as raised:
        read_plan(more)
    assert raised.value.where == f"{more}: extends"
    more.write_text(f"{{title: More, extends: {more}}}")
    with pytest.raises(ParamsError, match="no plan that another can extend"):
        read_plan(more)


def test_an_arm_that_is_left_out_cannot_be_compared_with() -> None:
    found = plan(leave_out=[{"variant": "orm", "judge": "gullible"}])
    assert len(found.arms) == 3
    with pytest.raises(ParamsError, match="0 arms are variant: orm, judge: gullible"):
        list(pairs(found))


def test_runs_that_would_share_a_folder_are_refused() -> None:
    axes = {"v": {"a b": {"advantage.lam": 1}, "a-b": {"advantage.lam": 2}}}
    with pytest.raises(ParamsError, match="two runs would be called a-b-seed0"):
        expand(plan(axes=axes, compare=[]))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_plans_that_are_shipped_are_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = read_plan(name)
    runs = expand(found)
    benchmarks = set(runs[0].params.evaluate.benchmarks)
    for measure, arm, other in pairs(found):
        assert arm.name != other.name
        kind, _, rest = measure.partition("/")
        assert rest in benchmarks or kind in ("first", "last", "mean", "change", "verdicts"), measure
    for claim in found.claims:
        for need in claim.needs:
            found.find(need.arm, claim.name)
            if need.against is not None:
                found.find(need.against, claim.name)


def test_the_claims_are_those_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    named = {claim.name for name in ("claims", "dapo") for claim in read_plan(name).claims}
    assert {str(number) for number in range(1, 11)} <= named
    claims = read_plan("claims")
    assert len(claims.seeds) >= 5
    assert set(claims.axes["variant"]) == {"orm", "prm", "mult", "fullnorm", "papo", "gdpo"}
    assert len(expand(read_plan("claims-quick"))) == 8

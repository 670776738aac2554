"""Verdicts on runs whose truth is planted, from the files that runs leave to the words on the page."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from ablations.made import PROBLEMS, make, make_run, plan
from checkout import TINY

from papo.ablations.evidence import words
from papo.ablations.markdown import as_markdown
from papo.ablations.measures import Measured
from papo.ablations.plan import expand
from papo.ablations.results import Results, gather, write
from papo.ablations.work import Place, look
from papo.core.comparison import Verdict
from papo.errors import ParamsError


@pytest.fixture(autouse=True)
def _here(checkout: Path) -> None:
    """In a folder with a params.yaml."""


def chances(labels: Mapping[str, str], seed: int, policy: str, rng: np.random.Generator) -> np.ndarray:
    """Hard and easy problems; PAPO with the honest judge is 25 points above ORM, with the other one as good as ORM."""
    hardness = np.linspace(0.05, 0.6, PROBLEMS)
    better = 0.25 if labels == {"variant": "papo", "judge": "steps"} else 0.0
    risen = 0.0 if policy == "warmstart" else 0.1
    return hardness + better * (policy == "final") + risen


CLAIMS = [
    {"name": "1", "says": "PAPO ends above ORM", "paper": "51.3 against 46.3",
     "needs": [{"measure": "accuracy/sums-hard", "arm": {"variant": "papo", "judge": "steps"},
                "against": {"variant": "orm", "judge": "steps"}, "is": "higher"}]},
    {"name": "2", "says": "PAPO ends below ORM",
     "needs": [{"measure": "accuracy/sums-hard", "arm": {"variant": "papo", "judge": "steps"},
                "against": {"variant": "orm", "judge": "steps"}, "is": "lower"}]},
    {"name": "3", "says": "The share rises",
     "needs": [{"measure": "change/zero_advantage_share", "arm": {"variant": "orm", "judge": "steps"}, "is": "higher"},
               {"measure": "change/zero_advantage_share", "arm": {"variant": "papo", "judge": "steps"}, "is": "same"}]},
    {"name": "4", "says": "Nobody knows",
     "needs": [{"measure": "accuracy/sums-hard", "arm": {"variant": "papo", "judge": "gullible"},
                "against": {"variant": "orm", "judge": "gullible"}, "is": "higher"}]},
]  # fmt: skip


def signals(labels: Mapping[str, str], seed: int, number: int, rng: np.random.Generator) -> dict[str, float]:
    rise = 0.05 * number if labels["variant"] == "orm" else 0.0
    return {"zero_advantage_share": 0.3 + rise + 0.005 * rng.standard_normal()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder, found = tmp_path_factory.mktemp("made"), plan(claims=CLAIMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "params.yaml").write_text(yaml.safe_dump(TINY))
        return gather("made", found, make(found, folder / "runs", chances, signals=signals), Place(folder / "runs"))


def test_planted_differences_are_found_and_none_is_invented(results: Results) -> None:
    told = {(one.measure, one.arm): one for one in results.compared}
    better = told["accuracy/sums-hard", "papo, steps"]
    assert better.difference is not None
    assert better.words == "better"
    assert better.difference.low < 0.25 < better.difference.high
    assert (better.difference.seeds, better.difference.problems) == (4, PROBLEMS)
    assert told["accuracy/sums-hard", "papo, gullible"].words.startswith(
        ("undecided", "no difference larger than 5 points")
    )
    assert (
        told["length/sums-hard", "papo, steps"].words == "no difference larger than 5 tokens"
    )  # each seed has its own, the same for all
    assert [one.answer for one in results.answered] == ["holds", "does not hold", "holds", "undecided"]
    assert results.verdict == "Of 4 claims 2 hold, 1 does not hold and 1 is undecided."


def test_a_shared_run_stands_for_both_of_its_arms(results: Results) -> None:
    assert results.runs["orm, steps"][0].record.id == results.runs["orm, gullible"][0].record.id
    assert (results.saved.runs, results.saved.wanted) == (12, 16)
    assert results.saved.share == pytest.approx(0.25)


def test_the_page_and_its_files(results: Results, tmp_path: Path) -> None:
    page = write(results, Place(tmp_path / "runs"), command="papo ablate made").read_text()
    assert "Of 4 claims 2 hold" in page
    assert "51.3 against 46.3" in page
    assert "src=" not in page
    assert "https:" not in page
    assert "http:" not in page.replace("http://www.w3.org", "")
    assert page.count("<svg") >= 6
    folder = tmp_path / "runs/report"
    content = json.loads((folder / "results.json").read_text())
    assert content["claims"][0]["answer"] == "holds"
    assert content["claims"][0]["needs"][0]["seeds"] == 4
    assert content["plan_digest"] == results.plan.digest
    assert len(content["runs"]) == 12
    rows = list(csv.DictReader((folder / "comparisons.csv").read_text().splitlines()))
    assert [row["verdict"] for row in rows[:1]] == ["better"]
    assert list((folder / "plots").glob("*.png"))
    told = (folder / "results.md").read_text()
    assert told == as_markdown(content)
    assert (
        "| 1. PAPO ends above ORM | 51.3 against 46.3 | `accuracy/sums-hard`, papo, steps against orm, steps: +2"
        in told
    )
    drawn = [folder / image for image in re.findall(r"!\[.*\]\((.*)\)", told)]
    assert len(drawn) >= 6
    for plot in drawn:
        assert "prefers-color-scheme:dark" in plot.read_text()
        ElementTree.parse(plot)


def test_values_of_a_param_are_drawn_along_it_and_named_by_it(tmp_path: Path) -> None:
    against = {"against": {"advantage.lam": "0"}, "measures": ["accuracy/sums-hard"]}
    found = plan(axes={"advantage.lam": [0, 0.5]}, along="advantage.lam", compare=[against], seeds=2)
    make(found, tmp_path / "runs", lambda *_: np.full(PROBLEMS, 0.5), signals=lambda *_: {"accuracy": 0.5})
    place = Place(tmp_path / "runs")
    write(gather("made", found, expand(found), place), place, command="papo ablate made")
    drawn = {plot.stem: plot.read_text() for plot in (place.root / "report/plots").glob("*.svg")}
    assert ">lam 0.5<" in drawn["accuracy"]
    assert ">0.5<" in drawn["along-advantage-lam-sums-hard"]


def test_what_is_not_done_yet_is_said_and_leaves_comparisons_undecided(tmp_path: Path) -> None:
    found = plan(claims=CLAIMS[:1])
    place = Place(tmp_path / "runs")
    runs = expand(found)
    for run in runs:
        if run.seed == 0:
            make_run(run, place, chances)
    some = gather("made", found, runs, place)
    assert some.done == 3
    assert some.compared[0].words == "no verdict: 1 seed of both is done, and it takes two"
    assert some.answered[0].answer == "undecided"
    assert some.verdict == "Of 1 claims 1 is undecided. So far: 3 of 12 runs are done."
    page = write(some, place, command="papo ablate made").read_text()
    assert "No run of these arms is done." not in page
    empty = gather("made", found, runs, Place(tmp_path / "nothing"))
    assert empty.done == 0
    assert "No run of these arms is done." in write(empty, Place(tmp_path / "nothing"), command="x").read_text()


def test_a_failed_run_is_a_row_and_its_seed_leaves_the_comparison(tmp_path: Path) -> None:
    found = plan()
    place = Place(tmp_path / "runs")
    runs = expand(found)
    for run in runs:
        broken = run.name == "papo-steps-seed2"
        make_run(
            run, place, chances, how="failed" if broken else "finished", why="the loss is not finite" if broken else ""
        )
    some = gather("made", found, runs, place)
    assert [(one.run.name, one.why) for one in some.failed] == [("papo-steps-seed2", "the loss is not finite")]
    assert some.compared[0].difference is not None
    assert some.compared[0].difference.seeds == 3
    assert "the loss is not finite" in write(some, place, command="x").read_text()


def test_the_peak_is_not_chosen_on_the_problems_that_it_is_counted_on(tmp_path: Path) -> None:
    """Five policies that are all alike: the best of five noisy means is too high, and the cross-fitted fall is not."""
    found = plan(base={"run.rounds": 10, "evaluate.every": 2}, seeds=40, axes={"v": {"one": {}}}, compare=[])
    runs = make(found, tmp_path / "runs", lambda labels, seed, policy, rng: np.full(PROBLEMS, 0.5))
    place = Place(tmp_path / "runs")
    fair, naive = [], []
    for run in runs:
        one = Measured(look(run, place), place.workspace(run))
        values = one.measure("fall/sums-hard")
        assert isinstance(values, dict)
        fair.append(np.mean(list(values.values())))
        course = [value for rounds, value in one.accuracies("sums-hard") if rounds]
        naive.append(max(course) - course[-1])
    error = np.std(fair, ddof=1) / np.sqrt(len(fair))
    assert abs(np.mean(fair)) < 3 * error
    assert np.mean(naive) > 5 * error


def test_other_measures(results: Results) -> None:
    one = results.runs["orm, steps"][1]
    assert one.measure("verdicts") == 8 * 50
    assert one.measure("mean/length_mean") == 20.0
    assert one.measure("change/zero_advantage_share") == pytest.approx(0.3, abs=0.03)
    assert np.isnan(float(one.measure("last/prm_mean")))  # type: ignore[arg-type]  # a signal is one number
    gain = one.measure("gain/sums-hard")
    assert isinstance(gain, dict)
    assert np.mean(list(gain.values())) == pytest.approx(0.1, abs=0.1)
    with pytest.raises(ParamsError, match="was not evaluated on 'aime'"):
        one.measure("accuracy/aime")


def test_words() -> None:
    verdict = Verdict("higher", 0.01, 1.0, False)
    assert words("accuracy/x", verdict, 0.02) == "better"
    assert words("fall/x", verdict, 0.02) == "worse"
    assert words("length/x", verdict, 2.0) == "higher"
    assert words("accuracy/x", verdict._replace(within=True), 0.02) == "better, by less than 2 points"
    assert (
        words("last/zero_advantage_share", Verdict("same", 1.0, 0.01, True), 0.05)
        == "no difference larger than 5 points"
    )
    assert words("accuracy/x", Verdict("undecided", 0.3, 0.3, False, 1), 0.02) == "undecided: about 1 more seed"
    assert (
        words("accuracy/x", Verdict("undecided", 0.3, 0.3, False), 0.02)
        == "undecided: more seeds alone would not decide it"
    )

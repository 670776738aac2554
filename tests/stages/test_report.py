"""The report of small made-up runs: what it says, what it leaves out, and that it is the same every time."""

from __future__ import annotations

import csv
import dataclasses
import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from stages.made import (
    ASKED,
    JUDGED,
    PRICED,
    benchmark,
    calibration,
    inputs,
    interval,
    manifest,
    policy,
    signals,
)

from papo.engines.reporting import plots
from papo.engines.reporting.responses import read_responses
from papo.errors import DataError, MissingInputError
from papo.params import AdvantageParams, ReportParams
from papo.stages import advantage, report
from papo.store.files import digest, write_json
from papo.store.manifest import Context


def make(folder: Path, given: report.Inputs, title: str = "A run") -> str:
    report.run(ReportParams(title=title), given, folder / "report", context=Context(work=folder / "work"))
    return (folder / "report/index.html").read_text(encoding="utf-8")


def text(page: str) -> str:
    """What a reader sees, without the plots."""
    page = re.sub(r"<(style|svg).*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page).replace("\N{NO-BREAK SPACE}", " "))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_tells_the_result(tmp_path: Path) -> None:
    evaluation = {
        "up": benchmark(0.4, 0.55), "down": benchmark(0.5, 0.4, missing=3), "same": benchmark(0.3, 0.31),
    }  # fmt: skip
    page = make(tmp_path, inputs(tmp_path, [signals(k) for k in range(3)], evaluation))
    seen = text(page)
    assert "Training raised accuracy on up, lowered it on down and made no clear difference on same." in seen
    assert (
        "avg@4 from 40.0 % (35.0 to 45.0) with the warm start to 55.0 % (50.0 to 60.0) with the final policy: "
        "a paired difference of +15.0 points (+13.0 to +17.0) on 50 problems; 95 % intervals." in seen
    )
    assert "a paired difference of −10.0 points (−12.0 to −8.0)" in seen  # noqa: RUF001  # the minus sign is meant
    assert "3 samples on down have no verdict and are left out of its accuracy." in seen
    assert "variant papo · λ = 1 ·" in seen
    assert seen.index("9 terms") < seen.index("10 terms")
    assert "33.2 1.0 % 2.0 % 4.0 %" in seen
    assert page.count("<svg") == len(plots.PLOTS)
    assert "advantage.variant" in seen


def test_the_page_tells_of_alarms_as_they_began(tmp_path: Path) -> None:
    course = [
        signals(k, judge_failure_share=share, judge_failure_share_timeout=share)
        for k, share in enumerate((0, 0.25, 0.5))
    ]
    seen = text(make(tmp_path, inputs(tmp_path, course)))
    assert seen.count("Alarm from round") == 1
    assert "Alarm from round 1, judge outage: 25% of the judge's calls gave no verdict: timeout 25%." in html.unescape(
        seen
    )


def test_the_page_tells_how_far_the_judge_can_be_trusted(tmp_path: Path) -> None:
    write_json(tmp_path / "sums.json", calibration())
    write_json(
        tmp_path / "mine.json",
        calibration(data="mine", auc=interval(None, None, None), length_bias=interval(-0.1, None, None)),
    )
    given = inputs(tmp_path, [signals(0)])
    without = make(tmp_path, given)
    assert "The judge" not in text(without)
    both = {"sums": tmp_path / "sums.json", "mine": tmp_path / "mine.json"}
    seen = html.unescape(text(make(tmp_path, dataclasses.replace(given, calibrations=both))))
    assert "steps-gullible (steps-gullible/1) on labelled solutions" in seen
    assert "sums 500 2.0 % 0.50 [0.40, 0.60] 0.50 [0.40, 0.60] 0.50 [0.40, 0.60] 0.76 [0.72, 0.79] 0.50" in seen
    assert "mine 500 2.0 % 0.50 [0.40, 0.60] 0.50 [0.40, 0.60] - -0.10 0.50" in seen
    assert seen.index("mine 500") < seen.index("sums 500")
    assert "sums: a <note>." in seen


def test_the_page_tells_what_judging_cost_by_round_and_in_total(tmp_path: Path) -> None:
    second = PRICED | {"cost": 1.0, "calls": 6.0, "vote_agreement": 0.9, "asked_share": 0.2}
    given = inputs(tmp_path, [signals(0), signals(1)], judging=[PRICED, second])
    seen = text(make(tmp_path, given))
    assert (
        "The judge What judging cost, by round Round Asked Calls Failed Tokens in Tokens out Cost From the store"
        in seen
    )
    assert "All 30.0 % 1,240 6 2,469,134 178,024 1.001 12.5 % 24.00 6,914 90.0 % 0 40.0 % 1,234 3" in seen
    assert "0 40.0 % 1,234 3 1,234,567 89,012 0.001234 12.5 % 12.00 3,457 1 20.0 % 6 3" in seen
    assert "Tokens saved" not in seen
    assert "in the unit of score_prm.prices" in seen
    assert "was asked about" not in seen
    table = rows(tmp_path / "report/rounds.csv")
    assert [row["judge_cost"] for row in table] == ["0.0012345", "1.0"]
    assert [row["judge_vote_agreement"] for row in table] == ["", "0.9"]
    assert [row["accuracy"] for row in table] == ["0.3", "0.35"]


def test_a_model_without_a_price_saves_tokens(tmp_path: Path) -> None:
    given = inputs(tmp_path, [signals(0), signals(1)], judging=[ASKED, {"asked_share": 0.0}])
    seen = text(make(tmp_path, given))
    assert "From the store Tokens saved by the store Tokens saved by not asking All 20.0 % 1,234 3" in seen
    assert "0 40.0 % 1,234 3 1,234,567 89,012 12.5 % 50,000 1,900,000 Calls and tokens" in seen, (
        "a round in which nothing was asked has no row"
    )
    assert "Cost" not in seen
    assert "in the unit of" not in seen


def test_of_a_judge_that_costs_nothing_the_page_tells_how_often_it_was_asked(tmp_path: Path) -> None:
    given = inputs(tmp_path, [signals(0), signals(1)], judging=[{"asked_share": 0.5}, {"asked_share": 0.25}])
    seen = text(make(tmp_path, given))
    assert "The judge was asked about 37.5 % of the responses of the run." in seen
    assert "What judging cost" not in seen
    unused = inputs(tmp_path, [signals(0)], judging=[{"asked_share": 0.0}], params={"advantage.variant": "orm"})
    assert "The judge was asked" not in text(make(tmp_path, unused))


def test_a_damaged_calibration_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "sums.json", calibration(auc=0.5))
    given = dataclasses.replace(inputs(tmp_path, [signals(0)]), calibrations={"sums": tmp_path / "sums.json"})
    with pytest.raises(DataError, match="not the calibration of a judge") as caught:
        make(tmp_path, given)
    assert "papo calibrate-judge" in caught.value.fix


def test_the_files_beside_the_page(tmp_path: Path) -> None:
    given = inputs(tmp_path, [signals(0), signals(1, extra=1.5), signals(2, zero_advantage_share=0.4)])
    made = report.run(ReportParams(), given, tmp_path / "report", context=Context(work=tmp_path / "work"))
    folder = tmp_path / "report"
    signal_rows, step_rows = rows(folder / "rounds.csv"), rows(folder / "training.csv")
    assert next(iter(signal_rows[0])) == "round"
    assert [row["round"] for row in signal_rows] == ["0", "1", "2"]
    assert [row["extra"] for row in signal_rows] == ["", "1.5", ""]
    assert list(step_rows[0])[:2] == ["round", "step"]
    assert [(row["round"], row["step"]) for row in step_rows] == list(zip("001122", "123456", strict=True))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["sums/accuracy"] == 0.55
    assert summary["sums/gain_low"] < summary["sums/gain"] < summary["sums/gain_high"]
    assert (summary["zero_advantage_share_first"], summary["zero_advantage_share_last"]) == (0.3, 0.4)
    assert (summary["length_mean_first"], summary["length_mean_last"], summary["prm_mean_last"]) == (20.0, 22.0, 0.7)
    assert made.metrics == summary
    names = {"accuracy_rewards", "zero_advantage", "length", "judge_vs_accuracy"}
    assert {path.name for path in (folder / "plots").iterdir()} == {f"{name}.png" for name in names}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (folder / "plots").iterdir())


def test_a_run_without_a_judge(tmp_path: Path) -> None:
    unjudged = [{k: v for k, v in signals(k).items() if k not in JUDGED} for k in range(2)]
    page = make(tmp_path, inputs(tmp_path, unjudged, params={"advantage.variant": "orm", "run.rounds": 12}))
    assert page.count("<svg") == len(plots.PLOTS) - 1
    assert plots.NO_JUDGE in text(page)
    assert "variant orm · 12 rounds" in text(page)
    assert "prm_mean_last" not in json.loads((tmp_path / "report/summary.json").read_text())
    assert not (tmp_path / "report/plots/judge_vs_accuracy.png").exists()


def test_a_signal_that_is_sometimes_absent_leaves_a_gap(tmp_path: Path) -> None:
    absent = {*JUDGED, "outcome_advantage_share", "process_advantage_share"}
    gap = {k: v for k, v in signals(1).items() if k not in absent}
    given = inputs(tmp_path, [signals(0, prm_mean=0.6), gap, signals(2, prm_mean=0.8)])
    page = make(tmp_path, given)
    assert page.count("<svg") == len(plots.PLOTS)
    assert "nan" not in page.lower()
    assert [row["prm_mean"] for row in rows(tmp_path / "report/rounds.csv")] == ["0.6", "", "0.8"]


@pytest.mark.parametrize("row", [signals(0), {"responses": 8.0}])
def test_one_round_and_next_to_no_signals(tmp_path: Path, row: dict[str, float]) -> None:
    page = make(tmp_path, inputs(tmp_path, [row], steps=0))
    assert "No optimizer step was recorded." in text(page)
    assert (tmp_path / "report/training.csv").read_text() == "round,step\n"


def test_policies_in_between_stand_in_the_order_of_training(tmp_path: Path) -> None:
    evaluation = {"sums": benchmark(0.4, 0.55) | {"round-1": policy(0.45), "round-11": policy(0.5)}}
    seen = text(make(tmp_path, inputs(tmp_path, [signals(0)], evaluation)))
    places = [seen.index(label) for label in ("Warm start", "After round 1 ", "After round 11 ", "Final")]
    assert places == sorted(places)


def test_benchmarks_in_the_order_of_the_params(tmp_path: Path) -> None:
    evaluation = {name: benchmark(0.4, 0.55) for name in ("a", "b", "c")}
    seen = text(
        make(tmp_path, inputs(tmp_path, [signals(0)], evaluation, params={"evaluate.benchmarks": ["c", "a", "b"]}))
    )
    assert "raised accuracy on c, a and b." in seen


def test_notes_on_what_makes_the_curves_doubtful(tmp_path: Path) -> None:
    bad = signals(1, lam_max_exceeded=1.0, lam_max=0.69, judge_failure_share=0.25)
    seen = text(make(tmp_path, inputs(tmp_path, [signals(0), bad])))
    assert "at or above 0.69" in seen
    assert "inversions: 4" in seen
    assert "The judge failed on 25.0 % of what it was asked in round 1." in seen


class _References(HTMLParser):
    """Collects ids, headings, and whatever could make a browser fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        links = [values[name] or "" for name in ("src", "href", "xlink:href", "srcset", "data") if name in values]
        self.fetched += [link for link in links if not link.startswith("#")]
        self.fetched += [tag] if tag in ("script", "link", "iframe", "img", "object") else []
        self.ids += [values["id"] or ""] if "id" in values else []
        self.headings += [tag] if re.fullmatch("h[1-6]", tag) else []


@pytest.mark.parametrize(("low", "high"), [(0.71, 0.86), (0.0, 1.0), (0.004, 0.021), (-0.1, 0.4), (0.5, 0.5)])
def test_the_ticks_of_shares_say_where_they_are(low: float, high: float) -> None:
    figure = Figure(figsize=(4.6, 2.9))
    axes = plots.axes_of(figure)
    axes.plot([0, 1], [low, high])
    figure.canvas.draw()
    said = [float(label.get_text().removesuffix("%")) / 100 for label in axes.get_yticklabels()]
    assert said == pytest.approx(list(axes.get_yticks()))


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    page = make(tmp_path, inputs(tmp_path, [signals(k) for k in range(3)]))
    found = _References()
    found.feed(page)
    assert not found.fetched
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    assert len(found.ids) == len(set(found.ids))
    assert set(found.headings) == {"h1", "h2", "h3"}
    assert not any(colour in page.split("</style>")[1] for colour in plots.LIGHT.values())


def test_names_are_text_not_markup(tmp_path: Path) -> None:
    evaluation = {"<b>$x$": benchmark(0.4, 0.55)}
    page = make(
        tmp_path, inputs(tmp_path, [signals(0)], evaluation, params={"prepare.source": "<script>"}), title="<i>T"
    )
    assert "<b>" not in page
    assert "<script>" not in page
    assert "&lt;i&gt;T" in page
    assert page.count("&lt;b&gt;$x$") > 3


def test_what_tracking_is_told_is_not_published(tmp_path: Path) -> None:
    given = inputs(tmp_path, [signals(0)], params={"tracking.uri": "postgresql://me:secret@host/db"})
    assert "secret" not in make(tmp_path, given)
    assert "secret" not in (tmp_path / "report.manifest.json").read_text()


def test_equal_inputs_give_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(tmp_path, [signals(k) for k in range(3)])
    make(tmp_path, given)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    import matplotlib

    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "axes.facecolor": "red"}):
        report.run(ReportParams(title="A run"), given, tmp_path / "again/report", context=Context(work=tmp_path / "w"))
        assert matplotlib.rcParams["font.size"] == 20
    assert digest(tmp_path / "report") == digest(tmp_path / "again/report")


def test_nothing_to_do_the_second_time(tmp_path: Path) -> None:
    given = inputs(tmp_path, [signals(0)])
    runs = [report.run(ReportParams(), given, tmp_path / "report", context=Context(tmp_path / "w")) for _ in range(2)]
    assert [made.skipped for made in runs] == [False, True]
    manifest(given.advantages["0"], metrics=signals(0, accuracy=0.9))
    assert not report.run(ReportParams(), given, tmp_path / "report", context=Context(tmp_path / "w")).skipped


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ("[]", "the file"),
        ("{}", "at least 1"),
        ('{"sums": {"gain": 1}}', "sums: Value error, needs warmstart, final and gain"),
        (json.dumps({"sums": benchmark(0.4, 0.5) | {"gain": {"value": 0.1}}}), "sums.gain.low"),
        (json.dumps({"sums": benchmark(0.4, float("nan"))}), "finite"),
    ],
)
def test_damaged_metrics_are_named_and_nothing_is_written(tmp_path: Path, content: str, says: str) -> None:
    given = inputs(tmp_path, [signals(0)])
    given.evaluation.write_text(content)
    with pytest.raises(DataError, match=re.escape(says)) as raised:
        make(tmp_path, given)
    assert raised.value.where == str(given.evaluation)
    assert not (tmp_path / "report").exists()


def test_a_damaged_or_absent_manifest_is_named(tmp_path: Path) -> None:
    given = inputs(tmp_path, [signals(0)])
    given.training["0"].write_text("{}")
    with pytest.raises(DataError, match="not a manifest") as raised:
        make(tmp_path, given)
    assert raised.value.where == str(given.training["0"])
    given.training["0"].unlink()
    with pytest.raises(MissingInputError):
        make(tmp_path, given)


def test_a_round_without_a_group_to_show_has_a_page_all_the_same(
    tmp_path: Path, small_round: Any, context: Context
) -> None:
    """Dynamic sampling may leave nothing but groups that are not worth a look: for ORM those with right and wrong responses."""
    tables = {
        "rollouts": small_round.rollouts(),
        "orm": small_round.orm([1.0, 0.0] * 4),
        "prm": small_round.prm([None] * 8),
    }
    given = advantage.Inputs(0, tables["rollouts"], tables["orm"], tables["prm"])
    tables["advantages"] = tmp_path / "advantages.parquet"
    advantage.run(AdvantageParams(variant="orm"), given, tables["advantages"], context=context)
    found = read_responses(0, tables, groups=3, lam=1.0, scale="std", eps=1e-6)
    assert found.gallery == []
    (tmp_path / "run").mkdir()
    made = dataclasses.replace(inputs(tmp_path / "run", [signals(0)]), tables=tables)
    report.run(ReportParams(), made, tmp_path / "report", context=context)
    assert (tmp_path / "report/index.html").is_file()


def test_the_responses_of_the_last_round_are_shown(tmp_path: Path, small_round: Any, context: Context) -> None:
    """By hand: the second correct response of the first problem scores lower; a wrong one was not judged."""
    texts = [
        "3+5=8\n\\boxed{8}",
        "<script>alert(1)</script>\n3+5=9\n\\boxed{8}",
        "\\boxed{1}",
        "\\boxed{2}",
        *["\\boxed{8}"] * 4,
    ]
    tables = {
        "rollouts": small_round.rollouts(completion=texts),
        "orm": small_round.orm([1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]),
        "prm": small_round.prm([1.0, 0.0, None, None, 1.0, 1.0, 1.0, 1.0]),
    }
    given = advantage.Inputs(0, tables["rollouts"], tables["orm"], tables["prm"])
    tables["advantages"] = tmp_path / "advantages.parquet"
    advantage.run(AdvantageParams(), given, tables["advantages"], context=context)
    found = read_responses(0, tables, groups=3, lam=1.0, scale="std", eps=1e-6)
    first, *others = found.gallery
    assert "judge tells its correct responses apart" in first.why or "pushed down" in first.why
    assert [group.why for group in others] == ["all are right, and the outcome teaches nothing"]
    assert [one.correct for one in first.responses] == [True, True, False, False]
    assert [one.score for one in first.responses] == [1.0, 0.0, None, None]
    assert first.responses[0].paid["papo"] == pytest.approx(first.responses[0].advantage)
    assert math.isnan(first.responses[0].paid["prm"])  # it would have asked about the wrong ones, too
    (tmp_path / "run").mkdir()
    made = inputs(tmp_path / "run", [signals(0)])
    page = make(tmp_path / "run", dataclasses.replace(made, tables=tables))
    assert "Responses of round 0" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "Paid by orm" in page
    assert "Responses of round" not in make(tmp_path / "run", made, title="Another")

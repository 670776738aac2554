"""What a person sees in a terminal, and in a log where there is none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from papo.console import (
    accuracy_rows,
    configure_logging,
    course_rows,
    disputed_lines,
    make_context,
    reason_lines,
    response_rows,
    show_alarms,
    show_explained,
    show_summary,
    time_rows,
    warn,
)
from papo.core.alarms import ALARMS, Alarm
from papo.core.explain import Settings, Why
from papo.decisions import Accepted, Decisions, LastGood, Rung, Stop
from papo.inspection import Explained, Response
from papo.params import OnAlarmParams
from papo.session import Summary


def estimate(value: float, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


def gain(*interval: float) -> dict[str, Any]:
    return {**estimate(*interval), "metric": "avg_at_k", "of": "final"}


def policy(value: float, **tiers: float) -> dict[str, Any]:
    return {
        "avg_at_k": estimate(value, value - 0.05, value + 0.05), "k": 4, "length_mean": 20.0,
        "tiers": {tier: estimate(accuracy) for tier, accuracy in tiers.items()},
    }  # fmt: skip


def summary(**change: Any) -> Summary:
    facts: dict[str, Any] = {
        "evaluation": {
            "easy": {"warmstart": policy(0.4, a=0.3, b=0.5), "final": policy(0.6, a=0.6, b=0.6), "gain": gain(0.2, 0.1, 0.3)},
            "hard": {"warmstart": policy(0.1, c=0.1), "final": policy(0.05, c=0.05), "gain": gain(-0.05)},
        },
        "first": {"accuracy": 0.25, "length_mean": 20.0},
        "last": {"accuracy": 0.75, "length_mean": 30.0, "truncated_share": 0.5},
        "alarms": [],
        "seconds": {"warmstart": 30.0, "train": 50.0, "report": 5.0},
        "total_seconds": 100.0,
        "ran": 3,
        "skipped": 4,
        "report": Path("artifacts/report/index.html"),
        "link": None,
        "dvc": "recorded",
    }  # fmt: skip
    return Summary(**facts | change)


def test_accuracy_by_benchmark_and_tier_with_intervals() -> None:
    easy, tier_a, tier_b, hard = accuracy_rows(summary())
    assert easy == {
        "benchmark": "easy", "tier": "all", "warm start avg@4": "40.0 [35.0, 45.0]", "final avg@4": "60.0 [55.0, 65.0]",
        "gain": "+20.0 [10.0, 30.0]", "length": "20.0 -> 20.0",
    }  # fmt: skip
    assert (tier_a["tier"], tier_a["final avg@4"], tier_a["gain"]) == ("a", "60.0", "+30.0")
    assert tier_b["gain"] == "+10.0"
    assert (hard["gain"], hard["benchmark"]) == ("-5.0", "hard")


def test_only_signals_that_both_rounds_have() -> None:
    assert course_rows(summary()) == [
        {"signal": "training accuracy", "first round": "0.250", "last round": "0.750"},
        {"signal": "mean length, tokens", "first round": "20.000", "last round": "30.000"},
    ]


def test_what_is_not_work_is_overhead() -> None:
    assert summary().overhead_share == pytest.approx(0.2)
    assert [(row["stage"], row["share"]) for row in time_rows(summary())] == [
        ("warmstart", "30%"), ("train", "50%"), ("report", "5%"), ("whole run", "100%"),
        ("not policy, verifier or judge", "20.0%"),
    ]  # fmt: skip


def test_the_summary_names_report_record_and_dvc(capsys: pytest.CaptureFixture[str]) -> None:
    show_summary(summary(link="http://server/#/run"))
    text = capsys.readouterr().out
    for part in ("3 steps ran, 4 had been done before", "report   artifacts/report/index.html", "60.0 [55.0, 65.0]",
                 "MLflow   http://server/#/run", "DVC      recorded"):  # fmt: skip
        assert part in text
    show_summary(summary())
    assert "MLflow" not in capsys.readouterr().out


def test_the_summary_shows_alarms_where_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    show_summary(summary())
    assert "Alarms" not in capsys.readouterr().out
    show_summary(summary(alarms=[Alarm("collapse", 7, "accuracy over 3 rounds is 0.12, and was 0.27 at its best")]))
    text = capsys.readouterr().out
    assert "Alarms" in text
    assert "accuracy over 3 rounds is 0.12, and was 0.27 at its best" in text


def test_the_summary_tells_what_a_model_that_judged_cost(capsys: pytest.CaptureFixture[str]) -> None:
    show_summary(summary())
    assert "judge    " not in capsys.readouterr().out
    cost = {"asked_share": 0.5, "calls": 12345.0, "prompt_tokens": 1e6, "completion_tokens": 234567.0, "cached_share": 0.1,
            "cache_tokens": 5000.0, "not_asked_tokens": 60000.0}  # fmt: skip
    show_summary(summary(judging=cost))
    words = "12,345 calls, 1,234,567 tokens; saved 5,000 tokens by the store, 60,000 tokens by not asking\n"
    assert f"judge    {words}" in capsys.readouterr().out
    show_summary(
        summary(judging=cost | {"calls_failed": 5.0, "cost": 1.23456, "cache_saved": 0.5, "not_asked_saved": 6.0})
    )
    words = "12,345 calls, 5 without a verdict, 1,234,567 tokens, cost 1.235; saved 0.5000 by the store, 6.000 by not asking"
    assert f"judge    {words}\n" in capsys.readouterr().out


def test_alarms_are_shown_as_they_began_and_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    collapse = Rung(name="collapse", round=7, evidence="first")
    good = LastGood(round=3, policy="round-3", folder="f", digest="d", why="it was the best")
    accepted = Accepted(alarm=collapse, for_good=True, at="today", by="me")
    stopped = Stop(alarms=[collapse], good=good, again=False, why="policy", at="today", by="me")
    policies = OnAlarmParams(collapse="stop")
    raised = [Alarm("collapse", 7, "first"), Alarm("collapse", 8, "second"), Alarm("judge_outage", 2, "third")]
    show_alarms(9, raised, policies, Decisions(stopped=stopped, accepted=[accepted]))
    text = capsys.readouterr().out
    assert "first" in text
    assert "accepted in round 7 by me at today" in text
    assert "\nstop: collapse\n" in text
    assert "stopped at today by collapse; the last good policy is round-3: it was the best\n" in text
    assert "third" in text
    assert "second" not in text
    assert "9 rounds; ringing in the last one: collapse\n" in text
    show_alarms(9, [], OnAlarmParams(), Decisions())
    quiet = f"9 rounds; ringing in the last one: none\nwarn: {', '.join(ALARMS)}\n"
    assert capsys.readouterr().out == quiet


def test_the_summary_of_a_run_that_had_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    show_summary(summary(evaluation={}, first={}, last={}, seconds={}, ran=0))
    assert "0 steps ran" in capsys.readouterr().out


def response(**change: Any) -> Response:
    facts: dict[str, Any] = {
        "sample_index": 0, "orm": 1.0, "orm_status": "ok", "extracted": "6", "disputed": False, "prm": 0.5, "prm_status": "ok",
        "reason": "a gap", "outcome": 0.54, "process": -1.55, "advantage": -1.01, "peers": {"orm": 0.54, "GDPO, TRL": 1e-12}, "tokens": 16,
        "text": "2+4=6",
    }  # fmt: skip
    return Response(**facts | change)


def explained(*responses: Response, **change: Any) -> Explained:
    facts: dict[str, Any] = {
        "problem_id": "0123456789abcdef", "round": 3, "other_rounds": [1, 2], "prompt": "[red]2+4[/red]=?", "answer": "6",
        "judge": "fake", "settings": Settings("papo", 1.0, "std", 1e-6, "none"), "token_level": False,
        "responses": list(responses), "why": Why([f"because {r.sample_index}" for r in responses], ["they are few"]),
    }  # fmt: skip
    return Explained(**facts | change)


def test_a_row_a_response_with_the_status_where_a_score_is_missing() -> None:
    (row,) = response_rows([response()])
    assert row == {
        "sample": "0", "outcome": "1", "extracted": "6", "process": "0.5", "tokens": "16", "A_out": "+0.54", "A_proc": "-1.55",
        "A": "-1.01", "as orm": "+0.54", "as GDPO, TRL": "0",
    }  # fmt: skip
    nan = float("nan")
    (row,) = response_rows([response(orm=nan, orm_status="timeout", prm=nan, prm_status="refused", extracted=None)])
    assert (row["outcome"], row["process"], row["extracted"]) == ("timeout", "refused", "-")
    (row,) = response_rows([response(extracted="1" * 30 + "\n")])
    assert row["extracted"] == "1" * 21 + "..."


def test_reasons_by_response_and_who_was_not_asked_about() -> None:
    responses = [
        response(),
        response(sample_index=1, prm_status="not_asked", reason="the variant does not use this score"),
        response(sample_index=12, prm_status="timeout", reason=" "),
    ]
    assert reason_lines(responses) == [" 0  a gap", "12  no reason given", "not asked about 1"]
    assert reason_lines(responses[:1]) == [" 0  a gap"]


def test_a_line_where_the_second_opinion_is_another_and_no_section_where_it_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    disputed = response(sample_index=12, orm=0.0, extracted="6\x1b[2J", disputed=True)
    line = "12  the model calls 6 [2J equivalent to the gold answer; the outcome stays the verifier's: wrong"
    assert disputed_lines([response(), disputed]) == [line]
    show_explained(explained(response(), disputed))
    assert f"Second opinion\n  {line}\nWhat the judge said" in capsys.readouterr().out
    show_explained(explained(response()))
    assert "Second opinion" not in capsys.readouterr().out


def test_an_explanation_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    long = "word " * 60
    hostile = response(extracted="[bold]6", reason=long, text="2+4=6\n\x1b[2Jgone")
    show_explained(explained(hostile, token_level=True), text=True)
    shown = capsys.readouterr().out
    assert shown.startswith("Problem 0123456789abcdef, round 3 (also in round 1, 2)\n  [red]2+4[/red]=?\n")
    assert "[bold]6" in shown
    assert "variant=papo lam=1 scale=std eps=1e-06 guard=none" in shown
    assert "Why\n  they are few\n   0  because 0\n" in shown
    assert "means over the tokens" in shown
    assert shown.endswith("Response 0\n  2+4=6\n   [2Jgone\n")
    assert max(map(len, shown.splitlines())) <= 120
    assert shown.count("word") == 60
    show_explained(explained(response(), other_rounds=[]))
    shown = capsys.readouterr().out
    assert shown.startswith("Problem 0123456789abcdef, round 3\n")
    assert "Response 0" not in shown
    assert "means over the tokens" not in shown


def test_the_output_is_as_wide_as_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    peers = {f"a peer with a long name {n}": -1.0 for n in range(8)}
    show_explained(explained(response(peers=peers)))
    shown = capsys.readouterr().out
    assert all(f"as {name}" in shown for name in peers)


def test_without_a_terminal_a_line_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    context = make_context(tmp_path)
    with context.progress("rollout 3", 10) as advance:
        advance(4)
        advance(6)
    warn("look here")
    first, second = capsys.readouterr().err.splitlines()
    assert "INFO rollout 3 10/10 in " in first
    assert second.endswith("WARNING look here")
    assert context.work == tmp_path


def test_an_interrupted_stage_claims_no_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()

    def stop() -> None:
        with make_context(tmp_path).progress("rollout 3", 10) as advance:
            advance(4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert capsys.readouterr().err == ""


def test_logging_twice_writes_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    configure_logging()
    logging.getLogger("papo").info("once")
    assert capsys.readouterr().err.count("once") == 1

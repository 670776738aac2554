"""Which replies hold one verdict, and that no other does."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from papo.core.replies import Said, UnreadableError, read_reply

GOOD = '{"reason": "so", "verdict": "complete"}'
SAID = Said("so", "complete", line=False)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"\n  {GOOD}\n",
        '{"verdict":"complete","reason":"so"}',
        f"```json\n{GOOD}\n```",
        f"```\n{GOOD}\n  ```\n",
        f"<think>{{}} verdict: failed</think>\n{GOOD}",
        f"<think>\n</think>```json\n{GOOD}\n```",
        f'the server kept the first tag; {{"verdict": "failed"}}</think>{GOOD}',
        f"<|channel|>analysis<|message|>verdict: failed<|end|><|start|>assistant<|channel|>final<|message|>{GOOD}<|return|>",
        f"analysisWe see verdict: failed.assistantfinal{GOOD}",
        f"<|channel|>final<|message|>{GOOD}<|end|>",
    ],
)
def test_one_json_object_is_read(text: str) -> None:
    assert read_reply(text) == SAID


@pytest.mark.parametrize("verdict", ["x", 7, 0.5, None, True, [1, 2], {"a": "b"}, []])
def test_what_a_verdict_may_be_is_left_to_the_rubric(verdict: Any) -> None:
    assert read_reply(json.dumps({"verdict": verdict})) == Said("", verdict, line=False)


@pytest.mark.parametrize(
    ("text", "reason", "verdict"),
    [
        ("verdict: complete", "", "complete"),
        ("All of it holds.\n\n  1. so\nVerdict:\t2, 5  \n", "All of it holds.\n\n  1. so", "2, 5"),
        ("<think>verdict: failed, verdict: gaps</think>so\nverdict: complete", "so", "complete"),
        ("```\nso\nverdict: complete\n```", "so", "complete"),
        ("verdict: what I find is: much", "", "what I find is: much"),
    ],
)
def test_a_last_line_is_read(text: str, reason: str, verdict: str) -> None:
    assert read_reply(text) == Said(reason, verdict, line=True)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("<think>so</think>", "empty"),
        ("```\n\n```", "empty"),
        ("complete", "no verdict"),
        ("1", "no verdict"),
        ("I give it 0.5 of 1.", "no verdict"),
        ("{}", "no verdict"),
        ('{"reason": "complete"}', "no verdict"),
        ('{"Verdict": "complete"}', "no verdict"),
        ('{"reason": {"verdict": "complete"}}', "no verdict"),
        (GOOD + GOOD, "not exactly one JSON object, or a key twice"),
        (GOOD + "\n" + GOOD, "not exactly one JSON object, or a key twice"),
        (GOOD + " I am sure.", "not exactly one JSON object, or a key twice"),
        (GOOD[:-1], "not exactly one JSON object, or a key twice"),
        (GOOD[:-3], "not exactly one JSON object, or a key twice"),
        ('{"verdict": "complete", "verdict": "complete"}', "not exactly one JSON object, or a key twice"),
        ('{"verdict": {"a": 1, "a": 0}}', "not exactly one JSON object, or a key twice"),
        ('{"verdict": NaN}', "not exactly one JSON object, or a key twice"),
        ('{"verdict": -Infinity}', "not exactly one JSON object, or a key twice"),
        ("{'verdict': 'complete'}", "not exactly one JSON object, or a key twice"),
        ('{"verdict": ' + "[" * 100_000, "not exactly one JSON object, or a key twice"),
        ('{"verdict": ' + "9" * 5_000 + "}", "not exactly one JSON object, or a key twice"),
        ('{"verdict": "complete", "score": 0}', "another key than reason and verdict"),
        ('{"verdict": "complete", "reason": 1}', "the reason is no text"),
        ('{"verdict": "complete", "reason": null}', "the reason is no text"),
        (f"[{GOOD}]", "the last line is no verdict"),
        (f"Here it is: {GOOD}", "the last line is no verdict"),
        (f"```json\n{GOOD}\n```\n```json\n{GOOD}\n```", "not exactly one JSON object, or a key twice"),
        (f"So:\n```json\n{GOOD}\n```\n```json\n{GOOD}\n```", "several verdicts"),
        ("verdict: gaps\nverdict: gaps", "several verdicts"),
        ("My verdict follows.\nverdict: gaps", "several verdicts"),
        ("verdict: gaps or verdict: complete", "several verdicts"),
        ("verdict: gaps\nThat is all.", "the last line is no verdict"),
        ("so, verdict: gaps", "the last line is no verdict"),
        ("verdict:", "the last line is no verdict"),
        ("verdict gaps", "the last line is no verdict"),
        ("**verdict: gaps**", "the last line is no verdict"),
        ('"verdict": "gaps"', "the last line is no verdict"),
        ("<think>so\nverdict: gaps", "the reasoning does not end"),
        (f"<think>{GOOD}", "the reasoning does not end"),
        ("a</think>b</think>verdict: gaps", "markup, or reasoning that does not end"),
        ("so <think> x\nverdict: gaps", "markup, or reasoning that does not end"),
        ("<|channel|>analysis<|message|>so\nverdict: gaps", "the reasoning does not end"),
        ("analysisWe see.\nverdict: gaps", "the reasoning does not end"),
        ("<|start|>assistant\nverdict: gaps", "markup, or reasoning that does not end"),
        ("analysis a assistantfinal b assistantfinal\nverdict: gaps", "markup, or reasoning that does not end"),
        ("<html><body>502</body></html>", "markup, or reasoning that does not end"),
        ("<!DOCTYPE html>\nverdict: gaps", "markup, or reasoning that does not end"),
        ("null", "no verdict"),
    ],
)
def test_anything_else_is_unreadable(text: str, cause: str) -> None:
    with pytest.raises(UnreadableError) as caught:
        read_reply(text)
    assert str(caught.value) == cause


@given(st.text())
def test_random_text_is_unreadable(text: str) -> None:
    with pytest.raises(UnreadableError):
        read_reply(text)


PIECES = [
    GOOD, '{"verdict": 1}', '{"verdict": "gaps", "reason": "the verdict: failed"}', '{"verdict": [', '"verdict"', '"reason"', "verdict",
    "verdict: gaps", "Verdict: complete", "{", "}", "[", "]", '"', ":", ",", "\n", "```", "```json\n", "\n```", "<think>", "</think>",
    "analysis", "assistantfinal", "<|channel|>final<|message|>", "<|end|>", "complete", "0.5", "1", "so", " ", "\\", "\x00", "é",
]  # fmt: skip
# What may stand before a verdict and be dropped; what remains is looked at.
DROPPED = re.compile(r".*?</think>|.*?assistantfinal|<\|channel\|>final<\|message\|>", re.DOTALL)


@given(st.lists(st.sampled_from(PIECES), max_size=8))
def test_what_is_read_held_one_verdict(pieces: list[str]) -> None:
    """Counted in another way: of what remains without reasoning and without the texts of a reason, the word is there once."""
    text = "".join(pieces)
    try:
        said = read_reply(text)
    except UnreadableError:
        return
    remains = {text, *(text[found.end() :] for found in [DROPPED.match(text)] if found)}
    counts = {one.replace(said.reason, "", 1).lower().count("verdict") for one in remains}
    assert 1 in counts, text
    assert said.verdict in ("complete", 1, "gaps") or said.line, text

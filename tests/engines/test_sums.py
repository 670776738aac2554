"""The generated problems and traces: valid, held out, seeded, and mixed as the params say."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from papo.core.answers import extract_boxed
from papo.engines.protocols import JudgeItem
from papo.engines.sources import make_source
from papo.engines.sources.sums import SumsSource, prompt_of, solution_of
from papo.errors import DataError
from papo.params import PrepareParams, SumsParams, Tier

SMALL = SumsParams(
    train=Tier(min_terms=3, max_terms=5, problems=300),
    eval={
        "same": Tier(min_terms=3, max_terms=5, problems=100),
        "harder": Tier(min_terms=6, max_terms=6, problems=50),
    },
    traces=500,
)


def terms_of(prompt: str) -> list[int]:
    """The terms of a prompt, read by another way than they were written."""
    assert re.fullmatch(r"[1-9]([+-][1-9])*=\?\n", prompt), prompt
    return [int(term) for term in re.findall(r"[+-]?\d", prompt)]


def test_problems_are_one_digit_sums_that_never_go_below_zero_with_the_right_answer() -> None:
    source = SumsSource(SMALL, seed=0)
    problems = [*source.train(), *(p for items in source.benchmarks().values() for p in items)]
    assert len(problems) == 450
    for problem in problems:
        terms = terms_of(problem.prompt)
        running = [sum(terms[: at + 1]) for at in range(len(terms))]
        assert min(running) >= 0
        assert problem.answer == str(running[-1])
        assert problem.source == "sums"
        assert problem.tier == f"{len(terms)} terms"
    assert any(term < 0 for problem in problems for term in terms_of(problem.prompt))
    assert any(problem.answer == "0" for problem in problems)


def test_reference_solutions_are_what_the_judge_calls_perfect() -> None:
    from papo.engines.judges.steps import StepsJudge

    problems = list(SumsSource(SMALL, seed=0).train())
    items = [JudgeItem(problem.prompt, None, problem.reference_solution or "") for problem in problems]
    assert {judgement.score for judgement in StepsJudge().judge(items, lambda _: None)} == {1.0}
    assert all(extract_boxed(p.reference_solution or "") == p.answer for p in problems)
    assert solution_of([3, 5, -2]) == "3+5=8\n8-2=6\n\\boxed{6}"
    assert prompt_of([3, 5, -2]) == "3+5-2=?\n"


def test_each_part_has_the_size_and_the_number_of_terms_asked_for() -> None:
    source = SumsSource(SMALL, seed=3)
    benchmarks = {name: list(problems) for name, problems in source.benchmarks().items()}
    assert {name: len(problems) for name, problems in benchmarks.items()} == {"same": 100, "harder": 50}
    train = list(source.train())
    assert len(train) == 300
    assert {len(terms_of(problem.prompt)) for problem in train} == {3, 4, 5}
    assert {len(terms_of(problem.prompt)) for problem in benchmarks["harder"]} == {6}
    assert len(list(source.traces())) == 500


def test_nothing_is_in_two_parts_and_nothing_twice() -> None:
    # Small enough a space (81 first pairs) that without care the parts would overlap.
    params = SumsParams(
        train=Tier(min_terms=2, max_terms=2, problems=60),
        eval={
            "a": Tier(min_terms=2, max_terms=2, problems=20),
            "b": Tier(min_terms=2, max_terms=3, problems=20),
        },
        traces=400,
    )
    source = SumsSource(params, seed=0)
    parts = [[p.prompt for p in items] for items in (source.train(), *source.benchmarks().values())]
    prompts = [prompt for part in parts for prompt in part]
    assert len(prompts) == len(set(prompts)) == 100
    held_out = {prompt for part in parts[1:] for prompt in part}
    assert not held_out & {prompt for prompt, _ in source.traces()}


def test_a_seed_decides_everything() -> None:
    def everything(seed: int) -> list[object]:
        source = SumsSource(SMALL, seed=seed)
        return [list(source.train()), {k: list(v) for k, v in source.benchmarks().items()}, list(source.traces())]

    first, second = everything(0), everything(1)
    assert first == everything(0)
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_a_source_can_be_read_twice() -> None:
    source = SumsSource(SMALL, seed=0)
    assert list(source.train()) == list(source.train())
    assert list(source.traces()) == list(source.traces())


def test_the_parts_draw_from_streams_of_their_own() -> None:
    source = SumsSource(SMALL, seed=0)
    more_traces = SumsSource(SMALL.model_copy(update={"traces": 900}), seed=0)
    assert list(more_traces.train()) == list(source.train())
    assert list(more_traces.traces())[:500] == list(source.traces())
    fewer = SMALL.model_copy(update={"train": Tier(min_terms=3, max_terms=5, problems=100)})
    assert list(SumsSource(fewer, seed=0).train()) == list(source.train())[:100]
    assert list(SumsSource(fewer, seed=0).benchmarks()["same"]) == list(source.benchmarks()["same"])


def style_of(prompt: str, trace: str) -> str:
    *lines, _ = trace.split("\n")
    if not lines:
        return "bare"
    operations = [len(re.findall(r"[+-]", line)) for line in lines]
    needed = len(terms_of(prompt)) - 1
    return "merged" if max(operations) > 1 else "verbose" if len(lines) > needed else "full"


def test_traces_mix_the_styles_in_the_shares_asked_for() -> None:
    params = SMALL.model_copy(update={"traces": 8000})
    traces = list(SumsSource(params, seed=0).traces())
    shares = {style: count / 8000 for style, count in Counter(style_of(*trace) for trace in traces).items()}
    # Four standard deviations of a share of 8,000 draws are 0.022 at most.
    assert shares == pytest.approx({"bare": 0.30, "merged": 0.20, "verbose": 0.15, "full": 0.35}, abs=0.022)
    bare = [trace for trace in traces if style_of(*trace) == "bare"]
    wrong = sum(int(extract_boxed(text) or -1) != sum(terms_of(prompt)) for prompt, text in bare)
    # A wrong answer below zero is written as 0, so a few of the 10 % are right after all.
    assert 0.07 < wrong / len(bare) < 0.13


def test_wrong_steps_come_as_often_as_asked_and_the_box_follows_the_steps() -> None:
    params = SMALL.model_copy(update={"traces": 4000, "wrong_step_share": 0.1, "verbose_share": 0.0})
    steps = wrong = 0
    for prompt, text in SumsSource(params, seed=0).traces():
        *lines, box = text.split("\n")
        for line in lines:
            expression, result = line.split("=")
            value = sum(map(int, re.findall(r"[+-]?\d+", expression)))
            steps, wrong = steps + 1, wrong + (value != int(result))
        if lines:
            assert box == f"\\boxed{{{lines[-1].split('=')[1]}}}", prompt
    assert wrong / steps == pytest.approx(0.1, abs=0.02)


def test_padding_is_true_and_beside_the_point() -> None:
    params = SMALL.model_copy(
        update={"verbose_share": 1.0, "bare_share": 0.0, "merged_share": 0.0, "wrong_step_share": 0.0}
    )
    for prompt, text in SumsSource(params, seed=0).traces():
        *lines, box = text.split("\n")
        assert 2 <= len(lines) - (len(terms_of(prompt)) - 1) <= 6
        assert all(sum(map(int, re.findall(r"[+-]?\d+", a))) == int(b) for a, b in (x.split("=") for x in lines))
        assert box == f"\\boxed{{{sum(terms_of(prompt))}}}"


@pytest.mark.parametrize(
    ("params", "where"),
    [
        (SumsParams(train=Tier(min_terms=2, max_terms=2, problems=200), eval={}), "train"),
        (SumsParams(eval={"tiny": Tier(min_terms=2, max_terms=2, problems=127)}), "tiny"),
    ],
)
def test_more_problems_than_there_are_is_an_error(params: SumsParams, where: str) -> None:
    # There are 81 sums and 45 differences of two terms: 126 problems.
    with pytest.raises(DataError, match=r"only 1.. different problems of 2 terms") as caught:
        SumsSource(params, seed=0)
    assert caught.value.where == f"prepare.sums, {where}"


def test_the_prompt_template_words_the_problem_and_nothing_else() -> None:
    template = "Compute {prompt} and box it as \\boxed{{8}}."
    plain, worded = SumsSource(SMALL, seed=0), SumsSource(SMALL, seed=0, prompt_template=template)
    first = next(plain.train())
    assert next(worded.train()).prompt == f"Compute {first.prompt.strip()} and box it as \\boxed{{8}}."
    assert [p.answer for p in worded.train()] == [p.answer for p in plain.train()]
    assert next(worded.benchmarks()["harder"]).prompt.startswith("Compute ")
    prompt, completion = next(plain.traces())
    assert next(worded.traces()) == (f"Compute {prompt.strip()} and box it as \\boxed{{8}}.", completion)


def test_make_source_passes_seed_and_template_on() -> None:
    source = make_source(PrepareParams(sums=SMALL, seed=7, prompt_template="> {prompt}"))
    expected = SumsSource(SMALL, seed=7, prompt_template="> {prompt}")
    assert list(source.train()) == list(expected.train())

"""prepare: content ids, no problem twice, none in training that is in a benchmark, drops with reasons, tiers, the card."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from papo.engines.protocols import Drop, Problem
from papo.engines.sources import make_source
from papo.errors import DataError
from papo.params import ColumnsParams, PrepareParams, TiersParams
from papo.schemas import DROPPED, PROBLEMS, TRACES, problem_id
from papo.stages import prepare
from papo.store.manifest import Context, Manifest
from papo.store.tables import read_rows


def problem(prompt: str, answer: str = "1", **more: Any) -> Problem:
    return Problem(prompt=prompt, answer=answer, reference_solution=None, source="test", **more)


class FakeSource:
    def __init__(
        self,
        train: Sequence[Problem | Drop],
        benchmarks: Mapping[str, Sequence[Problem | Drop]] | None = None,
        traces: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._train, self._benchmarks, self._traces = train, benchmarks or {}, traces
        self.calls = 0

    def train(self) -> Iterator[Problem | Drop]:
        self.calls += 1
        return iter(self._train)

    def benchmarks(self) -> Mapping[str, Iterator[Problem | Drop]]:
        return {name: iter(problems) for name, problems in self._benchmarks.items()}

    def traces(self) -> Iterator[tuple[str, str]]:
        return iter(self._traces)


def run(
    out: Path,
    source: FakeSource,
    context: Context,
    params: PrepareParams = PrepareParams(),  # noqa: B008  # frozen
    unreadable: prepare.Unreadable = lambda golds: {},
) -> Manifest:
    return prepare.run(params, prepare.Inputs(files={}), out, engine=source, unreadable=unreadable, context=context)


def prompts(path: Path) -> list[str]:
    return [row["prompt"] for row in read_rows(path, PROBLEMS)]


def test_the_tables(tmp_path: Path, context: Context) -> None:
    source = FakeSource(
        [problem("a", tier="t", pass_rate=0.5), problem("b", "2")], {"bench": [problem("c")]}, [("a", "x")]
    )
    manifest = run(tmp_path / "problems", source, context)
    first, second = read_rows(tmp_path / "problems/train.parquet", PROBLEMS)
    assert first == {
        "problem_id": problem_id("a", "1"), "prompt": "a", "answer": "1", "reference_solution": None, "source": "test",
        "tier": "t", "pass_rate": 0.5, "split": "train", "grading": "{}",
    }  # fmt: skip
    assert (second["prompt"], second["tier"], second["pass_rate"]) == ("b", None, None)
    (held_out,) = read_rows(tmp_path / "problems/eval/bench.parquet", PROBLEMS)
    assert (held_out["prompt"], held_out["split"]) == ("c", "eval")
    assert read_rows(tmp_path / "problems/traces.parquet", TRACES) == [{"prompt": "a", "completion": "x"}]
    assert manifest.counts == {"train": 2, "contaminated": 0, "not_drawn": 0, "traces": 1, "bench": 1}


def test_a_second_run_does_nothing(tmp_path: Path, context: Context) -> None:
    source = FakeSource([problem("a")])
    assert not run(tmp_path / "problems", source, context).skipped
    assert run(tmp_path / "problems", source, context).skipped
    assert source.calls == 1


def test_a_training_problem_of_a_benchmark_is_left_out_and_counted(tmp_path: Path, context: Context) -> None:
    source = FakeSource(
        [problem("a", "1"), problem("b", "2"), problem("c", "3")],
        {"one": [problem("b", "2")], "two": [problem("c", "3.0"), problem("d")]},
    )
    manifest = run(tmp_path / "problems", source, context)
    assert prompts(tmp_path / "problems/train.parquet") == ["a"]
    assert manifest.counts["contaminated"] == 2
    assert read_rows(tmp_path / "problems/dropped.parquet", DROPPED) == [
        {"set": "train", "source": "test", "row": None, "reason": "contaminated", "detail": "equal", "prompt": prompt,
         "benchmark": benchmark, "match_id": problem_id(prompt, answer), "score": 1.0}
        for prompt, benchmark, answer in (("b", "one", "2"), ("c", "two", "3.0"))
    ]  # fmt: skip


LONG = "A farmer has {n} hens, each of which lays {m} eggs a day; how many {word} does she collect in one week?"


def test_a_near_match_is_left_out_with_the_problem_it_is_like(tmp_path: Path, context: Context) -> None:
    planted, gold = LONG.format(n=12, m=2, word="eggs"), LONG.format(n=12, m=2, word="of them")
    source = FakeSource([problem(planted, "168"), problem("How far is it?")], {"bench": [problem(gold, "168")]})
    run(tmp_path / "problems", source, context)
    (row,) = read_rows(tmp_path / "problems/dropped.parquet", DROPPED)
    assert (row["detail"], row["benchmark"], row["match_id"]) == ("near", "bench", problem_id(gold, "168"))
    assert 0.9 < row["score"] < 1.0
    run(tmp_path / "all", source, context, PrepareParams(near_match=None))
    assert len(prompts(tmp_path / "all/train.parquet")) == 2


def test_a_gold_answer_of_a_benchmark_that_cannot_be_read_is_kept_and_told(
    tmp_path: Path, context: Context, warned: list[str]
) -> None:
    source = FakeSource([problem("a")], {"bench": [problem("b"), problem("c", "\\frac{")]})
    unreadable = {"\\frac{": "unparsable_gold"}
    run(tmp_path / "problems", source, context, unreadable=lambda golds: unreadable)
    assert prompts(tmp_path / "problems/eval/bench.parquet") == ["b", "c"]
    assert warned == ["1 gold answers of bench are not readable as mathematics, and compared only as text: '\\\\frac{'"]


def test_every_drop_has_its_reason(tmp_path: Path, context: Context) -> None:
    items = [
        problem("good"),
        Drop("file", 3, "proof_only", "", "Prove it."),
        problem("long" * 20, row=4),
        problem("unreadable", "\\frac{", row=5),
        problem("hopeless", pass_rate=0.0, row=6),
        problem("good, too", pass_rate=0.25),
    ]
    manifest = run(
        tmp_path / "problems",
        FakeSource(items, {"bench": [problem("c"), Drop("other", 0, "marked_error", "error is 1", "d")]}),
        context,
        PrepareParams(max_prompt_chars=79),
        unreadable=lambda golds: dict.fromkeys({"\\frac{"} & set(golds), "unparsable_gold"),
    )
    assert prompts(tmp_path / "problems/train.parquet") == ["good", "good, too"]
    rows = read_rows(tmp_path / "problems/dropped.parquet", DROPPED)
    assert [(row["set"], row["row"], row["reason"], row["detail"]) for row in rows] == [
        ("train", 3, "proof_only", ""),
        ("train", 4, "too_long", "80 characters"),
        ("train", 5, "unparsable_gold", "\\frac{ (unparsable_gold)"),
        ("train", 6, "never_solved", "pass rate 0"),
        ("bench", 0, "marked_error", "error is 1"),
    ]
    dropped = {key: count for key, count in manifest.counts.items() if "dropped" in key}
    assert dropped == {
        "bench dropped, marked_error": 1, "train dropped, proof_only": 1, "train dropped, too_long": 1,
        "train dropped, unparsable_gold": 1, "train dropped, never_solved": 1,
    }  # fmt: skip
    kept = run(tmp_path / "all", FakeSource(items), context, PrepareParams(drop_never_solved=False))
    assert kept.counts["train"] == 5


def test_the_limits_are_for_training_alone(tmp_path: Path, context: Context) -> None:
    source = FakeSource([problem("a")], {"bench": [problem("long" * 20, pass_rate=0.0)]})
    assert run(tmp_path / "problems", source, context, PrepareParams(max_prompt_chars=79)).counts["bench"] == 1


@pytest.mark.parametrize(
    ("pass_rate", "tier"),
    [(0.0, None), (1e-9, "0-0.125"), (0.125, "0-0.125"), (0.1251, "0.125-0.375"), (0.375, "0.125-0.375"),
     (0.5, "0.375-0.625"), (0.625, "0.375-0.625"), (0.875, "0.625-0.875"), (0.876, "0.875-1"), (1.0, "0.875-1")],
)  # fmt: skip
def test_the_five_tiers(pass_rate: float, tier: str | None) -> None:
    assert prepare.tier_of(pass_rate) == tier


TIERED = [
    problem(f"{rate} {n}", pass_rate=rate) for rate in (0.1, 0.3, 0.5, 0.7, 0.9) for n in range(10 if rate < 0.8 else 2)
]


def test_as_many_of_each_tier_and_a_tier_with_too_few_says_so(
    tmp_path: Path, context: Context, warned: list[str]
) -> None:
    def draw(name: str, seed: int) -> list[str]:
        params = PrepareParams(tiers=TiersParams(per_tier=4, pass_rate="rate"), seed=seed)
        run(tmp_path / name, FakeSource([*TIERED, problem("unrated")]), context, params)
        return prompts(tmp_path / name / "train.parquet")

    drawn = draw("one", 0)
    tiers = Counter(row["tier"] for row in read_rows(tmp_path / "one/train.parquet", PROBLEMS))
    assert tiers == {"0-0.125": 4, "0.125-0.375": 4, "0.375-0.625": 4, "0.625-0.875": 4, "0.875-1": 2}
    assert warned == ["the tier 0.875-1 of the pass rate has 2 problems, 4 asked for"]
    assert draw("same", 0) == drawn != draw("other", 1)


def test_tiers_without_any_pass_rate(tmp_path: Path, context: Context) -> None:
    params = PrepareParams(tiers=TiersParams(per_tier=4, pass_rate="rate"))
    with pytest.raises(DataError, match="none of 2 training problems has a pass rate above 0"):
        run(tmp_path / "problems", FakeSource([problem("a"), problem("b")]), context, params)


def test_what_is_not_drawn_is_counted(tmp_path: Path, context: Context) -> None:
    manifest = run(tmp_path / "problems", FakeSource(TIERED), context, PrepareParams(max_problems=5))
    assert (manifest.counts["train"], manifest.counts["not_drawn"], manifest.rows) == (5, 37, 5)


def test_the_card(tmp_path: Path, context: Context) -> None:
    items = [
        problem("aa", "1", tier="t", format="math"),
        problem("bbbb", "22", format="math"),
        Drop("f", 0, "proof_only", "", "p"),
    ]
    manifest = run(tmp_path / "problems", FakeSource(items, {"bench": [problem("c")]}, [("a", "x")]), context)
    card = json.loads((tmp_path / "problems/card.json").read_text())
    assert card["sets"]["train"] == {
        "problems": 2, "by_source": {"test": 2}, "by_tier": {"t": 1, "none": 1}, "by_kind": {"math": 2}, "with_solution": 0,
        "prompt_chars": {"mean": 3.0, "p95": pytest.approx(3.9), "max": 4.0},
        "answer_chars": {"mean": 1.5, "p95": pytest.approx(1.95), "max": 2.0},
        "digest": hashlib.sha256("\n".join(sorted([problem_id("aa", "1"), problem_id("bbbb", "22")])).encode()).hexdigest(),
    }  # fmt: skip
    assert card["dropped"] == {"train": {"proof_only": 1}, "bench": {}}
    assert (card["read_as"], card["seed"], card["traces"]) == ({"train": {"math": 2}, "bench": {}}, 0, 1)
    assert manifest.counts["train read as math"] == 2
    assert manifest.metrics == {
        "train/problems": 2, "train/prompt_chars_mean": 3, "train/by_tier/t": 1, "train/by_tier/none": 1,
        "bench/problems": 1, "bench/prompt_chars_mean": 1, "bench/by_tier/none": 1, "train/dropped/proof_only": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (FakeSource([]), "the training set holds no problems"),
        (FakeSource([problem("a")], {"bench": []}), "the benchmark bench holds no problems"),
        (
            FakeSource([problem("a"), problem("b"), problem("a", "2")]),
            "the training set holds 1 problems more than once",
        ),
        (FakeSource([problem("a")], {"bench": [problem("b"), problem("b")]}), "benchmark bench holds 1 problems more"),
        (FakeSource([problem("a")], {"bench": [problem("a")]}), "no problems after the drops: contaminated 1"),
        (FakeSource([Drop("f", 0, "proof_only", "", "p")] * 2), "no problems after the drops: proof_only 2"),
    ],
)
def test_what_cannot_be_used_is_refused_and_nothing_written(
    tmp_path: Path, context: Context, source: FakeSource, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        run(tmp_path / "problems", source, context)
    assert caught.value.fix
    assert list(tmp_path.iterdir()) == []


# Local files, by the real source.

VERL = [
    {"prompt": [{"role": "user", "content": f"What is {n}?"}], "reward_model": {"ground_truth": str(n), "style": "rule"},
     "extra": {"level": "easy", "rate": 0.25}}
    for n in range(4)
]  # fmt: skip
NESTED = ColumnsParams(
    prompt="prompt.0.content", answer="reward_model.ground_truth", tier="extra.level", pass_rate="extra.rate"
)


def write(path: Path, rows: Sequence[Any]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def from_file(params: PrepareParams, out: Path, context: Context) -> Manifest:
    inputs = prepare.Inputs(files=prepare.local_files(params))
    return prepare.run(params, inputs, out, engine=make_source(params), context=context)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_local_file_with_nested_columns(tmp_path: Path, context: Context, kind: str) -> None:
    source = write(tmp_path / f"verl.{kind}", VERL)
    params = PrepareParams(source=source, columns=NESTED, holdout=1, prompt_template="Q: {prompt}")
    manifest = from_file(params, tmp_path / "problems", context)
    train = read_rows(tmp_path / "problems/train.parquet", PROBLEMS)
    held_out = read_rows(tmp_path / "problems/eval/holdout.parquet", PROBLEMS)
    assert {(row["prompt"], row["answer"]) for row in train + held_out} == {
        (f"Q: What is {n}?", str(n)) for n in range(4)
    }
    assert {(row["tier"], row["pass_rate"], row["source"]) for row in train} == {("easy", 0.25, source)}
    assert manifest.counts == {
        "train": 3, "contaminated": 0, "not_drawn": 0, "traces": 0, "holdout": 1, "train read as columns": 4,
    }  # fmt: skip


def test_a_benchmark_of_its_own_file(tmp_path: Path, context: Context) -> None:
    rows = [{"prompt": str(n), "answer": str(n)} for n in range(5)]
    params = PrepareParams(
        source=write(tmp_path / "train.jsonl", rows), eval_sources={"mine": write(tmp_path / "eval.jsonl", rows[3:])}
    )
    assert from_file(params, tmp_path / "problems", context).counts == {
        "train": 3, "contaminated": 2, "not_drawn": 0, "traces": 0, "mine": 2, "train dropped, contaminated": 2,
        "train read as columns": 5, "mine read as columns": 2,
    }  # fmt: skip


def test_held_out_problems_are_the_rest_and_the_seed_decides_which(tmp_path: Path, context: Context) -> None:
    source = write(tmp_path / "source.jsonl", [{"prompt": f"{n}+1?", "answer": n + 1} for n in range(20)])

    def split(name: str, seed: int, **more: Any) -> tuple[list[str], list[str]]:
        from_file(PrepareParams(source=source, holdout=5, seed=seed, **more), tmp_path / name, context)
        return prompts(tmp_path / name / "train.parquet"), prompts(tmp_path / name / "eval/holdout.parquet")

    train, held_out = split("a", 0)
    assert (len(train), len(held_out), len({*train, *held_out})) == (15, 5, 20)
    assert split("b", 0) == (train, held_out)
    assert split("c", 1)[1] != held_out
    assert split("d", 0, max_problems=3) == (train[:3], held_out)


def test_a_problem_twice_is_dropped_from_training_and_refused_in_a_benchmark(tmp_path: Path, context: Context) -> None:
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}, {"prompt": "a", "answer": "1.0"}]
    source = write(tmp_path / "source.jsonl", rows)
    assert from_file(PrepareParams(source=source), tmp_path / "problems", context).counts["train"] == 2
    (row,) = read_rows(tmp_path / "problems/dropped.parquet", DROPPED)
    assert (row["reason"], row["row"], row["detail"]) == ("duplicate", 2, "of row 0")
    other = write(tmp_path / "other.jsonl", [{"prompt": "c", "answer": "3"}])
    with pytest.raises(DataError, match="the benchmark mine holds 1 problems more than once"):
        from_file(PrepareParams(source=other, eval_sources={"mine": source}), tmp_path / "none", context)
    assert not (tmp_path / "none").exists()


def test_a_changed_file_is_a_new_data_set(tmp_path: Path, context: Context) -> None:
    params = PrepareParams(source=write(tmp_path / "train.jsonl", [{"prompt": "a", "answer": "1"}]))
    assert not from_file(params, tmp_path / "problems", context).skipped
    assert from_file(params, tmp_path / "problems", context).skipped
    write(tmp_path / "train.jsonl", [{"prompt": "b", "answer": "22"}])
    assert not from_file(params, tmp_path / "problems", context).skipped
    assert [row["prompt"] for row in read_rows(tmp_path / "problems/train.parquet", PROBLEMS)] == ["b"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("rows", "columns", "message", "where"),
    [
        ([{"question": "a", "answer": "1"}], {}, "there is no column prompt", "row 0"),
        (
            VERL,
            {"prompt": "prompt.1.content", "answer": "reward_model.ground_truth"},
            "no column prompt.1.content",
            "row 0",
        ),
        (VERL, {"prompt": "prompt.0.content", "answer": "reward_model.truth"}, "no column reward_model.truth", "row 0"),
        ([{"prompt": "a", "answer": "1", "rate": "high"}], {"pass_rate": "rate"}, "column rate holds 'high'", "row 0"),
    ],
    ids=["missing", "missing in a list", "missing in a mapping", "no number"],
)
def test_a_row_that_cannot_be_read_is_named(
    tmp_path: Path, context: Context, kind: str, rows: list[Any], columns: dict[str, str], message: str, where: str
) -> None:
    source = write(tmp_path / f"data.{kind}", rows)
    with pytest.raises(DataError, match=message) as caught:
        from_file(PrepareParams(source=source, columns=ColumnsParams(**columns)), tmp_path / "problems", context)
    assert caught.value.where == f"{source}, {where}"
    assert not (tmp_path / "problems").exists()


def test_the_columns_there_are_named_too(tmp_path: Path, context: Context) -> None:
    source = write(tmp_path / "data.jsonl", [{"question": "a", "gold": "1"}])
    with pytest.raises(DataError) as caught:
        from_file(PrepareParams(source=source), tmp_path / "problems", context)
    assert "question, gold" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "there is no such file"),
        ("none.parquet", None, "there is no such file"),
        ("text.jsonl", b"no json at all\n", "the data set cannot be loaded"),
        ("text.parquet", b"no parquet at all\n", "the data set cannot be loaded"),
        ("empty.jsonl", b"", None),
        ("empty.parquet", b"", None),
    ],
)
def test_a_file_that_is_no_data_set_is_named(
    tmp_path: Path, context: Context, name: str, content: bytes | None, message: str | None
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        from_file(PrepareParams(source=str(path)), tmp_path / "problems", context)
    assert str(path) in caught.value.where


def test_more_held_out_than_there_is(tmp_path: Path, context: Context) -> None:
    source = write(tmp_path / "data.jsonl", [{"prompt": "a", "answer": "1"}])
    with pytest.raises(DataError, match="1 problems to hold out of 1"):
        from_file(PrepareParams(source=source, holdout=1), tmp_path / "problems", context)


# Real data.

DATA = Path(__file__).parents[3] / "shared/data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data are not beside this checkout")
def test_tiers_of_real_pass_rates_and_a_real_contamination(tmp_path: Path, context: Context, warned: list[str]) -> None:
    params = PrepareParams(
        source=str(DATA / "math_2560_with_pass_rates.parquet"),
        eval_sources={
            "amc-2023": str(DATA / "papo_release_amc2023.parquet"),
            "math-500": str(DATA / "math500.jsonl"),
            "olympiadbench": str(DATA / "olympiadbench_675.jsonl"),
            "aime-2024": {"source": str(DATA / "papo_release_aime2024.parquet"), "format": "aime"},
        },
        tiers=TiersParams(per_tier=40, pass_rate="extra_info.qwen2.5_7b_pass_rate"),
    )
    manifest = from_file(params, tmp_path / "problems", context)
    assert {name: manifest.counts[name] for name in params.eval_sources} == {
        "amc-2023": 40, "math-500": 500, "olympiadbench": 674, "aime-2024": 30,
    }  # fmt: skip
    assert manifest.counts["train dropped, never_solved"] == 1035
    tiers = Counter(row["tier"] for row in read_rows(tmp_path / "problems/train.parquet", PROBLEMS))
    assert tiers == {"0-0.125": 40, "0.125-0.375": 40, "0.375-0.625": 40, "0.625-0.875": 1}
    assert [message[:12] for message in warned] == ["the tier 0.6", "the tier 0.8"]
    found = [
        row for row in read_rows(tmp_path / "problems/dropped.parquet", DROPPED) if row["reason"] == "contaminated"
    ]
    assert {row["benchmark"] for row in found if row["score"] > 0.9} >= {"amc-2023", "olympiadbench"}
    assert any("right-handed" in row["prompt"] for row in found)
    assert len(found) < 20

"""The files of papo/benchmarks: what each says of prompt, extraction and metric, and what a user lays over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from papo.engines.protocols import Problem
from papo.engines.sources.formats import DatasetSource
from papo.errors import ParamsError
from papo.params import Params, PrepareParams, defined_benchmarks, load_params

DATA = Path(__file__).parents[2] / "shared/data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not beside the project")

NAMES = (
    "aime-2024", "aime-2025", "aime-2026", "gpqa-diamond", "gsm8k", "humaneval", "math-500", "olympiadbench",
)  # fmt: skip
FILES = {
    "gsm8k": "gsm8k_test.jsonl",
    "math-500": "math500.jsonl",
    "olympiadbench": "olympiadbench_675.jsonl",
    "humaneval": "humaneval.jsonl.gz",
    "aime-2024": "papo_release_aime2024.parquet",
    "aime-2025": "papo_release_aime2025.parquet",
    "aime-2026": "papo_release_aime2026.parquet",
}


def prepared(**sources: Any) -> PrepareParams:
    return PrepareParams.model_validate({"eval_sources": {name.replace("_", "-"): v for name, v in sources.items()}})


def problems(params: PrepareParams, warnings: list[str]) -> list[Problem]:
    ((_, items),) = DatasetSource(params, warn=warnings.append).benchmarks().items()
    return [item for item in items if isinstance(item, Problem)]


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_benchmarks_of_the_paper_are_there() -> None:
    assert tuple(defined_benchmarks()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_file_says_where_from_how_asked_and_what_is_told(name: str) -> None:
    assert {"source", "split", "problems", "prompt", "metric"} <= defined_benchmarks()[name].keys()
    source = PrepareParams.model_validate({"eval_sources": {name: None}}).eval_sources[name]
    assert source.source.count("/") == 1
    assert (source.extraction is None) == (name == "humaneval")
    assert source.prompt is not None
    assert "boxed{}" in source.prompt.format(prompt="") or name == "humaneval"


def test_another_source_keeps_the_prompt_and_not_the_place_in_the_hub() -> None:
    own = prepared(gsm8k="my.jsonl").eval_sources["gsm8k"]
    hub = prepared(gsm8k=None).eval_sources["gsm8k"]
    assert (hub.source, hub.subset, hub.split) == ("openai/gsm8k", "main", "test")
    assert (own.source, own.subset, own.split) == ("my.jsonl", None, None)
    assert (own.prompt, own.extraction, own.problems) == (hub.prompt, hub.extraction, 1319)


def test_a_mapping_is_laid_over_the_file_that_its_name_or_it_names() -> None:
    short = prepared(short={"benchmark": "math-500", "max_problems": 7, "metric": "maj_at_k"}).eval_sources["short"]
    assert (short.source, short.problems, short.max_problems) == ("HuggingFaceH4/MATH-500", 500, 7)
    params = Params.model_validate(
        {"prepare": {"source": "x.jsonl", "eval_sources": {"short": short}}, "evaluate": {"benchmarks": ["short"]}}
    )
    assert params.metric("short") == "maj_at_k"


def test_the_params_of_a_benchmark_are_the_same_when_they_are_read_again() -> None:
    params = prepared(gsm8k="my.jsonl", aime_2024=None, mine="own.jsonl")
    assert PrepareParams.model_validate(params.model_dump()) == params
    assert PrepareParams.model_validate(json.loads(params.model_dump_json())) == params


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{gsm9k: null}", "gsm9k is no file of papo/benchmarks (aime-2024, "),
        ("{a: {benchmark: gsm9k}}", "gsm9k is no file of papo/benchmarks (aime-2024, "),
        ("{gsm8k: {prompt: 'no place'}}", "eval_sources.gsm8k.prompt: must contain {prompt}"),
        ("{gsm8k: {metric: best}}", "eval_sources.gsm8k.metric: input should be 'avg_at_k'"),
        ("{gsm8k: {max_problems: 0}}", "eval_sources.gsm8k.max_problems: input should be greater"),
        ("{gsm8k: 3}", "eval_sources.gsm8k"),
    ],
)
def test_a_benchmark_that_cannot_be_is_refused_by_name(entry: str, message: str) -> None:
    with pytest.raises(ParamsError) as caught:
        load_params(None, overrides=[f"prepare.eval_sources={entry}"])
    assert message in caught.value.what


def test_the_prompt_and_the_extraction_are_those_of_the_benchmark(tmp_path: Path) -> None:
    rows = [{"question": "How many?", "answer": "#### 4"}, {"question": r"In a \boxed{}?", "answer": "#### 5"}]
    params = prepared(gsm8k={"source": written(tmp_path / "g.jsonl", *rows), "extraction": "answer_is"})
    params = params.model_copy(update={"prompt_template": "Training: {prompt}"})
    warnings: list[str] = []
    first, second = problems(params, warnings)
    assert first.prompt.startswith("How many?\n\nThink step by step")
    assert first.prompt.endswith("\\boxed{}.\n")
    assert first.grading.extraction == "answer_is"
    assert second.prompt == r"In a \boxed{}?"  # says itself how it is to be answered
    assert len(warnings) == 1
    assert warnings[0].startswith("gsm8k has 2 problems, 1319 are in a whole copy: ")


def test_a_template_without_a_box_is_laid_over_a_prompt_with_one(tmp_path: Path) -> None:
    source = written(tmp_path / "g.jsonl", {"question": r"In a \boxed{}?", "answer": "#### 5"})
    (problem,) = problems(prepared(gsm8k={"source": source, "prompt": "Now: {prompt}"}), [])
    assert problem.prompt == r"Now: In a \boxed{}?"


def test_a_part_is_drawn_by_the_seed_and_keeps_the_order(tmp_path: Path) -> None:
    rows = [{"question": f"{n} and {n}?", "answer": f"#### {2 * n}"} for n in range(50)]
    source = {"source": written(tmp_path / "g.jsonl", *rows), "problems": 50, "max_problems": 10}
    warnings: list[str] = []
    drawn = [problem.row for problem in problems(prepared(gsm8k=source), warnings)]
    assert len(drawn) == 10
    assert drawn == sorted(drawn, key=lambda row: row or 0)
    assert drawn == [problem.row for problem in problems(prepared(gsm8k=source), warnings)]
    other = prepared(gsm8k=source).model_copy(update={"seed": 1})
    assert drawn != [problem.row for problem in problems(other, warnings)]
    assert warnings == []


@real
@pytest.mark.parametrize("name", list(FILES))
def test_a_whole_real_copy_has_as_many_problems_as_its_file_says(name: str) -> None:
    warnings: list[str] = []
    params = PrepareParams.model_validate({"eval_sources": {name: str(DATA / FILES[name])}})
    found = problems(params, warnings)
    assert warnings == []
    assert len(found) == params.eval_sources[name].problems
    asked = [problem.prompt for problem in found]
    assert all("```python" in prompt if name == "humaneval" else "\\boxed{}" in prompt for prompt in asked)
    assert {problem.grading.kind for problem in found} == {"code" if name == "humaneval" else "math"}

from pathlib import Path

import pytest
import yaml

from papo.core.advantages import GUARDED_PENALTY
from papo.errors import ParamsError
from papo.params import PRESETS, Params, load_params

ROOT = Path(__file__).parents[1]


def test_the_embedded_default_is_what_params_yaml_says() -> None:
    assert load_params(ROOT / "params.yaml").model_dump() == Params().model_dump()


@pytest.mark.parametrize("preset", sorted((ROOT / PRESETS).glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_valid_and_changes_something(preset: Path) -> None:
    assert load_params(ROOT / "params.yaml", preset=preset) != load_params(ROOT / "params.yaml")


def test_the_paper_preset_carries_the_published_recipe() -> None:
    params = load_params(ROOT / "params.yaml", preset=ROOT / PRESETS / "paper-qwen2.5-7b.yaml")
    assert (params.rollout.prompts_per_round, params.rollout.group_size) == (128, 8)
    assert (params.rollout.temperature, params.rollout.max_prompt_tokens, params.rollout.max_new_tokens) == (
        1,
        2048,
        8192,
    )
    assert (params.train.learning_rate, params.train.betas, params.train.weight_decay) == (1e-6, (0.9, 0.999), 0.01)
    assert (params.train.max_grad_norm, params.train.clip_low, params.train.clip_high) == (1.0, 0.2, 0.28)
    assert (params.train.minibatch_prompts, params.train.loss) == (32, "token_mean")
    assert (params.advantage.variant, params.advantage.lam, params.advantage.eps) == ("papo", 1.0, 1e-6)
    assert (params.evaluate.samples_per_problem, params.evaluate.temperature, params.evaluate.top_p) == (4, 0.7, 1.0)


def test_the_preset_of_programs_asks_the_sandbox_and_the_judge_of_readability() -> None:
    params = load_params(ROOT / "params.yaml", preset=ROOT / PRESETS / "programs.yaml")
    assert (params.prepare.source, params.score_prm.judge, params.score_orm.workers) == ("programs", "readability", 2)
    assert params.evaluate.benchmarks == tuple(params.prepare.programs.eval)
    assert params.advantage == load_params(ROOT / "params.yaml").advantage


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("advantage.lamb=2", "advantage.lamb: no such key; did you mean advantage.lam?"),
        ("advantages.lam=2", "advantages: no such key; did you mean advantage?"),
        ("rollout.group_size=1", "rollout.group_size: input should be greater than or equal to 2, got 1"),
        ("advantage.lam=-0.5", "advantage.lam: input should be greater than or equal to 0, got -0.5"),
        ("rollout.temperature=0", "temperature 0 with group_size 8"),
        ("evaluate.temperature=0", "temperature 0 with samples_per_problem 4"),
        ("rollout.top_p=0.9", "top_p below 1"),
        ("run.rounds=0", "run.rounds: input should be greater than or equal to 1, got 0"),
        ("run.seed=abc", "run.seed: input should be a valid integer"),
        ("train.learning_rate=.nan", "train.learning_rate: input should be a finite number"),
        ("advantage.variant=ppo", "advantage.variant: input should be"),
        ("advantage={variant: convex, lam: 2}", "variant convex needs lam between 0 and 1"),
        ("advantage={variant: prm, guard: rank}", "guard rank"),
        ("advantage={variant: capo, guard: rank}", "guard rank has no process advantage to bound in variant capo"),
        ("advantage.w_whole=0", "advantage.w_whole: input should be greater than 0, got 0"),
        ("advantage.w_proc=-1", "advantage.w_proc: input should be greater than or equal to 0, got -1"),
        ("advantage.w_proc=2.5", "w_proc 2.5 is above w_whole 2"),
        ("advantage={variant: capo, w_whole: 0.5}", "w_proc 1 is above w_whole 0.5"),
        ("rollout.prompts_per_round=50", "must be a multiple of train.minibatch_prompts (16)"),
        ("prepare.prompt_template=solve this", "must contain {prompt}"),
        ("prepare.prompt_template='{prompt} in \\boxed{}'", "only {prompt} may stand in single braces"),
        ("prepare.sums={train: {min_terms: 5, max_terms: 3, problems: 9}}", "min_terms 5 is above max_terms 3"),
        (
            "prepare.programs={train: {min_operations: 4, max_operations: 3, problems: 9}}",
            "min_operations 4 is above max_operations 3",
        ),
        (
            "prepare.programs={train: {min_operations: 1, max_operations: 3, problems: 9}}",
            "greater than or equal to 2, got 1",
        ),
        (
            "prepare.programs={train: {min_operations: 2, max_operations: 9, problems: 9}}",
            "less than or equal to 8, got 9",
        ),
        (
            "prepare.programs={cramped_share: 0.3, terse_share: 0.5, padded_share: 0.3}",
            "cramped_share + terse_share + padded_share is 1.1, above 1",
        ),
        ("prepare.programs.wrong_share=1.5", "prepare.programs.wrong_share: input should be less than or equal to 1"),
        ("prepare.programs.wrong=0.5", "did you mean prepare.programs.wrong_share?"),
        (
            "prepare.source=programs",
            "sums-in-range is not made by prepare, which makes programs-in-range, programs-hard",
        ),
        ("score_prm.judge=readable", "score_prm.judge: input should be"),
        ("run=3", "run: input should be a valid dictionary"),
        ("score_orm.second_opinion={}", "score_orm.second_opinion.model: field required"),
        ("score_orm.second_opinion.model=''", "score_orm.second_opinion.model: string should have at least 1"),
        (
            "score_orm.second_opinion={model: m, concurrency: 0}",
            "score_orm.second_opinion.concurrency: input should be",
        ),
        ("score_orm.second_opinion={model: m, timeout_s: 0}", "score_orm.second_opinion.timeout_s: input should be"),
        ("score_orm.second_opinion={model: m, tries: 0}", "score_orm.second_opinion.tries: input should be"),
        ("score_orm.second_opinion={model: m, breaker: 0}", "score_orm.second_opinion.breaker: input should be"),
        ("score_orm.second_opinion={model: m, max_tokens: 0}", "score_orm.second_opinion.max_tokens: input should be"),
        ("score_orm.second_opinion={model: m, temperature: -1}", "score_orm.second_opinion.temperature: input should"),
        (
            "score_orm.second_opinion={model: m, requests_per_minute: 0}",
            "score_orm.second_opinion.requests_per_minute: input should be",
        ),
        (
            "score_orm.second_opinion={model: m, tokens_per_minute: -1}",
            "score_orm.second_opinion.tokens_per_minute: input should be",
        ),
        ("score_orm.second_opinion={model: m, base_ur: x}", "did you mean score_orm.second_opinion.base_url?"),
        ("score_orm.second_opinion={model: m, base_url: localhost}", "a base URL is http(s)://host[:port][/path]"),
        ("score_orm.second_opinion={model: m, base_url: 'ftp://a'}", "a base URL is http(s)://host[:port][/path]"),
        ("score_orm.second_opinion={model: m, base_url: 'http://[::'}", "a base URL is http(s)://host[:port][/path]"),
        (
            "score_orm.second_opinion={model: m, api_key_env: ''}",
            "api_key_env takes the name of an environment variable",
        ),
        ("evaluate.benchmarks=[nope]", "evaluate.benchmarks: nope is not made by prepare"),
    ],
)
def test_bad_values_are_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ParamsError, match="the params are not valid") as caught:
        load_params(ROOT / "params.yaml", overrides=[override])
    assert message in caught.value.what
    assert "--set" in caught.value.where
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "setting",
    [
        "api_key_env: sk-Secret123",
        "api_key: sk-Secret123",
        "base_url: 'https://me:sk-Secret123@host/v1'",
        "base_url: 'https://sk-Secret123:x@host/v1'",
        "base_url: 'https://host/v1?key=sk-Secret123'",
        "base_url: 'https://me:sk-Secret123'",
    ],
)
def test_a_key_in_the_wrong_place_is_refused_and_not_repeated(tmp_path: Path, setting: str) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(f"score_orm: {{second_opinion: {{model: m, {setting}}}}}")
    with pytest.raises(ParamsError, match="second_opinion") as caught:
        load_params(ROOT / "params.yaml", preset=preset)
    assert "Secret123" not in str(caught.value)


def test_a_second_opinion_is_off_and_set_key_by_key() -> None:
    assert Params().score_orm.second_opinion is None
    overrides = ["score_orm.second_opinion.model=m", "score_orm.second_opinion.base_url=http://127.0.0.1:8000/v1"]
    found = load_params(ROOT / "params.yaml", overrides=overrides).score_orm.second_opinion
    assert found is not None
    assert (found.model, found.base_url, found.api_key_env) == ("m", "http://127.0.0.1:8000/v1", "OPENAI_API_KEY")


@pytest.mark.parametrize("override", ["lam", "=1", "advantage.=1", "advantage.lam=[", ".a=1"])
def test_an_override_that_is_no_assignment_is_refused(override: str) -> None:
    with pytest.raises(ParamsError):
        load_params(ROOT / "params.yaml", overrides=[override])


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(ParamsError) as caught:
        load_params(ROOT / "params.yaml", overrides=["advantage.lam=-1", "run.rounds=0", "x=1"])
    assert caught.value.what.count("\n") == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1\n- 2\n", "holds a list"),
        ("a: [", "not readable as YAML"),
        ("run: {seed: 0, sead: 1}", "did you mean run.seed"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ParamsError, match=message) as caught:
        load_params(path)
    assert "bad.yaml" in caught.value.where


def test_a_preset_that_is_none_lists_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ParamsError, match="there is no preset 'nope'") as caught:
        load_params(preset="nope")
    assert "paper-qwen2.5-7b" in caught.value.fix


def test_overrides_beat_the_preset_and_the_preset_the_file(tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(yaml.safe_dump({"advantage": {"lam": 0.25, "guard": "rank"}}))
    params = load_params(ROOT / "params.yaml", preset=preset, overrides=["advantage.lam=0.75"])
    assert (params.advantage.lam, params.advantage.guard, params.advantage.variant) == (0.75, "rank", "papo")


def test_a_penalty_for_length_is_off_until_its_buffer_is_set() -> None:
    assert load_params(ROOT / "params.yaml").advantage.overlong is None
    params = load_params(ROOT / "params.yaml", overrides=["advantage.overlong.buffer=95", "advantage.guard=rank"])
    assert params.advantage.overlong is not None
    assert (params.advantage.overlong.buffer, params.advantage.overlong.factor) == (95, 0.5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["advantage.overlong.buffer=0"], "advantage.overlong.buffer: input should be greater than or equal to 1"),
        (["advantage.overlong.buffer=96"], r"buffer \(96\) must be below rollout.max_new_tokens \(96\)"),
        (["advantage.overlong.buffer=9", "rollout.max_new_tokens=8"], r"buffer \(9\) must be below .* \(8\)"),
        (["advantage.overlong={buffer: 8, factor: 0}"], "advantage.overlong.factor: input should be greater than 0"),
        (["advantage.overlong={factor: 1.0}"], "advantage.overlong.buffer: field required"),
        (["advantage.overlong={bufer: 8}"], "did you mean advantage.overlong.buffer"),
        (
            ["advantage.overlong={buffer: 8, factor: 1}", "advantage.guard=rank"],
            "guard rank needs overlong.factor 0.9 or less, got 1",
        ),
    ],
)
def test_an_impossible_penalty_for_length_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        load_params(ROOT / "params.yaml", overrides=overrides)


def test_the_largest_penalty_that_the_guard_takes_is_that_of_the_advantages() -> None:
    at_most = [f"advantage.overlong={{buffer: 8, factor: {GUARDED_PENALTY}}}", "advantage.guard=rank"]
    load_params(ROOT / "params.yaml", overrides=at_most)
    above = [f"advantage.overlong={{buffer: 8, factor: {GUARDED_PENALTY + 1e-9}}}", "advantage.guard=rank"]
    with pytest.raises(ParamsError, match="guard rank needs"):
        load_params(ROOT / "params.yaml", overrides=above)

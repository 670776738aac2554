"""PAPOTrainer: the pipeline's advantages inside TRL's GRPOTrainer, the process reward asked only where it counts."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sampling import SAMPLING

import papo
from papo.core.advantages import compute_advantages
from papo.engines.judges.steps import StepsJudge
from papo.engines.protocols import JudgeItem, VerifyItem
from papo.engines.verifiers import make_verifier
from papo.errors import DataError, ParamsError
from papo.params import AdvantageParams, ScoreOrmParams, ScorePrmParams
from papo.schemas import ADVANTAGES, PROBLEMS, ROLLOUTS, problem_id
from papo.stages import advantage, score_orm, score_prm
from papo.store.manifest import Context, Manifest
from papo.store.tables import read_rows, write_rows

# TRL 1.16 asks transformers 5.23 by a name that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SIZE = 4
TEMPLATE = "{% for message in messages %}{{ message.content }}{{ message.tool_calls or '' }}{% endfor %}"
ANSWERS = {"3+5-2=?\n": "6", "9-9=?\n": "0", "1+2+3=?\n": "6", "7+8=?\n": "15"}
# Of each problem four responses: mixed, all correct, one correct, none.
COMPLETIONS = {
    "3+5-2=?\n": ["3+5=8\n8-2=6\n\\boxed{6}", "\\boxed{6}", "3+5=8\n8-2=6\n0+6=6\n\\boxed{6}", "3+5=9\n9-2=7\n\\boxed{7}"],
    "9-9=?\n": ["9-9=0\n\\boxed{0}", "\\boxed{0}", "9-9=1\n\\boxed{0}", "9-9=0\n\\boxed{0}"],
    "1+2+3=?\n": ["1+2=3\n3+3=6\n\\boxed{6}", "1+2=4\n4+3=7\n\\boxed{7}", "\\boxed{5}", "\\boxed{"],
    "7+8=?\n": ["7+8=14\n\\boxed{14}", "\\boxed{1}", "\\boxed{16}", "7+8=15"],
}  # fmt: skip
TWICE = "9-9=0\n\\boxed{0}"
EACH = [prompt for prompt in ANSWERS for _ in range(SIZE)]
CORRECT = {completion for prompt in ("3+5-2=?\n", "9-9=?\n") for completion in COMPLETIONS[prompt]} - {
    COMPLETIONS["3+5-2=?\n"][3]
}


def outcome(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    verdicts = make_verifier(ScoreOrmParams()).verify(list(map(VerifyItem, answer, completions)), lambda _: None)
    return [verdict.score for verdict in verdicts]


class Process:
    """The steps judge as a reward; remembers what it was asked about."""

    def __init__(self, fail: Sequence[str] = (), critique: bool = False) -> None:
        self.asked: list[tuple[str, str]] = []
        self.__name__ = "judge"
        self._fail, self._critique = fail, critique

    def __call__(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[Any]:
        assert len(prompts) == len(completions) == len(completion_ids) == len(columns["answer"])
        assert columns["answer"] == [ANSWERS[prompt] for prompt in prompts]
        self.asked += zip(prompts, completions, strict=True)
        columns["log_extra"]("length", [len(completion) for completion in completions])
        found = StepsJudge().judge([JudgeItem(*pair) for pair in triples(prompts, completions)], lambda _: None)
        if self._critique:
            return [[number for number, wrong in enumerate(one.wrong_steps or [], 1) if wrong] for one in found]
        return [None if text in self._fail else one.score for text, one in zip(completions, found, strict=True)]


def triples(prompts: Sequence[str], completions: Sequence[str]) -> list[tuple[str, None, str]]:
    return [(prompt, None, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def replay(tokenizer: Any) -> Callable[..., dict[str, Any]]:
    """A `rollout_func`: the k-th time a prompt comes in a batch, its k-th completion."""

    def rollouts(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        seen: Counter[str] = Counter()
        texts = []
        for prompt in map(said, prompts):
            texts.append(COMPLETIONS[prompt][seen[prompt]])
            seen[prompt] += 1
        return {
            "prompt_ids": [tokenizer.encode(said(prompt)) for prompt in prompts],
            "completion_ids": [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts],
            "logprobs": None,
        }

    return rollouts


def completed(texts: Sequence[str]) -> Callable[..., dict[str, Any]]:
    """A `rollout_func` that gives these completions in this order."""

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        encode, end = trainer.processing_class.encode, trainer.processing_class.eos_token_id
        return {
            "prompt_ids": list(map(encode, prompts)),
            "completion_ids": [[*encode(text), end] for text in texts],
            "logprobs": None,
        }

    return rollouts


def said(messages: Any) -> str:
    """The text of a prompt or completion, also of a conversational one."""
    return messages if isinstance(messages, str) else messages[-1]["content"]


def of_messages(reward: Callable[..., Any]) -> Callable[..., Any]:
    """A reward of texts as one of conversations."""

    def ask(prompts: list[Any], completions: list[Any], **columns: Any) -> Any:
        assert all(isinstance(completion, list) for completion in completions)
        return reward(prompts=list(map(said, prompts)), completions=list(map(said, completions)), **columns)

    return ask


@pytest.fixture
def make(policy: Path, tmp_path: Path) -> Callable[..., Any]:
    """(rewards and config) -> a trainer on the four problems, each step on all of them."""
    import datasets
    from transformers import AutoTokenizer, LlamaForCausalLM

    from papo import PAPOConfig, PAPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(policy)

    def build(given: dict[str, Any] | None = None, **config: Any) -> Any:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 16, "num_generations": SIZE, "max_steps": 1,
            "learning_rate": 1e-3, "max_completion_length": 32, "logging_steps": 1, "activation_checkpointing": False,
            "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        }  # fmt: skip
        rewards = {"outcome_reward": outcome, "process_reward": Process()} if given is None else given
        others = {
            "train_dataset": datasets.Dataset.from_dict({"prompt": list(ANSWERS), "answer": list(ANSWERS.values())}),
            "processing_class": tokenizer,
            "rollout_func": replay(tokenizer),
        }
        model = LlamaForCausalLM.from_pretrained(policy)
        return PAPOTrainer(model=model, args=PAPOConfig(**settings | config), **others | rewards)

    return build


def batch(
    trainer: Any, prompts: Sequence[str] = EACH, *, chat: bool = False
) -> tuple[list[str], list[str], np.ndarray]:
    """(prompts, completions, advantages) of one generation batch, scored and not yet shuffled."""
    trainer.model.train()
    inputs: list[dict[str, Any]] = [{"prompt": prompt, "answer": ANSWERS[prompt]} for prompt in prompts]
    if chat:
        inputs = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in inputs]
    output = trainer._generate_and_score_completions(inputs)
    texts = trainer.processing_class.batch_decode(output["completion_ids"], skip_special_tokens=True)
    return list(prompts), texts, output["advantages"].numpy()


def scores(prompts: Sequence[str], texts: Sequence[str]) -> tuple[list[float], list[float]]:
    """Outcome of each response, and process score of those that `papo` needs one of."""
    orm = [float(text in CORRECT or text == COMPLETIONS["1+2+3=?\n"][0]) for text in texts]
    found = StepsJudge().judge([JudgeItem(*triple) for triple in triples(prompts, texts)], lambda _: None)
    prm = [one.score if text in CORRECT else None for one, text in zip(found, texts, strict=True)]
    return orm, [math.nan if score is None else score for score in prm]


def by_pipeline(folder: Path, tokenizer: Any, context: Context, **params: Any) -> list[dict[str, Any]]:
    """The advantages table that the stages make of the same rollouts."""
    problems = [
        {
            "problem_id": problem_id(prompt, answer),
            "prompt": prompt,
            "answer": answer,
            "grading": "{}",
            "source": "test",
            "split": "train",
        }
        for prompt, answer in ANSWERS.items()
    ]
    empty = {"reference_solution": None, "tier": None, "pass_rate": None}
    write_rows(folder / "problems.parquet", PROBLEMS, [row | empty for row in problems])
    rows = []
    for prompt, answer in ANSWERS.items():
        for index, text in enumerate(COMPLETIONS[prompt]):
            ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
            rows.append({
                "round": 0, "problem_id": problem_id(prompt, answer), "sample_index": index, "prompt": prompt,
                "prompt_ids": tokenizer.encode(prompt), "completion": text, "completion_ids": ids, "logprobs": [-1.0] * len(ids),
                "finish_reason": "stop", "policy_digest": "none", **SAMPLING, "seed": index, "max_new_tokens": 32,
            })  # fmt: skip
    paths = {name: folder / f"{name}.parquet" for name in ("problems", "rollouts", "orm", "prm", "advantages")}
    write_rows(paths["rollouts"], ROLLOUTS, rows)
    settings = AdvantageParams(**params)
    score_orm.run(
        ScoreOrmParams(), score_orm.Inputs(0, paths["rollouts"], paths["problems"]), paths["orm"],
        engine=make_verifier(ScoreOrmParams()), context=context,
    )  # fmt: skip
    score_prm.run(
        ScorePrmParams(), score_prm.Inputs(0, settings.variant, paths["rollouts"], paths["orm"], paths["problems"]),
        paths["prm"], engine=StepsJudge(), context=context,
    )  # fmt: skip
    engine, where = None, None
    if settings.variant == "capo":
        from papo.engines.tokenizer import TokenizerAligner

        tokenizer.save_pretrained(folder / "tokenizer")
        where = folder / "tokenizer/tokenizer.json"
        engine = TokenizerAligner(where)
    inputs = advantage.Inputs(0, paths["rollouts"], paths["orm"], paths["prm"], where)
    advantage.run(settings, inputs, paths["advantages"], engine=engine, context=context)
    return read_rows(paths["advantages"], ADVANTAGES)


@pytest.mark.parametrize("variant", ["papo", "orm", "prm", "mult", "fullnorm", "gdpo", "convex"])
def test_the_same_rollouts_get_the_advantages_of_the_pipeline(
    make: Callable[..., Any], tmp_path: Path, context: Context, variant: str
) -> None:
    trainer = make(variant=variant, lam=0.7)
    _, texts, found = batch(trainer)
    expected = by_pipeline(tmp_path, trainer.processing_class, context, variant=variant, lam=0.7)
    assert texts == [text for completions in COMPLETIONS.values() for text in completions]
    np.testing.assert_array_equal(found, np.array([row["advantage"] for row in expected], dtype=np.float32))
    assert np.any(found != 0.0)


@pytest.mark.parametrize("variant", ["papo", "mult", "capo"])
def test_the_penalty_for_length_is_that_of_the_pipeline(
    make: Callable[..., Any], tmp_path: Path, context: Context, variant: str
) -> None:
    judge = Process(critique=variant == "capo")
    rewards = {"outcome_reward": outcome, "process_reward": judge}
    trainer = make(rewards, variant=variant, overlong_buffer=24, overlong_factor=0.75)
    _, _, found = batch(trainer)
    overlong = {"buffer": 24, "factor": 0.75}
    expected = by_pipeline(tmp_path, trainer.processing_class, context, variant=variant, overlong=overlong)
    if variant == "capo":
        for tokens, row in zip(found, expected, strict=True):
            own = row["token_advantages"]
            np.testing.assert_allclose(tokens[: len(own)], own, atol=1e-6)
    else:
        np.testing.assert_array_equal(found, np.array([row["advantage"] for row in expected], dtype=np.float32))
    assert np.any(found != batch(make(rewards, variant=variant))[2])
    (signals,) = trainer.signals
    stored = Manifest.read(tmp_path / "advantages.parquet").metrics
    assert 0.0 < signals["overlong_share"] < 1.0
    for name in ("overlong_share", "overlong_penalty_mean", "outcome_alignment", "accuracy"):
        assert signals[name] == pytest.approx(stored[name], rel=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"overlong_buffer": 0}, "buffer is 0"),
        ({"overlong_buffer": 32}, "buffer is 32 and must be from 1 to below the limit of 32 tokens"),
        ({"overlong_buffer": 8, "overlong_factor": -0.5}, "factor is -0.5"),
        ({"overlong_buffer": 8, "max_completion_length": None}, "max_completion_length is None"),
        (
            {"overlong_buffer": 8, "overlong_factor": 1.0, "guard": "rank"},
            "guard 'rank' keeps the order with penalties",
        ),
    ],
)
def test_an_impossible_penalty_for_length_is_refused(
    make: Callable[..., Any], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParamsError, match=message):
        make(**config)


def test_training_moves_the_policy_and_logs_the_signals(make: Callable[..., Any]) -> None:
    trainer = make(max_steps=3)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert any(not before[name].equal(weight) for name, weight in trainer.model.named_parameters())
    steps = [row for row in trainer.state.log_history if "loss" in row]
    assert len(steps) == len(trainer.signals) == 3
    for row, signals in zip(steps, trainer.signals, strict=True):
        assert {name: row[f"papo/{name}"] for name in signals} == signals
        assert signals["accuracy"] == 8 / 16
        assert signals["groups_process_active_share"] == 0.5
        assert signals["outcome_alignment"] == pytest.approx(1)
        assert signals["truncated_share"] == 0.0
        assert row["rewards/judge/mean"] == pytest.approx(signals["prm_mean"])


@pytest.mark.parametrize(
    ("variant", "asked"),
    [("papo", 7), ("convex", 7), ("capo", 7), ("mult", 8), ("fullnorm", 8), ("prm", 16), ("orm", 0)],
)
def test_the_process_reward_is_asked_only_where_it_counts(make: Callable[..., Any], variant: str, asked: int) -> None:
    judge = Process(critique=variant == "capo")
    batch(make({"outcome_reward": outcome, "process_reward": judge}, variant=variant))
    assert len(judge.asked) == asked
    if asked == 7:
        assert {completion for _, completion in judge.asked} == CORRECT


def test_orm_needs_no_process_reward(make: Callable[..., Any]) -> None:
    _, _, found = batch(make({"outcome_reward": outcome}, variant="orm"))
    assert np.count_nonzero(found) == 8  # two mixed groups of four


def test_an_async_reward_with_failures_is_missing_and_not_zero(make: Callable[..., Any]) -> None:
    failing = COMPLETIONS["3+5-2=?\n"][0]
    judge = Process(fail=[failing])

    async def ask(**given: Any) -> list[float | None]:
        return judge(**given)

    trainer = make({"outcome_reward": outcome, "process_reward": ask})
    prompts, texts, found = batch(trainer)
    orm, prm = scores(prompts, texts)
    prm[0] = math.nan
    np.testing.assert_array_equal(found, compute_advantages(orm, prm, prompts).total.astype(np.float32))
    assert found[0] == compute_advantages(orm, prm, prompts, variant="orm").total.astype(np.float32)[0] > 0
    assert trainer._metrics["train"]["papo/judge_failure_share_error"] == [pytest.approx(1 / 7)]


def test_what_a_narrowed_reward_logs_goes_to_its_rows(make: Callable[..., Any]) -> None:
    trainer = make()
    _, texts, found = batch(trainer)
    logged = list(trainer._logs["extra"]["length"])
    expected = [len(text) if number < 3 or 4 <= number < 8 else None for number, text in enumerate(texts)]
    assert logged == expected
    np.testing.assert_allclose(list(trainer._logs["advantages"]), found, rtol=1e-6)


def test_rewards_with_roles_in_any_order(make: Callable[..., Any]) -> None:
    _, _, found = batch(make({"reward_funcs": [Process(), outcome]}, reward_roles=["process", "outcome"]))
    _, _, expected = batch(make())
    np.testing.assert_array_equal(found, expected)


def test_a_reward_model_as_process_reward(make: Callable[..., Any], policy: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig.from_pretrained(policy, num_labels=1)
    config.pad_token_id = 0
    model = LlamaForSequenceClassification(config)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    processing = {"reward_processing_classes": [None, tokenizer]}
    trainer = make({"outcome_reward": outcome, "process_reward": model} | processing)
    assert trainer.reward_funcs[1] is model
    _, texts, found = batch(trainer)
    assert found[8:].tolist() == batch(make({"outcome_reward": outcome}, variant="orm"))[2][8:].tolist()
    assert np.all(found[4:8] != 0.0)
    assert trainer.signals[0]["judge_failure_share"] == 0.0
    (recorded,) = (values for name, values in trainer._logs["rewards"].items() if name != "outcome")
    assert [math.isnan(score) for score in recorded] == [text not in CORRECT for text in texts]


def test_token_level_advantages_are_those_of_the_pipeline(
    make: Callable[..., Any], tmp_path: Path, context: Context
) -> None:
    trainer = make({"outcome_reward": outcome, "process_reward": Process(critique=True)}, variant="capo", max_steps=2)
    _, texts, found = batch(trainer)
    rows = by_pipeline(tmp_path, trainer.processing_class, context, variant="capo")
    assert found.shape[0] == 16
    for tokens, row in zip(found, rows, strict=True):
        expected = np.array(row["token_advantages"], dtype=np.float32)
        np.testing.assert_allclose(tokens[: expected.size], expected, atol=1e-6)
        assert not tokens[expected.size :].any()
    assert len(set(found[6, :7].tolist())) == 2  # `9-9=1` is debited, the box is not
    assert texts[6] == "9-9=1\n\\boxed{0}"
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_several_critiques_are_voted_on(make: Callable[..., Any]) -> None:
    def critics(completions: list[str], **_: Any) -> list[Any]:
        return [[[1], [1], []] if "9-9=1" in text else [[], [1], []] for text in completions]

    found = {}
    for vote in ("intersection", "majority", "union"):
        trainer = make({"outcome_reward": outcome, "process_reward": critics}, variant="capo", vote=vote)
        found[vote] = batch(trainer)[2][4:8]
    assert not found["intersection"].any()  # nobody is debited in a group where all are correct
    assert found["majority"][2, 0] < 0 < found["majority"][0, 0]
    assert found["union"][2, 0] < 0  # both are debited, the boxes gain
    assert found["union"][0, 0] < 0


@pytest.mark.parametrize("answer", [[9], [0], [[1], 2], [True], [1.0], ["1"], 0.5, "1"], ids=str)
def test_what_names_no_steps_is_refused(make: Callable[..., Any], answer: Any) -> None:
    def critic(completions: list[str], **_: Any) -> list[Any]:
        return [answer] * len(completions)

    trainer = make({"outcome_reward": outcome, "process_reward": critic}, variant="capo")
    with pytest.raises(DataError) as error:
        batch(trainer)
    assert error.value.what == f"process reward critic gave {answer!r} for a response of 3 steps"


def test_a_message_that_is_the_end_of_what_was_generated_has_its_own_steps(policy: Path) -> None:
    """As where the parser of a chat template keeps back what comes before the answer."""
    from transformers import AutoTokenizer

    from papo.engines.online import _Critic

    tokenizer = AutoTokenizer.from_pretrained(policy)
    ids = [*tokenizer.encode("7-7=7\n9-9=1\n\\boxed{0}"), tokenizer.eos_token_id]
    critic = _Critic(["9-9=1\n\\boxed{0}", "7"], [ids, ids], tokenizer.backend_tokenizer, "majority")
    assert critic.score(0, [1], "judge") == 0.5
    # 7-7=7 and the end of its line, 9-9=1 and the end of its line, the box in three tokens, the end of the text.
    assert critic.debits[0].tolist() == [0.0] * 6 + [1.0] * 6 + [0.0] * 4
    assert critic.score(1, None, "judge") is None
    assert critic.debits[1].isnan().all()
    with pytest.raises(DataError, match="not in what its token ids decode to"):
        _Critic(["9-9 = 1"], [ids], tokenizer.backend_tokenizer, "majority").score(0, [], "judge")


@pytest.mark.parametrize("variant", ["papo", "capo"])
@pytest.mark.parametrize(("accumulation", "steps"), [(1, 8), (2, 4)])
def test_generations_are_used_over_several_steps_and_iterations(
    make: Callable[..., Any], variant: str, accumulation: int, steps: int
) -> None:
    """All steps together are two passes over 16 rows, 4 at a time."""
    judge = Process(critique=variant == "capo")
    trainer = make(
        {"outcome_reward": outcome, "process_reward": judge}, variant=variant, per_device_train_batch_size=4,
        steps_per_generation=4, gradient_accumulation_steps=accumulation, num_iterations=2, max_steps=steps,
    )  # fmt: skip
    trainer.train()
    assert len(judge.asked) == 7
    assert len(trainer.signals) == 1
    # TRL has shuffled the rows and cut them into four parts; each still has its own advantages.
    _, texts, advantages = batch(trainer)
    expected = dict(zip(texts, advantages.tolist(), strict=True))
    parts = trainer._buffered_inputs
    assert [len(part["completion_ids"]) for part in parts] == [4] * 4
    for part in parts:
        found = trainer.processing_class.batch_decode(part["completion_ids"], skip_special_tokens=True)
        assert part["advantages"].tolist() == [
            expected.pop(text) if text != TWICE else expected[text] for text in found
        ]
    assert list(expected) == [TWICE]


def test_with_lora_only_the_adapter_learns(make: Callable[..., Any]) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make({"outcome_reward": outcome, "process_reward": Process(), "peft_config": config}, max_steps=3)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, weight in trainer.model.named_parameters() if not before[name].equal(weight)}
    assert moved
    assert all("lora_" in name for name in moved)


@pytest.mark.parametrize("variant", ["papo", "capo"])
def test_conversations_are_read_by_their_last_message(make: Callable[..., Any], variant: str) -> None:
    judge = Process(critique=variant == "capo")
    _, _, expected = batch(make({"outcome_reward": outcome, "process_reward": judge}, variant=variant))
    rewards = {"outcome_reward": of_messages(outcome), "process_reward": of_messages(judge)}
    trainer = make(rewards, variant=variant)
    trainer.processing_class.chat_template = TEMPLATE
    np.testing.assert_array_equal(batch(trainer, chat=True)[2], expected)


def test_a_stream_of_prompts(make: Callable[..., Any]) -> None:
    import datasets

    dataset = datasets.Dataset.from_dict({"prompt": list(ANSWERS), "answer": list(ANSWERS.values())})
    stream = {"train_dataset": dataset.to_iterable_dataset()}
    trainer = make({"outcome_reward": outcome, "process_reward": Process()} | stream)
    trainer.train()
    assert trainer.signals[0]["groups"] == 4
    assert trainer.signals[0]["accuracy"] == 0.5
    assert trainer.signals[0]["groups_process_active_share"] == 0.5


@pytest.mark.parametrize(("size", "groups", "zeros"), [(1, 4, 1.0), (4, 1, 0.0)])
def test_evaluation_has_groups_of_its_own(make: Callable[..., Any], size: int, groups: int, zeros: float) -> None:
    """The first prompt: three of its four completions are correct, and its first is."""
    import datasets

    judge = Process()
    given = {"outcome_reward": outcome, "process_reward": judge}
    data = {"prompt": [EACH[0]] * groups, "answer": [ANSWERS[EACH[0]]] * groups}
    evaluation = {"eval_dataset": datasets.Dataset.from_dict(data)}
    trainer = make(given | evaluation, num_generations_eval=size, per_device_eval_batch_size=4)
    trainer.evaluate()
    logged = trainer.state.log_history[-1]
    assert logged["eval_papo/groups"] == groups
    assert logged["eval_papo/accuracy"] == 0.75
    assert logged["eval_papo/zero_advantage_share"] == zeros
    assert len(judge.asked) == (3 if size == 4 else 0)
    assert trainer.signals == []


def test_only_responses_without_an_outcome_are_told_of(
    make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody was asked about the wrong ones, which is no failure; nor is a judge's silence one of both rewards."""
    warning = "All reward functions returned None"
    batch(make({"outcome_reward": outcome, "process_reward": lambda prompts, **_: [None] * len(prompts)}))
    assert warning not in caplog.text
    batch(make({"outcome_reward": lambda prompts, **_: [None] * len(prompts), "process_reward": Process()}))
    assert warning in caplog.text


@pytest.fixture(scope="module")
def two_processes(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of two processes saw of one training step, by case of `online_worker.CASES`."""
    folder = tmp_path_factory.mktemp("processes")
    worker = Path(__file__).with_name("online_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, worker.parents[:3]))}
    done = subprocess.run(
        [*command, str(policy), str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    parts = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return {case: [part[case] for part in parts] for case in parts[0]}


@pytest.mark.parametrize("case", ["papo", "capo", "one asks nobody"])
def test_two_processes_share_groups(
    make: Callable[..., Any], two_processes: dict[str, list[dict[str, Any]]], case: str
) -> None:
    """A batch of 6 a process and groups of 4: the second group lies on both."""
    parts = two_processes[case]
    prompts, texts = ([value for part in parts for value in part[key]] for key in ("prompts", "completions"))
    assert [len(part["prompts"]) for part in parts] == [6, 6]
    assert prompts[4:8] == [prompts[4]] * 4
    # One process with all rows.
    judge = Process(critique=case == "capo")
    given = {"outcome_reward": outcome, "process_reward": judge, "rollout_func": completed(texts)}
    alone = make(given, variant="capo" if case == "capo" else "papo", per_device_train_batch_size=12)
    _, _, expected = batch(alone, prompts)
    found = [value for part in parts for value in part["advantages"]]
    for row, value in zip(expected, found, strict=True):
        assert np.ravel(value).tolist() == np.ravel(row)[: np.size(value)].tolist()
    assert np.any(expected != 0.0)
    asked = [[tuple(pair) for pair in part["asked"]] for part in parts]
    assert asked[0] + asked[1] == judge.asked
    assert [len(pairs) for pairs in asked] == ([3, 0] if case == "one asks nobody" else [5, 2])
    logged = [text if (prompt, text) in judge.asked else None for prompt, text in zip(prompts, texts, strict=True)]
    assert parts[0]["extra"] == [text if text is None else len(text) for text in logged]
    assert parts[0]["signals"] == parts[1]["signals"] == alone.signals[0]
    assert parts[0]["weights"] == parts[1]["weights"] != parts[0]["before"]


def test_two_processes_give_what_the_equations_give(two_processes: dict[str, list[dict[str, Any]]]) -> None:
    parts = two_processes["papo"]
    prompts, texts, found = (
        [value for part in parts for value in part[key]] for key in ("prompts", "completions", "advantages")
    )
    expected = compute_advantages(*scores(prompts, texts), prompts).total.astype(np.float32)
    assert found == expected.tolist()


@pytest.mark.parametrize(
    ("given", "config", "message"),
    [
        ({"outcome_reward": outcome}, {}, "needs one outcome and one process reward, not 1 and 0"),
        ({"process_reward": outcome}, {}, "not 0 and 1"),
        ({"reward_funcs": [outcome]}, {}, "1 reward functions and 0 roles"),
        ({}, {}, "not 0 and 0"),
        ({"reward_funcs": [outcome, outcome]}, {"reward_roles": ["outcome", "outcome"]}, "not 2 and 0"),
        ({"reward_funcs": [outcome, outcome]}, {"reward_roles": ["outcome", "proces"]}, "unknown role 'proces'"),
        ({"reward_funcs": [outcome], "outcome_reward": outcome}, {}, "in two ways at once"),
        ({"outcome_reward": outcome, "process_reward": outcome}, {"reward_roles": ["outcome"]}, "in two ways at once"),
        (
            {"outcome_reward": outcome, "process_reward": "some/model"},
            {"variant": "capo"},
            "reward model names no wrong steps",
        ),
        (None, {"scale_rewards": "batch"}, "scale_rewards is 'batch'"),
        (None, {"reward_weights": [1.0, 0.5]}, "reward_weights have no effect"),
        (None, {"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation has no effect"),
        (None, {"variant": "pappo"}, "unknown variant 'pappo'"),
        (None, {"lam": -1.0}, "lam is -1"),
        (None, {"variant": "capo", "w_proc": 3.0}, "w_proc is 3"),
        (None, {"variant": "capo", "vote": "most"}, "unknown vote 'most'"),
        (None, {"variant": "prm", "guard": "rank"}, "guard 'rank' needs an outcome part"),
        (None, {"variant": "capo", "guard": "rank"}, "guard 'rank' has no process advantage to bound"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    make: Callable[..., Any], given: dict[str, Any] | None, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParamsError, match=message.replace("(", r"\(")):
        make(given, **config)


def test_an_environment_with_a_reward_of_its_own_is_refused(make: Callable[..., Any], policy: Path) -> None:
    from transformers import AutoTokenizer

    class Environment:
        def reset(self, **columns: Any) -> str | None:
            return None

        def get_reward(self) -> float:
            return 1.0

    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = TEMPLATE
    rewards = {"outcome_reward": outcome, "process_reward": Process()}
    with pytest.raises(ParamsError, match="an environment has a reward of its own"):
        make(rewards | {"environment_factory": Environment, "rollout_func": None, "processing_class": tokenizer})


def test_a_config_of_trl_is_refused(policy: Path, tmp_path: Path) -> None:
    from trl import GRPOConfig

    from papo import PAPOTrainer

    args = GRPOConfig(output_dir=str(tmp_path), activation_checkpointing=False, bf16=False, use_cpu=True)
    with pytest.raises(ParamsError, match="args is a GRPOConfig"):
        PAPOTrainer(str(policy), args=args, outcome_reward=outcome, process_reward=outcome)


def test_a_shaped_outcome_is_refused(make: Callable[..., Any]) -> None:
    trainer = make({"outcome_reward": lambda prompts, **_: [0.5] * len(prompts), "process_reward": Process()})
    with pytest.raises(DataError, match="never a shaped reward") as error:
        batch(trainer)
    assert "Give a shaped reward as process_reward" in str(error.value)


def test_the_wrong_number_of_scores_is_refused(make: Callable[..., Any]) -> None:
    trainer = make({"outcome_reward": outcome, "process_reward": lambda prompts, **_: [1.0] * 3})
    with pytest.raises(DataError, match="gave 3 values for the 7 responses it was asked about"):
        batch(trainer)


def test_a_lam_that_breaks_the_order_is_said(make: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("papo").propagate = True
    make(lam=1.7)
    assert not caplog.records
    make(lam=1.8)
    assert "lam 1.8 is not below lam_max 1.732 of groups of 4" in caplog.text


def test_alarms_are_said_as_they_begin(make: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("papo").propagate = True

    def down(prompts: list[str], **_: Any) -> list[float | None]:
        return [None] * len(prompts)

    trainer = make({"outcome_reward": outcome, "process_reward": down}, max_steps=2)
    trainer.train()
    assert caplog.text.count("alarm in batch") == 1
    assert "alarm in batch 0, judge_outage: 100% of the judge's calls gave no verdict: error 100%" in caplog.text


def test_the_package_has_no_other_names() -> None:
    assert {papo.PAPOTrainer.__name__, papo.PAPOConfig.__name__} < set(papo.__all__)
    with pytest.raises(AttributeError, match="module 'papo' has no attribute 'PAPOTraner'"):
        _ = papo.PAPOTraner

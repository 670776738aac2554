"""What TRL itself makes of scores: `papo.core.peers.trl_gdpo` against it, and what `papo` has in common with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from papo.core.advantages import compute_advantages
from papo.core.groups import FloatArray
from papo.core.peers import trl_gdpo

# TRL 1.16 asks transformers 5.23 by a name that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NAN = math.nan
GROUPS, SIZE = 8, 8
IDS = np.repeat(np.arange(GROUPS), SIZE)

Stock = Callable[..., FloatArray]


@pytest.fixture(scope="module")
def stock(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """(orm, prm, lam) -> the advantages of TRL's own `_generate_and_score_completions`, groups one after the other."""
    import datasets
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    scores: dict[str, Sequence[float | None]] = {}

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        return {"prompt_ids": [[5]] * len(prompts), "completion_ids": [[6, 7]] * len(prompts), "logprobs": None}

    def outcome(**_: Any) -> Sequence[float | None]:
        return scores["orm"]

    def process(**_: Any) -> Sequence[float | None]:
        return scores["prm"]

    trainer = GRPOTrainer(
        model=LlamaForCausalLM.from_pretrained(policy),
        reward_funcs=[outcome, process],
        train_dataset=datasets.Dataset.from_dict({"prompt": ["1"] * GROUPS}),
        processing_class=AutoTokenizer.from_pretrained(policy),
        rollout_func=rollouts,
        args=GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            multi_objective_aggregation="normalize_then_sum",
            per_device_train_batch_size=GROUPS * SIZE,
            num_generations=SIZE,
            beta=0.0,
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
    )
    trainer.model.train()

    def advantages(orm: FloatArray, prm: FloatArray, lam: float = 1.0) -> FloatArray:
        scores["orm"], scores["prm"] = ([None if math.isnan(x) else float(x) for x in column] for column in (orm, prm))
        trainer.reward_weights = torch.tensor([1.0, lam])
        made = trainer._generate_and_score_completions([{"prompt": "1"}] * (GROUPS * SIZE))
        return np.asarray(made["advantages"].double())

    return advantages


def random_scores(seed: int) -> tuple[FloatArray, FloatArray]:
    """Groups of every difficulty, one all right and one all wrong among them."""
    stream = np.random.default_rng(seed)
    share = np.repeat([0.0, 1.0, *stream.uniform(0.1, 0.9, GROUPS - 2)], SIZE)
    orm = (stream.uniform(size=IDS.size) < share).astype(np.float64)
    return orm, stream.choice([0.0, 0.5, 1.0], IDS.size)


@pytest.mark.parametrize("lam", [1.0, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_the_peer_is_what_trl_computes(stock: Stock, seed: int, lam: float) -> None:
    orm, prm = random_scores(seed)
    stream = np.random.default_rng(100 + seed)
    # Missing in either, and now and then in both: such a row leaves the batch.
    orm, prm = (np.where(stream.uniform(size=IDS.size) < 0.3, NAN, column) for column in (orm, prm))
    assert (np.isnan(orm) & np.isnan(prm)).any()
    np.testing.assert_allclose(trl_gdpo(orm, prm, IDS, lam=lam), stock(orm, prm, lam), atol=2e-5)


def test_the_peer_is_what_trl_computes_where_little_is_scored(stock: Stock) -> None:
    orm, prm = np.full(IDS.size, NAN), np.full(IDS.size, NAN)
    orm[0], prm[8] = 1.0, 0.5  # alone in their groups
    orm[16:18] = 0.0, 1.0
    prm[24:32] = 0.5  # all alike
    np.testing.assert_allclose(trl_gdpo(orm, prm, IDS), stock(orm, prm), atol=2e-5)


@pytest.mark.parametrize("lam", [1.0, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_asked_about_correct_responses_only_trl_gives_papo_times_one_factor(
    stock: Stock, seed: int, lam: float
) -> None:
    """eps is 1e-4 in TRL and 1e-6 here: with a std of at least 0.18 in groups of eight they agree to 1e-3."""
    orm, prm = random_scores(seed)
    prm[orm == 0.0] = NAN
    theirs = stock(orm, prm, lam)
    ours = compute_advantages(orm, prm, IDS, variant="papo", lam=lam).total
    assert apart(theirs, ours) < 1e-3
    # It is the mask that makes them one: a wrong response scored as 0 gives something else.
    assert apart(stock(orm, np.nan_to_num(prm, nan=0.0), lam), ours) > 0.1


def apart(found: FloatArray, expected: FloatArray) -> float:
    """Largest distance after the best common factor, relative to the largest advantage."""
    factor = float(np.sum(found * expected) / np.sum(expected * expected))
    return float(np.abs(found - factor * expected).max() / np.abs(found).max())

"""The layouts of a micro-batch, and what is found out about a model before it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)  # fmt: skip
from updates import Groups

from papo.engines.policy import load_policy
from papo.engines.training.batches import Item, MicroBatch
from papo.engines.training.forward import PolicyLoss, tokens_of
from papo.engines.training.probe import probe
from papo.errors import CheckpointError

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
CPU = torch.device("cpu")


def model_of(config: Any, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize(
    ("shared", "packed", "attention"),
    [
        (False, False, "sdpa"),
        (False, False, "eager"),
        (True, False, "sdpa"),
        (False, True, "sdpa"),
        (False, True, "eager"),
    ],
)
def test_each_layout_gives_the_log_probs_of_single_rows(
    policy: Path, groups: Groups, forward_logprobs: Any, shared: bool, packed: bool, attention: str
) -> None:
    model, _ = load_policy(policy, device="cpu", attention=attention)
    rows = [row for group in groups for row in group]
    batch = MicroBatch(tuple(Item(place, row, 1.0) for place, row in enumerate(rows)), shared, 0, 0)
    tokens = tokens_of(batch, CPU)
    found = PolicyLoss(model, temperature=0.7, logits_mb=1, packed=packed)(batch, tokens, None).logprobs
    wanted = [
        forward_logprobs(policy, row.prompt_ids, row.completion_ids, 0.7)[at, token]
        for row in rows
        for at, token in enumerate(row.completion_ids)
    ]
    assert found.tolist() == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        Qwen2Config(**SMALL, tie_word_embeddings=True),
        Qwen3Config(**SMALL),
        MistralConfig(**SMALL, sliding_window=None),
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    ],
    ids=lambda config: config.model_type,
)
def test_what_usual_models_can_do(config: Any) -> None:
    able = probe(model_of(config))
    assert (able.scale, able.shares, able.packs, able.packs_without_mask) == (1.0, True, True, False)


def test_the_scale_of_the_logits_is_found() -> None:
    able = probe(model_of(GraniteConfig(**SMALL, logits_scaling=4.0)))
    assert able.scale == pytest.approx(0.25, rel=1e-4)


def test_capped_logits_are_refused() -> None:
    with pytest.raises(CheckpointError, match="no multiple of the projection") as caught:
        probe(model_of(Gemma2Config(**SMALL, final_logit_softcapping=0.5), attention="eager"))
    assert caught.value.where == "Gemma2ForCausalLM"


def test_a_probe_leaves_the_model_as_it_was() -> None:
    model = model_of(LlamaConfig(**SMALL)).train()
    probe(model)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())

"""A tiny random policy, sampled groups, and the log-probs of a completion by one plain forward pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from papo.cli import quiet_environment
from papo.engines.protocols import SampleRequest, TrainRow
from papo.params import ModelParams, WarmstartParams

# Read by the Hugging Face libraries when they are imported.
quiet_environment()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

MODEL = ModelParams(hidden_size=32, intermediate_size=64, layers=1, heads=2)
PROMPTS = ("3+5-2=?\n", "9-9=?\n", "1+2+3+4=?\n", "7+8=?\n")
Logprobs = Callable[..., np.ndarray]


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of random weights over the embedded tokenizer; one token in about twenty ends a completion."""
    from transformers import set_seed

    from papo.engines.tokenizer import build_tokenizer
    from papo.engines.warmstart import _build_model

    folder = tmp_path_factory.mktemp("policy")
    set_seed(0)
    tokenizer = build_tokenizer()
    _build_model(WarmstartParams(model=MODEL), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def forward_logprobs() -> Logprobs:
    """(policy, prompt_ids, completion_ids, temperature) -> log-probs of every token at each place of the completion and after it.

    One forward pass of one row, without padding or cache, in float64.
    """
    import torch
    from transformers import LlamaForCausalLM

    @cache
    def model_of(folder: Path) -> Any:
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    def compute(folder: Path, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0) -> np.ndarray:
        with torch.inference_mode():
            logits = model_of(folder)(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 :]
        logprobs: np.ndarray = (logits / temperature).log_softmax(-1).numpy()
        return logprobs

    return compute


@pytest.fixture(scope="session")
def groups(policy: Path) -> list[list[TrainRow]]:
    """Four prompts with four samples each at temperature 1 and their behaviour log-probs; a quarter of the rows without advantage."""
    from papo.engines.samplers.transformers import TransformersSampler

    sampler = TransformersSampler(policy, temperature=1.0, top_p=1.0, max_prompt_tokens=32, max_new_tokens=20)
    advantages = [1.5, -0.5, 0.0, -1.0]
    requests = [
        SampleRequest(prompt, 10 * number + index) for number, prompt in enumerate(PROMPTS) for index in range(4)
    ]
    rows = [
        TrainRow(sample.prompt_ids, sample.completion_ids, sample.logprobs, advantages[index % 4])
        for index, sample in enumerate(sampler.sample(requests, lambda _: None))
    ]
    return [rows[at : at + 4] for at in range(0, len(rows), 4)]

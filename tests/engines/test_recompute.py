"""Log-probs computed anew are those of the policy, at the sampling temperature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from servers.completions import log_softmax, save_policy, table

from papo.engines.protocols import SampleRequest
from papo.engines.recompute import PolicyRecomputer
from papo.engines.samplers.transformers import TransformersSampler


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_they_are_those_of_a_table(tmp_path: Path, temperature: float) -> None:
    policy = save_policy(tmp_path / "policy", 3)
    (found,) = PolicyRecomputer(policy, temperature=temperature).logprobs([([4, 5], [6, 7, 1])])
    rows = table(3)
    wanted = [log_softmax(rows[before], temperature)[after] for before, after in ((5, 6), (6, 7), (7, 1))]
    assert found == pytest.approx(wanted, abs=1e-4)


def test_they_are_those_that_the_sampler_gave(tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "policy", 3)
    sampler = TransformersSampler(policy, temperature=0.8, top_p=1.0, max_prompt_tokens=16, max_new_tokens=12)
    samples = sampler.sample([SampleRequest("1+2=?\n", seed) for seed in range(8)], lambda done: None)
    pairs = [(sample.prompt_ids, sample.completion_ids) for sample in samples]
    for sample, anew in zip(samples, PolicyRecomputer(policy, temperature=0.8).logprobs(pairs), strict=True):
        assert np.abs(np.subtract(sample.logprobs, anew)).max() < 1e-5
    (other,) = PolicyRecomputer(policy, temperature=1.0).logprobs(pairs[:1])
    assert np.abs(np.subtract(samples[0].logprobs, other)).max() > 1e-2

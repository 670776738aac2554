"""Samplers: completions with token ids and behaviour log-probs from a policy on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from papo.engines.protocols import Sampler
from papo.params import RolloutParams


def make_sampler(
    params: RolloutParams,
    policy: Path,
    *,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    logs: Path,
    others: Sequence[Path] = (),
    urls: Callable[[], Sequence[str]] | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> Sampler:
    """The sampler that `rollout.engine` names, serving the policy in the folder `policy`; to be closed when it is done with.

    Args:
        others: for vllm-server: folders of policies that a server might still serve; need not be there.
        logs: folder for what the processes of vllm say.
        urls: for vllm-server: called once, when the servers are needed; None: those of the params.
    """
    shared: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "max_prompt_tokens": params.max_prompt_tokens,
        "max_new_tokens": max_new_tokens,
        "warn": warn,
    }
    if params.engine == "vllm-server":
        from papo.engines.samplers.vllm_server import VllmServerSampler

        return VllmServerSampler(policy, params=params.server, others=others, urls=urls, **shared)
    if params.engine == "vllm":
        from papo.engines.samplers.vllm import VllmSampler

        return VllmSampler(policy, params=params.vllm, logs=logs, **shared)
    from papo.engines.samplers.transformers import TransformersSampler

    return TransformersSampler(policy, batch_rows=params.batch_rows, **shared)

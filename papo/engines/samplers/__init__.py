"""Samplers: completions with token ids and behaviour log-probs from a policy on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from papo.engines.protocols import Sampler


def make_sampler(
    engine: str,
    policy: Path,
    *,
    temperature: float,
    top_p: float,
    max_prompt_tokens: int,
    max_new_tokens: int,
    batch_rows: int | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> Sampler:
    """The sampler that `rollout.engine` names, serving the policy in the folder `policy`; `batch_rows` None: found from memory."""
    if engine == "transformers":
        from papo.engines.samplers.transformers import TransformersSampler

        return TransformersSampler(
            policy,
            temperature=temperature,
            top_p=top_p,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            batch_rows=batch_rows,
            warn=warn,
        )
    raise AssertionError(engine)

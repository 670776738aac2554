"""Samplers: completions with token ids and behaviour log-probs from a policy on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from papo.engines.protocols import Sampler

if TYPE_CHECKING:
    from papo.engines.samplers.completions import ServerParams


def make_sampler(
    engine: str,
    policy: Path,
    *,
    temperature: float,
    top_p: float,
    max_prompt_tokens: int,
    max_new_tokens: int,
    server: ServerParams | None = None,
    urls: Callable[[], Sequence[str]] | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> Sampler:
    """The sampler that `rollout.engine` names, serving the policy in the folder `policy`.

    Args:
        server, urls, warn: for vllm-server, as VllmServerSampler takes them.
    """
    if engine == "transformers":
        from papo.engines.samplers.transformers import TransformersSampler

        return TransformersSampler(
            policy,
            temperature=temperature,
            top_p=top_p,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
        )
    if engine == "vllm-server":
        from papo.engines.samplers.completions import ServerParams
        from papo.engines.samplers.vllm_server import VllmServerSampler

        return VllmServerSampler(
            policy,
            temperature=temperature,
            top_p=top_p,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            params=server or ServerParams(),
            urls=urls,
            warn=warn,
        )
    raise AssertionError(engine)

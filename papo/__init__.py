"""papo: process-aware policy optimization as a pipeline, and as a trainer for TRL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from papo.engines.online import PAPOConfig, PAPOTrainer

__version__ = "0.1.0"
__all__ = ["PAPOConfig", "PAPOTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    """The trainer and its config, imported when they are asked for: they bring torch, transformers and TRL."""
    if name in ("PAPOConfig", "PAPOTrainer"):
        from papo.engines import online

        return getattr(online, name)
    raise AttributeError(f"module 'papo' has no attribute {name!r}")

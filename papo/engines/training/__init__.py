"""The policy update: a table of advantages in, the next policy out, with the gradient of all rows at the cost of those that count."""

from __future__ import annotations

from collections.abc import Callable

from papo.engines.protocols import Trainer
from papo.engines.training.checks import check_trainer
from papo.params import TrainParams

__all__ = ["check_trainer", "make_trainer"]


def make_trainer(
    params: TrainParams, *, temperature: float, max_new_tokens: int, seed: int, warn: Callable[[str], None]
) -> Trainer:
    """The trainer of `train.devices`: in this process, or in several."""
    from papo.engines.training.launch import LaunchedTrainer
    from papo.engines.training.trainer import GrpoTrainer

    kind = LaunchedTrainer if params.devices.processes > 1 else GrpoTrainer
    return kind(params, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, warn=warn)

"""Optimizer state on disk: between rounds, and within one for a restart to go on from. Safetensors and JSON, no pickle.

Whole tensors by the names of the parameters, so that a round may go on with another number of devices than the one before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from papo.errors import CheckpointError, DamagedError, DataError, MissingInputError
from papo.params import LoraParams
from papo.store.faults import reached
from papo.store.files import (
    clear_folder,
    digest,
    make_folder,
    read_json,
    read_sealed,
    replacing,
    write_json,
    write_sealed,
)

STATE_FILE = "optimizer.safetensors"
WEIGHTS_FILE = "weights.safetensors"
ADAPTERS = "adapters.safetensors"
RECORD = "trainer.json"
FIX = "the state must come from the round that made the policy; delete that round and run it again"

Tensors = dict[str, torch.Tensor]


class State(BaseModel):
    """What a round hands to the next beside weights and moments: the digest of its policy, the coefficient of the KL penalty, and with
    adapters what they are and the digest of the base that they make that policy with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str
    kl_coefficient: float
    optimizer: str
    lora: LoraParams | None = None
    base: str | None = None


class Reached(BaseModel):
    """Where a round under way is: optimizer steps done, their metrics, the coefficient of the KL penalty, and the steps that were not
    applied; `files`: the digests of weights and moments."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int
    history: list[dict[str, float]]
    kl_coefficient: float
    broken: list[str]
    files: dict[str, str] = {}


def save_state(folder: Path, moments: Tensors, state: State, adapters: Tensors | None = None) -> None:
    """The state of a finished round."""
    make_folder(folder)
    reached("write", folder / STATE_FILE)
    save_file(moments, folder / STATE_FILE)
    if adapters is not None:
        save_file(adapters, folder / ADAPTERS)
    write_json(folder / RECORD, state.model_dump())


def load_state(
    folder: Path,
    policy: Path,
    optimizer: str,
    weights: Mapping[str, torch.Size],
    *,
    lora: LoraParams | None = None,
    base: Path | None = None,
) -> tuple[Tensors | None, Tensors, State]:
    """Adapters, if there are any, moments and record of the round before.

    Args:
        weights: name and shape of each trained parameter.
        lora, base: of the adapters and what they are laid over, if they are what is trained.

    Raises:
        CheckpointError: it is damaged, or belongs to another policy, another model, another optimizer or other adapters.
    """
    try:
        state = State.model_validate(read_json(folder / RECORD))
        moments = load_file(folder / STATE_FILE)
        adapters = load_file(folder / ADAPTERS) if state.lora is not None else None
    except (OSError, SafetensorError, ValidationError, DataError, MissingInputError) as error:
        raise CheckpointError(f"the optimizer state cannot be loaded: {error}", where=str(folder), fix=FIX) from error
    if state.optimizer != optimizer:
        raise CheckpointError(
            f"the optimizer state is of {state.optimizer}, and train.optimizer is {optimizer}", where=str(folder),
            fix="keep the optimizer within a run",
        )  # fmt: skip
    if state.lora != lora:
        raise CheckpointError(
            f"the optimizer state is of {_described(state.lora)}, and train.lora asks for {_described(lora)}",
            where=str(folder),
            fix="keep train.lora within a run",
        )
    _check_moments(moments, weights, optimizer, folder)
    if adapters is not None:
        _check_shapes({name: tensor.shape for name, tensor in adapters.items()}, weights, folder / ADAPTERS)
    if state.policy != digest(policy):
        raise CheckpointError(
            f"the optimizer state was written beside policy {state.policy[:12]}, this one is {digest(policy)[:12]}",
            where=str(folder),
            fix=FIX,
        )
    if base is not None and state.base != digest(base):
        raise CheckpointError(
            f"the adapters were laid over {str(state.base)[:12]}, this base is {digest(base)[:12]}",
            where=str(base),
            fix="the base is the warm start that the run began with; run warmstart and all rounds again",
        )
    return adapters, moments, state


def _described(lora: LoraParams | None) -> str:
    if lora is None:
        return "all weights"
    targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
    return f"adapters of rank {lora.rank} and alpha {lora.alpha:g} over {targets}"


def _check_moments(moments: Tensors, weights: Mapping[str, torch.Size], optimizer: str, folder: Path) -> None:
    found = {key: value.shape for key, value in moments.items()}
    pair = ("exp_avg", "exp_avg_sq") if optimizer == "adamw" else ("state1", "state2")
    wanted = {f"{name}/step": torch.Size() for name in weights}
    wanted |= {f"{name}/{key}": shape for name, shape in weights.items() for key in pair}
    for key, value in moments.items():
        if optimizer == "adamw_8bit" and key.endswith("/state1") and value.dtype == torch.uint8:
            name = key.removesuffix("/state1")
            # Any shape will do, but they have to be there.
            tables = [f"{name}/{table}" for table in ("qmap1", "qmap2", "absmax1", "absmax2")]
            wanted |= {table: found.get(table, torch.Size()) for table in tables}
    _check_shapes(found, wanted, folder / STATE_FILE)


def _check_shapes(found: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size], where: Path) -> None:
    if wrong := sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)):
        raise CheckpointError(
            f"the optimizer state does not fit the policy: {wrong[0]} is missing, too many or of another shape",
            where=str(where),
            fix=FIX,
        )


class Saved:
    """The last saved step of a round under way, in a folder of work that may be deleted at any time."""

    def __init__(self, work: Path) -> None:
        self._work = work

    def write(self, weights: Tensors, moments: Tensors, so_far: Reached) -> None:
        """The one before goes when this one is there: whenever the process is killed, there is one that is whole."""
        kept = self._work / f"step-{so_far.steps:06d}"
        with replacing(kept) as folder:
            folder.mkdir()
            reached("write", kept / WEIGHTS_FILE)
            save_file(weights, folder / WEIGHTS_FILE)
            save_file(moments, folder / STATE_FILE)
            files = {name: digest(folder / name) for name in (WEIGHTS_FILE, STATE_FILE)}
            record = so_far.model_copy(update={"files": files})
            write_sealed(folder / RECORD, record.model_dump())
        reached("step saved", kept)
        for old in {*self._kept(), *self._work.glob(".step-*.tmp")} - {kept}:
            clear_folder(old)

    def read(self) -> tuple[tuple[Tensors, Tensors, Reached] | None, list[tuple[Path, str]]]:
        """What was written last and is whole, if anything is; folders that are not, and what is wrong with each."""
        damaged: list[tuple[Path, str]] = []
        for folder in reversed(self._kept()):
            try:
                return _read_step(folder), damaged
            except (OSError, SafetensorError, ValidationError, DataError, MissingInputError) as error:
                damaged.append((folder, next(iter(str(error).splitlines()), type(error).__name__)))
        return None, damaged

    def set_aside(self, folder: Path) -> Path:
        """Where it lies now; it goes with the folder of work."""
        aside = self._work / f"damaged-{folder.name}"
        clear_folder(aside)
        reached("set aside", folder)
        return folder.rename(aside)

    def _kept(self) -> list[Path]:
        return sorted(self._work.glob("step-*"))


def _read_step(folder: Path) -> tuple[Tensors, Tensors, Reached]:
    found = Reached.model_validate(read_sealed(folder / RECORD))
    for name, wanted in found.files.items():
        # Safetensors sees a file that was cut off, not one whose numbers are others.
        if digest(folder / name) != wanted:
            raise DamagedError(f"{name} is not what was written", where=str(folder))
    return load_file(folder / WEIGHTS_FILE), load_file(folder / STATE_FILE), found

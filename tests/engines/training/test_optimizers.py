"""The optimizers, and that what is stored of them is all there is: by bitsandbytes where it is installed, and by a stand-in for it."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft.import_utils import is_bnb_available
from safetensors.torch import load_file, save_file
from updates import Groups, StoppedError, apart, same, tensors, train_round

from papo.engines.training.optimizers import make_optimizer, restore, stored
from papo.engines.training.state import STATE_FILE
from papo.engines.training.trainer import GrpoTrainer
from papo.errors import CheckpointError, SetupError
from papo.params import LoraParams, ModelParams, TrainParams, WarmstartParams
from papo.store.files import digest

PLAIN = TrainParams(minibatch_prompts=1, learning_rate=1e-3, save_minutes=0.0)
EIGHT_BITS = PLAIN.model_copy(update={"optimizer": "adamw_8bit"})


class AdamW8bit(torch.optim.Optimizer):
    """Stores as bitsandbytes does: a count that is no tensor, one table that parameters share, moments in bytes by blocks of 256."""

    def __init__(
        self, parameters: Any, lr: float, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.01
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.table = torch.linspace(-1, 1, 256)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {
                        "step": 0,
                        **self._stored(torch.zeros_like(parameter), 1),
                        **self._stored(torch.zeros_like(parameter), 2),
                    }
                state["step"] += 1
                for number, (beta, new) in enumerate(
                    zip(group["betas"], (parameter.grad, parameter.grad**2), strict=True), 1
                ):
                    moment = self._read(state, number).mul(beta).add(new, alpha=1 - beta)
                    state |= self._stored(moment, number)
                first, second = (
                    self._read(state, number) / (1 - beta ** state["step"])
                    for number, beta in enumerate(group["betas"], 1)
                )
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(first, second.clamp(min=0).sqrt().add(1e-8), value=-group["lr"])

    def _stored(self, moment: torch.Tensor, number: int) -> dict[str, Any]:
        if moment.numel() < 4096:
            return {f"state{number}": moment}
        blocks = moment.flatten().view(-1, 256)
        scale = blocks.abs().amax(1).clamp(min=1e-12)
        codes = ((blocks / scale[:, None] + 1) / 2 * 255).round().to(torch.uint8).view(moment.shape)
        return {f"state{number}": codes, f"qmap{number}": self.table, f"absmax{number}": scale}

    def _read(self, state: dict[str, Any], number: int) -> torch.Tensor:
        codes: torch.Tensor = state[f"state{number}"]
        if codes.dtype != torch.uint8:
            return codes
        values = state[f"qmap{number}"][codes.long()].flatten().view(-1, 256)
        return (values * state[f"absmax{number}"][:, None]).view(codes.shape)


def install(monkeypatch: pytest.MonkeyPatch, optimizer: Any) -> None:
    """What `from bitsandbytes.optim import AdamW8bit` will find; peft looks for more in it, and remembers whether it is there."""
    is_bnb_available()
    package, module = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    module.AdamW8bit = optimizer  # type: ignore[attr-defined]  # a module made here
    package.optim = module  # type: ignore[attr-defined]  # a module made here
    package.__spec__ = ModuleSpec("bitsandbytes", None, origin="here")  # as find_spec gives it
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)


@pytest.fixture(params=["bitsandbytes", "stand-in"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the 8-bit AdamW comes from."""
    if request.param == "stand-in":
        install(monkeypatch, AdamW8bit)
    elif importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed; the stand-in stores the same things")
    return str(request.param)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy some of whose weights are many enough for 8 bits."""
    from papo.engines.tokenizer import build_tokenizer
    from papo.engines.warmstart import _build_model

    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("wide"), build_tokenizer()
    shape = ModelParams(hidden_size=64, intermediate_size=128, layers=1, heads=2)
    _build_model(WarmstartParams(model=shape), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def parameters() -> dict[str, torch.nn.Parameter]:
    """Two that are large, which share a table, and a small one."""
    stream = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (64, 64), "b.weight": (32, 256), "norm": (64,)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=stream)) for name, shape in shapes.items()}


def steps(optimizer: torch.optim.Optimizer, named: dict[str, torch.nn.Parameter], numbers: range) -> None:
    for number in numbers:
        stream = torch.Generator().manual_seed(number)
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=stream)
        optimizer.step()


# ---- stored and restored ----


def check_round_trip(params: TrainParams, file: Path) -> dict[str, torch.Tensor]:
    undisturbed = parameters()
    one = make_optimizer(undisturbed.values(), params)
    steps(one, undisturbed, range(6))
    before = parameters()
    first = make_optimizer(before.values(), params)
    steps(first, before, range(3))
    save_file(stored(first, before), file)
    after = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in before.items()}
    second = make_optimizer(after.values(), params)
    restore(second, after, load_file(file))
    again = stored(second, after)
    assert same(again, load_file(file))
    steps(second, after, range(3, 6))
    assert same(dict(after), dict(undisturbed))
    assert same(stored(second, after), stored(one, undisturbed))
    assert not same(dict(after), dict(before))
    return again


def test_adamw_goes_on_from_its_file_bit_by_bit(tmp_path: Path) -> None:
    found = check_round_trip(PLAIN, tmp_path / "state")
    assert {name.rpartition("/")[2] for name in found} == {"step", "exp_avg", "exp_avg_sq"}
    assert found["norm/step"].dtype == torch.float32


def test_8_bits_go_on_from_their_file_bit_by_bit(tmp_path: Path, library: str) -> None:
    found = check_round_trip(EIGHT_BITS, tmp_path / "state")
    assert found["norm/step"].dtype == torch.int64
    assert found["norm/step"].item() == 3
    for name in ("a.weight", "b.weight"):
        assert found[f"{name}/state1"].dtype == found[f"{name}/state2"].dtype == torch.uint8
    assert found["norm/state1"].dtype == torch.float32


def test_what_is_restored_is_no_view_of_what_was_read(tmp_path: Path, library: str) -> None:
    named = parameters()
    optimizer = make_optimizer(named.values(), EIGHT_BITS)
    steps(optimizer, named, range(2))
    kept = {name: tensor.clone() for name, tensor in stored(optimizer, named).items()}
    other = parameters()
    given = {name: tensor.clone() for name, tensor in kept.items()}
    restore(going_on := make_optimizer(other.values(), EIGHT_BITS), other, given)
    steps(going_on, other, range(2, 4))
    assert same(given, kept)


@pytest.mark.parametrize("size", [2**14, 100])
def test_8_bits_train_as_32_do(library: str, size: int) -> None:
    if library == "stand-in":
        pytest.skip("the stand-in is not about precision")
    fits = []
    for params in (PLAIN, EIGHT_BITS):
        stream = torch.Generator().manual_seed(0)
        wanted = torch.randn(size, generator=stream)
        weights = torch.nn.Parameter(torch.zeros(size))
        optimizer = make_optimizer([weights], params)
        for group in optimizer.param_groups:
            group["lr"] = 0.02
        for _ in range(100):
            loss = (weights - wanted).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        fits.append(weights.detach())
    assert apart({"w": fits[1]}, {"w": fits[0]}) < 0.05
    assert apart({"w": fits[0]}, {"w": torch.zeros(size) + 1e-9}) > 1  # it went somewhere


# ---- through the trainer ----


@pytest.mark.parametrize("lora", [None, LoraParams(rank=64)], ids=["all weights", "adapters"])
def test_two_rounds_and_a_restart_are_one_continuous_run(
    wide: Path, groups: Groups, tmp_path: Path, library: str, lora: LoraParams | None
) -> None:
    params = EIGHT_BITS.model_copy(update={"lora": lora})
    whole = train_round(params, wide, groups, tmp_path / "whole", reference=wide)
    assert any(tensor.dtype == torch.uint8 for tensor in whole.moments.values())
    first = train_round(params, wide, groups[:2], tmp_path / "0", reference=wide)
    with pytest.raises(StoppedError):
        train_round(params, first.policy, groups[2:], tmp_path / "1", state=first.state, reference=wide, stop_after=1)
    second = train_round(params, first.policy, groups[2:], tmp_path / "1", state=first.state, reference=wide)
    assert second.told == [1, 1]
    assert digest(second.policy) == digest(whole.policy)
    assert same(second.moments, whole.moments)
    forgotten = train_round(
        params.model_copy(update={"lora": None}), first.policy, groups[2:], tmp_path / "2", reference=wide
    )
    assert digest(forgotten.policy) != digest(whole.policy)


@pytest.mark.parametrize(("before", "after"), [(PLAIN, EIGHT_BITS), (EIGHT_BITS, PLAIN)], ids=["from 32", "from 8"])
def test_the_state_of_the_other_optimizer_is_refused(
    wide: Path, groups: Groups, tmp_path: Path, library: str, before: TrainParams, after: TrainParams
) -> None:
    first = train_round(before, wide, groups[:1], tmp_path / "0")
    said = f"is of {before.optimizer}, and train.optimizer is {after.optimizer}$"
    with pytest.raises(CheckpointError) as caught:
        train_round(after, first.policy, groups[1:], tmp_path / "1", state=first.state)
    assert caught.match(said.removesuffix("$"))
    assert caught.value.fix == "keep the optimizer within a run"


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda moments: moments.pop(name)


def _of_another_shape(moments: dict[str, Any]) -> None:
    moments["model.norm.weight/state2"] = torch.zeros(3)


def _of_another_model(moments: dict[str, Any]) -> None:
    moments["model.layers.7.mlp.up_proj.weight/step"] = torch.tensor(1)


def _of_adamw(moments: dict[str, Any]) -> None:
    moments["model.norm.weight/exp_avg"] = moments.pop("model.norm.weight/state1")


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("harm", "culprit"),
    [
        (_without(f"{UP}/absmax1"), f"{UP}/absmax1"),
        (_without(f"{UP}/qmap2"), f"{UP}/qmap2"),
        (_without(f"{UP}/state2"), f"{UP}/state2"),
        (_without("model.norm.weight/step"), "model.norm.weight/step"),
        (_of_another_shape, "model.norm.weight/state2"),
        (_of_another_model, "model.layers.7.mlp.up_proj.weight/step"),
        (_of_adamw, "model.norm.weight/exp_avg"),
    ],
)
def test_an_8_bit_state_that_lacks_something_is_refused(
    wide: Path, groups: Groups, tmp_path: Path, library: str, harm: Callable[[dict[str, Any]], None], culprit: str
) -> None:
    first = train_round(EIGHT_BITS, wide, groups[:1], tmp_path / "0")
    moments = tensors(first.state / STATE_FILE)
    harm(moments)
    save_file(moments, first.state / STATE_FILE)
    with pytest.raises(CheckpointError, match="does not fit the policy") as caught:
        train_round(EIGHT_BITS, first.policy, groups[1:], tmp_path / "1", state=first.state)
    assert culprit in caught.value.what
    assert not (tmp_path / "1").exists()


# ---- what is not there ----


def test_without_bitsandbytes_a_person_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(SetupError, match="bitsandbytes is not installed") as caught:
        make_optimizer(parameters().values(), EIGHT_BITS)
    assert "papo[optimizer-8bit]" in caught.value.fix


@pytest.mark.parametrize(
    "failure",
    [NotImplementedError("no kernel for 'cpu'\nand much more"), RuntimeError("no library"), AttributeError("'None'")],
    ids=lambda failure: type(failure).__name__,
)
def test_a_device_that_it_cannot_compute_on_is_named(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    class Unable(AdamW8bit):
        def step(self, closure: Any = None) -> None:
            raise failure

    install(monkeypatch, Unable)
    with pytest.raises(SetupError) as caught:
        make_optimizer(parameters().values(), EIGHT_BITS)
    assert caught.value.what == f"bitsandbytes cannot make a step on cpu: {str(failure).splitlines()[0]}"
    assert "adamw" in caught.value.fix


def test_the_settings_are_those_of_the_params(library: str) -> None:
    params = {"learning_rate": 0.5, "betas": (0.8, 0.9), "weight_decay": 0.25}
    for optimizer in ("adamw", "adamw_8bit"):
        made = make_optimizer(parameters().values(), TrainParams(optimizer=optimizer, **params))
        (group,) = made.param_groups
        assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (0.5, (0.8, 0.9), 0.25)
        named = {"w": torch.nn.Parameter(torch.ones(4096))}
        lonely = make_optimizer(named.values(), TrainParams(optimizer=optimizer, **params))
        named["w"].grad = torch.ones(4096)
        lonely.step()
        # 1 decays by rate x decay, and goes by rate against the sign of the gradient.
        assert named["w"].detach().mean().item() == pytest.approx(1 - 0.5 * 0.25 - 0.5, abs=0.02)
        assert math.isfinite(named["w"].detach().sum().item())


def test_versions_name_bitsandbytes_where_it_took_part(library: str) -> None:
    if library == "stand-in":
        pytest.skip("the stand-in has no version")
    trainer = GrpoTrainer(EIGHT_BITS, temperature=1.0, max_new_tokens=24, seed=0)
    assert set(trainer.versions()) == {"torch", "transformers", "bitsandbytes"}

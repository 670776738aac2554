"""The first policy: trained on traces, or taken from a checkpoint."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from papo.engines.policy import load_policy
from papo.engines.protocols import SampleRequest
from papo.engines.samplers.transformers import TransformersSampler
from papo.engines.sources.sums import SumsSource
from papo.engines.warmstart import (
    CheckpointWarmStarter,
    SftWarmStarter,
    _build_model,
    _parts,
    _sorted_batches,
    make_warm_starter,
)
from papo.errors import CheckpointError, DataError
from papo.params import ModelParams, SumsParams, Tier, WarmstartParams
from papo.store.files import digest

SMALL = WarmstartParams(
    model=ModelParams(hidden_size=32, intermediate_size=64, layers=1, heads=2),
    steps=20,
    batch_size=16,
    microbatch=8,
    learning_rate=3e-3,
)
TRACES = list(
    SumsSource(SumsParams(train=Tier(min_terms=3, max_terms=5, problems=1), eval={}, traces=400), seed=0).traces()
)


def loss_of(folder: Path, traces: Sequence[tuple[str, str]]) -> float:
    """Mean negative log-prob of the tokens of completions and of the end of each, by a forward pass of each row."""
    import torch

    model, tokenizer = load_policy(folder)
    total, count = 0.0, 0
    for prompt, completion in traces:
        before, after = (tokenizer(text)["input_ids"] for text in (prompt, completion))
        after = [*after, tokenizer.eos_token_id]
        with torch.inference_mode():
            logits = model(torch.tensor([before + after], device=model.device)).logits[0, len(before) - 1 : -1]
        total -= logits.log_softmax(-1)[range(len(after)), after].sum().item()
        count += len(after)
    return total / count


def untrained(folder: Path, params: WarmstartParams) -> Path:
    from transformers import set_seed

    from papo.engines.tokenizer import build_tokenizer

    set_seed(params.seed)
    tokenizer = build_tokenizer()
    _build_model(params, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_twenty_steps_make_the_traces_likelier(tmp_path: Path) -> None:
    told: list[int] = []
    history = SftWarmStarter(SMALL).fit(TRACES, tmp_path / "policy", told.append)
    before = loss_of(untrained(tmp_path / "before", SMALL), TRACES[:50])
    assert loss_of(tmp_path / "policy", TRACES[:50]) < before - 0.3
    assert before > math.log(20)  # an untrained policy knows less than that there are 20 tokens
    assert load_policy(tmp_path / "policy")[0].config.use_cache
    assert sum(told) == SftWarmStarter(SMALL).steps() == 20
    assert [row["step"] for row in history] == [20]
    assert [set(row) for row in history] == [{"step", "loss", "token_accuracy"}]
    assert 0.0 < history[0]["loss"] < before


def test_the_loss_is_on_completions_and_their_end_only(tmp_path: Path) -> None:
    # A batch of all 16 traces in one step: the loss told is that of the untrained policy.
    params = SMALL.model_copy(update={"steps": 1, "microbatch": 16, "seed": 3})
    (row,) = SftWarmStarter(params).fit(TRACES[:16], tmp_path / "policy", lambda _: None)
    assert row["loss"] == pytest.approx(loss_of(untrained(tmp_path / "before", params), TRACES[:16]), abs=1e-3)


def test_a_trained_policy_learns_to_stop(tmp_path: Path) -> None:
    traces = [("1+1=?\n", "\\boxed{2}")] * 16
    params = SMALL.model_copy(update={"steps": 40, "learning_rate": 1e-2})
    SftWarmStarter(params).fit(traces, tmp_path, lambda _: None)
    sampler = TransformersSampler(tmp_path, temperature=0.0, top_p=1.0, max_prompt_tokens=9, max_new_tokens=9)
    (sample,) = sampler.sample([SampleRequest("1+1=?\n", 0)], lambda _: None)
    assert (sample.completion, sample.finish_reason) == ("\\boxed{2}", "stop")


def test_a_seed_decides_the_policy_to_the_last_bit(tmp_path: Path) -> None:
    params = SMALL.model_copy(update={"steps": 5})
    other = params.model_copy(update={"seed": 1})
    runs = {"one": params, "two": params, "other": other}
    histories = [SftWarmStarter(p).fit(TRACES, tmp_path / name, lambda _: None) for name, p in runs.items()]
    one, two, three = (digest(tmp_path / name) for name in runs)
    assert one == two != three
    assert histories[0] == histories[1]


@pytest.mark.parametrize(
    ("batch_size", "microbatch", "parts"),
    [(64, 16, 4), (16, 16, 1), (8, 16, 1), (16, 5, 4), (7, 4, 7), (1, 1, 1), (12, 5, 3)],
)
def test_a_batch_is_cut_into_equal_parts_and_stays_as_large_as_asked(
    batch_size: int, microbatch: int, parts: int
) -> None:
    assert _parts(batch_size, microbatch) == parts


def test_the_batch_size_is_what_the_params_say_whatever_the_microbatch(tmp_path: Path) -> None:
    weights = []
    for microbatch in (3, 8, 16):
        params = SMALL.model_copy(update={"steps": 3, "batch_size": 8, "microbatch": microbatch})
        SftWarmStarter(params).fit(TRACES, tmp_path / str(microbatch), lambda _: None)
        weights.append(dict(load_policy(tmp_path / str(microbatch))[0].named_parameters()))
    for other in weights[1:]:
        assert max((other[name] - weights[0][name]).abs().max().item() for name in other) < 1e-5


@pytest.mark.parametrize(("rows", "steps", "size"), [(10, 7, 5), (16, 4, 4), (7, 9, 3), (3, 4, 8)])
def test_batches_cover_each_epoch_once_and_are_sorted_within(rows: int, steps: int, size: int) -> None:
    lengths = [(7 * row) % 5 for row in range(rows)]
    order = _sorted_batches(lengths, steps, size, seed=0)
    assert len(order) == steps * size
    counts = [order.count(row) for row in range(rows)]
    assert max(counts) - min(counts) <= 1
    assert max(counts) == -(-steps * size // rows)
    for at in range(0, len(order), size):
        drawn = [lengths[row] for row in order[at : at + size]]
        assert drawn == sorted(drawn)
    if rows % size == 0:  # then an epoch ends with a batch
        for at in range(0, len(order) - rows + 1, rows):
            assert sorted(order[at : at + rows]) == list(range(rows))
    assert order == _sorted_batches(lengths, steps, size, seed=0)
    assert order != _sorted_batches(lengths, steps, size, seed=1)


def test_without_traces_a_checkpoint_has_to_be_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no traces") as caught:
        SftWarmStarter(SMALL).fit([], tmp_path / "policy", lambda _: None)
    assert "warmstart.checkpoint" in caught.value.fix
    assert not (tmp_path / "policy").exists()


# ---- from a checkpoint ----


def checkpoint(path: Path | str) -> CheckpointWarmStarter:
    starter = make_warm_starter(WarmstartParams(checkpoint=str(path)))
    assert isinstance(starter, CheckpointWarmStarter)
    return starter


def test_a_checkpoint_by_path_is_copied_and_works(policy: Path, tmp_path: Path) -> None:
    told: list[int] = []
    starter = checkpoint(policy)
    assert starter.fit([], tmp_path / "copy", told.append) == []
    assert sum(told) == starter.steps() == 1
    ours, theirs = (dict(load_policy(folder)[0].named_parameters()) for folder in (tmp_path / "copy", policy))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    requests = [SampleRequest("3+5=?\n", seed) for seed in range(5)]
    samples = [
        TransformersSampler(folder, temperature=1.0, top_p=1.0, max_prompt_tokens=9, max_new_tokens=9).sample(
            requests, lambda _: None
        )
        for folder in (policy, tmp_path / "copy")
    ]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("name", ["nothing/here", "papo-tests/no-such-model", "not a model id!", "/nothing"])
def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        checkpoint(name).fit([], tmp_path / "copy", lambda _: None)
    assert caught.value.where == f"warmstart.checkpoint = {name}"
    assert "safetensors" in caught.value.fix
    assert not (tmp_path / "copy").exists()


def test_a_checkpoint_of_pickles_only_is_refused(policy: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    shutil.copytree(policy, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the weights are pickled"):
        checkpoint(folder).fit([], tmp_path / "copy", lambda _: None)
    assert not (tmp_path / "copy").exists()


def test_a_corrupt_checkpoint_is_refused(policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corrupt"
    shutil.copytree(policy, folder)
    (folder / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        checkpoint(folder).fit([], tmp_path / "copy", lambda _: None)
    assert caught.value.where == f"warmstart.checkpoint = {folder}"


@pytest.mark.parametrize("params", [SMALL, WarmstartParams(checkpoint="x")])
def test_versions_name_the_libraries(params: WarmstartParams) -> None:
    assert {"torch", "transformers"} <= set(make_warm_starter(params).versions())

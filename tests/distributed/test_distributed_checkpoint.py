"""torch.distributed.checkpoint: masks come along, over any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_runs import CHOSEN, assert_same, build, on_ranks, outcome, train
from runs import STEPS, SmallNet
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import sparsetrain as st

SAVED_AT = 7
#: One of every policy, and what keeps more than masks.
CASES = [
    *("static", "set", "rigl", "snfs", "gradual", "gradual movement", "nm_sparse", "slimming"),
    *("dynamic_network_surgery", "surgery by threshold", "hard concrete", "hard concrete inputs"),
    *("gumbel", "gumbel 2:4", "variational dropout", "soft threshold", "soft threshold outputs"),
    *("movement", "movement soft"),
]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(model: nn.Module, optimizer: st.SparseOptimizer, path: str) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)


def load(model: nn.Module, optimizer: st.SparseOptimizer, path: str) -> None:
    weights, state = get_state_dict(model, optimizer)
    assert optimizer.step_count == 0
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    assert optimizer.step_count == SAVED_AT


def save_all(rank: int, folder: str) -> dict[str, Any]:
    found = {}
    for name in CASES:
        model, optimizer = build("even", name)
        train(model, optimizer, range(SAVED_AT), rank, dist.get_world_size())
        save(model, optimizer, f"{folder}/{name}")
        torch.manual_seed(6)
        train(model, optimizer, range(SAVED_AT, STEPS), rank, dist.get_world_size())
        found[name] = outcome(model, optimizer)
    return found


def load_all(rank: int, folder: str) -> dict[str, Any]:
    found = {}
    for name in CASES:
        model, optimizer = build("even", name)
        load(model, optimizer, f"{folder}/{name}")
        st.distributed.check_masks(optimizer)
        torch.manual_seed(6)
        train(model, optimizer, range(SAVED_AT, STEPS), rank, dist.get_world_size())
        found[name] = outcome(model, optimizer)
    return found


def test_a_checkpoint_of_two_ranks_goes_on_with_two_one_and_four(tmp_path: Path) -> None:
    uninterrupted = on_ranks(save_all, 2, tmp_path / "saved", str(tmp_path))[0]
    for ranks in (2, 1, 4):
        for found in on_ranks(load_all, ranks, tmp_path / str(ranks), str(tmp_path)):
            for name in CASES:
                assert_same(found[name], uninterrupted[name])
                if ranks == 2:
                    for key, weight in uninterrupted[name]["weights"].items():
                        assert torch.equal(found[name]["weights"][key], weight), (name, key)
    for name in CASES:  # and without any process group
        model, optimizer = build("even", name, sharded=False)
        load(model, optimizer, f"{tmp_path}/{name}")
        torch.manual_seed(6)
        train(model, optimizer, range(SAVED_AT, STEPS), 0, 1)
        assert_same(outcome(model, optimizer), uninterrupted[name])


@pytest.mark.parametrize("name", ["rigl", "snfs", "dynamic_network_surgery", "hard concrete"])
@pytest.mark.parametrize("optimizer_name", ["sgd", "adam"])
def test_one_process_saves_and_loads_so_too(tmp_path: Path, name: str, optimizer_name: str) -> None:
    model, optimizer = build("even", name, optimizer_name, sharded=False)
    train(model, optimizer, range(SAVED_AT), 0, 1)
    save(model, optimizer, str(tmp_path))
    torch.manual_seed(6)
    train(model, optimizer, range(SAVED_AT, STEPS), 0, 1)
    other, resumed = build("even", name, optimizer_name, sharded=False)
    load(other, resumed, str(tmp_path))
    torch.manual_seed(6)
    train(other, resumed, range(SAVED_AT, STEPS), 0, 1)
    expected = outcome(model, optimizer)
    assert_same(outcome(other, resumed), expected)
    for key, weight in other.named_parameters():
        assert torch.equal(weight, expected["weights"][key])


def test_making_a_state_to_load_into_is_no_step() -> None:
    model, optimizer = build("even", "rigl", "adam", sharded=False)
    events: list[Any] = []
    optimizer.register_update_hook(events.append)
    masks, weights = optimizer.masks(), [p.clone() for p in model.parameters()]
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.state and optimizer.step_count == 0 and not events
    assert all(torch.equal(mask, masks[name]) for name, mask in optimizer.masks().items())
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_a_step_with_learning_rate_and_gradients_of_0_is_one() -> None:
    model = SmallNet()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = st.SparseOptimizer(base, model, CHOSEN["rigl"])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert optimizer.step_count == 1


def test_a_flattened_state_says_that_it_has_no_masks() -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = build("even", "rigl", sharded=False)
    train(model, optimizer, range(3), 0, 1)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    with pytest.raises(ValueError, match="this checkpoint has no masks"):
        set_optimizer_state_dict(model, optimizer, state, options=options)
    assert optimizer.step_count == 3


def full_state(rank: int) -> dict[str, Any]:
    found = {}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    into = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for name in ("rigl", "snfs", "nm_sparse", "movement"):
        model, optimizer = build("even", name)
        train(model, optimizer, range(SAVED_AT), rank, 2)
        weights, state = get_state_dict(model, optimizer, options=options)
        torch.manual_seed(6)
        train(model, optimizer, range(SAVED_AT, STEPS), rank, 2)
        other, resumed = build("even", name)
        set_model_state_dict(other, weights, options=into)
        set_optimizer_state_dict(other, resumed, state, options=into)
        torch.manual_seed(6)
        train(other, resumed, range(SAVED_AT, STEPS), rank, 2)
        found[name] = outcome(other, resumed), outcome(model, optimizer)
    return found


def test_whole_states_on_rank_0_are_shared_out_again(tmp_path: Path) -> None:
    for found in on_ranks(full_state, 2, tmp_path):
        for resumed, expected in found.values():
            assert_same(resumed, expected)


def test_damage_is_told_before_anything_changes() -> None:
    model, optimizer = build("even", "snfs", sharded=False)
    train(model, optimizer, range(3), 0, 1)
    for damage in ("plain", "tensors", "generator"):
        state = get_optimizer_state_dict(model, optimizer)
        del state["param_groups"][0]["sparsetrain"][damage]
        other, fresh = build("even", "snfs", sharded=False)
        masks = fresh.masks()
        with pytest.raises(ValueError, match=f"the checkpoint is damaged.*{damage}"):
            set_optimizer_state_dict(other, fresh, state)
        assert fresh.step_count == 0
        assert all(torch.equal(mask, masks[name]) for name, mask in fresh.masks().items())


def test_a_plain_file_is_no_larger_for_it(tmp_path: Path) -> None:
    """What travels shares its tensors with the rest of the state dict."""
    model, optimizer = build("even", "snfs", sharded=False)
    train(model, optimizer, range(3), 0, 1)
    state = optimizer.state_dict()
    torch.save(state, tmp_path / "both")
    del state["param_groups"][0]["sparsetrain"]
    torch.save(state, tmp_path / "one")
    sizes = [(tmp_path / name).stat().st_size for name in ("both", "one")]
    assert sizes[0] - sizes[1] < 4096

"""The sparse part of a checkpoint: masks as bits, and a refusal of what does not belong."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as some
from runs import POLICIES, train, wrap
from torch import Tensor

import sparsetrain as st
from sparsetrain.checkpoint import KEY, VERSION, check, describe_target
from sparsetrain.storage.bits import (
    pack_mask,
    pack_rows,
    packed_shape,
    unpack_mask,
    unpack_rows,
)

shapes = some.lists(some.integers(0, 5), max_size=5).map(tuple)


def random_mask(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@given(shape=shapes, seed=some.integers(0, 2**32))
def test_packing_and_unpacking_a_mask(shape: tuple[int, ...], seed: int) -> None:
    mask = random_mask(shape, seed)
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(mask.numel() / 8),)
    again = unpack_mask(packed, shape)
    assert again.dtype == torch.bool
    assert torch.equal(again, mask)


@given(shape=shapes, seed=some.integers(0, 2**32))
def test_packing_does_not_depend_on_the_memory_layout(shape: tuple[int, ...], seed: int) -> None:
    mask = random_mask(shape, seed)
    backwards = tuple(reversed(range(mask.dim())))
    turned = mask.permute(backwards).contiguous().permute(backwards)
    assert torch.equal(pack_mask(turned), pack_mask(mask))


@given(shape=shapes, seed=some.integers(0, 2**32), data=some.data())
def test_packed_rows_can_be_shared_out(shape: tuple[int, ...], seed: int, data: Any) -> None:
    assume(shape)
    mask = random_mask(shape, seed)
    packed = pack_rows(mask)
    assert tuple(packed.shape) == packed_shape(shape)
    assert torch.equal(unpack_rows(packed, shape), mask)
    cut = data.draw(some.integers(0, shape[0]))
    parts = packed[:cut], packed[cut:]
    rows = [unpack_rows(part, (part.shape[0], *shape[1:])) for part in parts]
    assert torch.equal(torch.cat(rows), mask)


def test_the_first_weight_is_the_highest_bit() -> None:
    mask = torch.tensor([[True, False, False, False, False], [False, True, True, True, False]])
    assert pack_mask(mask).tolist() == [0b10000011, 0b10000000]


def test_an_unpacked_mask_can_be_written_to() -> None:
    mask = unpack_mask(pack_mask(torch.ones(3, 3, dtype=torch.bool)), (3, 3))
    mask[0] = False
    assert int(mask.sum()) == 6


def test_what_is_saved_of_a_target() -> None:
    _, optimizer = wrap("momentum", "rigl")
    target = optimizer.targets["hidden.weight"]
    saved = describe_target(target)
    assert saved.keys() == {"shape", "storage", "mask"}
    assert saved["shape"] == [16, 32]
    assert torch.equal(unpack_rows(saved["mask"], (16, 32)), target.mask)
    _, latent = wrap("momentum", "nm_sparse")
    assert describe_target(latent.targets["hidden.weight"]).keys() >= {"shape", "mask", "latent"}


@pytest.mark.parametrize("policy", POLICIES)
def test_checkpoints_hold_nothing_that_weights_only_refuses(policy: str) -> None:
    model, optimizer = wrap("adamw_amsgrad", policy)
    optimizer.register_update_hook(lambda event: None)  # so that explored weights are saved too
    train(model, optimizer, 0, 4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    check(saved[KEY], optimizer.recipe, optimizer.targets, 1)
    assert saved[KEY]["version"] == VERSION
    assert saved[KEY]["step_count"] == 4
    for name, target in optimizer.targets.items():
        entry = saved[KEY]["targets"][name]
        assert torch.equal(unpack_rows(entry["mask"], target.shape), target.mask)


def renamed(saved: dict[str, Any]) -> None:
    saved["targets"]["hiden.weight"] = saved["targets"].pop("hidden.weight")


def further(saved: dict[str, Any]) -> None:
    saved["targets"]["heads.weight"] = saved["targets"]["head.weight"]


def reshaped(saved: dict[str, Any]) -> None:
    saved["targets"]["conv.weight"]["shape"] = [8, 4, 9]


def older(saved: dict[str, Any]) -> None:
    saved["version"] = 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (older, f"version 0 is not {VERSION}"),
        (renamed, r"no mask for hidden\.weight .*'hiden\.weight'"),
        (further, r"mask for heads\.weight.*'head\.weight'"),
        (reshaped, r"conv\.weight has shape \(8, 4, 9\) .* \(8, 4, 3, 3\) here"),
    ],
)
def test_a_checkpoint_of_other_layers_is_refused_by_name(
    change: Callable[[dict[str, Any]], None], message: str
) -> None:
    _, optimizer = wrap("momentum", "rigl")
    saved = copy.deepcopy(optimizer.state_dict()[KEY])
    check(saved, optimizer.recipe, optimizer.targets, 1)
    change(saved)
    with pytest.raises(ValueError, match=message):
        check(saved, optimizer.recipe, optimizer.targets, 1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (POLICIES["set"], r"another policy: recipe\.policy\.\w+ is .* there and .* here"),
        (st.RigL(sparsity=0.7, total_steps=14, update={"every": 3}), r"sparsity is 0\.7 .* 0\.8"),
        (st.RigL(sparsity=0.8, total_steps=15, update={"every": 3}), "total_steps is 15 .* 14"),
        (
            st.RigL(sparsity=0.8, total_steps=14, update={"every": 4}),
            r"recipe\.policy\.update\.every is 4 there and 3 here",
        ),
        (
            {"policy": POLICIES["rigl"], "rules": [{"match": "norm.weight", "dense": True}]},
            r"recipe\.rules is \[.*norm\.weight.* there and \[\] here",
        ),
        (
            st.RigL(sparsity=0.8, total_steps=14, allocation="uniform", update={"every": 3}),
            r"allocation\.kind is 'uniform' there and 'erdos_renyi_kernel' here",
        ),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused_by_field(other: Any, message: str) -> None:
    _, optimizer = wrap("momentum", "rigl")
    saved = wrap("momentum", other)[1].state_dict()[KEY]
    with pytest.raises(ValueError, match=message):
        check(saved, optimizer.recipe, optimizer.targets, 1)


@pytest.mark.parametrize("saved", [None, [], "masks"])
def test_a_checkpoint_without_masks_is_refused(saved: Any) -> None:
    _, optimizer = wrap("momentum", "rigl")
    with pytest.raises(ValueError, match=r"no masks .*optimizer\.base"):
        check(saved, optimizer.recipe, optimizer.targets, 1)

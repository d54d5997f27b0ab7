"""What the tests of csr storage share: sparse layers, their dense twins, and runs of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from runs import OPTIMIZERS, SmallNet, batch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st
from sparsetrain import storage_choice
from sparsetrain.storage.csr.convert import sparsify
from sparsetrain.storage.csr.layers import SparseLayer
from sparsetrain.storage.csr.measure import Timing
from sparsetrain.storage.csr.target import CsrTarget

#: Optimizers that treat each weight by itself, so that it does not matter how weights are held.
WEIGHTWISE = sorted(OPTIMIZERS.keys() - {"adafactor", "lbfgs", "muon"})


def policies(steps: int, every: int = 7) -> dict[str, st.Policy]:
    """Every policy that csr storage serves, for a run of so many steps."""
    dynamic: dict[str, Any] = {"sparsity": 0.8, "total_steps": steps, "update": {"every": every}}
    return {
        "static": st.Static(sparsity=0.8),
        "set": st.SET(**dynamic),
        "set_by_sign": st.SET(drop="magnitude_by_sign", **dynamic),
        "set_grow_std": st.SET(grow_std=0.1, **dynamic),
        "rigl": st.RigL(**dynamic),
        "snfs": st.SNFS(**dynamic),
        "gradual": st.Gradual(**dynamic),
    }


def random_mask(shape: tuple[int, ...], density: float, seed: int = 0) -> Tensor:
    """Bool; at least one True."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    mask.view(-1)[seed % mask.numel()] = True
    return mask


def pair(dense: nn.Module, mask: Tensor) -> tuple[nn.Module, SparseLayer]:
    """A dense layer with zeros outside of the mask, and a sparse one with the same weights."""
    sparse = type(dense)(**_arguments(dense)).to(dense.weight.dtype)
    with torch.no_grad():
        dense.weight[~mask] = 0.0
    sparse.load_state_dict(dense.state_dict())
    return dense, sparsify(sparse, mask)


def _arguments(layer: nn.Module) -> dict[str, Any]:
    names = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride")
    names += ("padding", "dilation")
    found = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    return found | {"bias": layer.bias is not None}


@contextmanager
def worth_it_from(density: float) -> Iterator[None]:
    """Within it, `storage="csr"` holds every layer of this density or less by its non-zeros."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage_choice, "worth", lambda owner: density)
        yield


class Measured:
    """Stands in for the measurement of `storage="auto"`, and remembers what it was asked."""

    def __init__(self, sparse_is_faster: Callable[[nn.Module, float], bool]) -> None:
        self.asked: list[tuple[nn.Module, float, tuple[int, ...]]] = []
        self._says = sparse_is_faster

    def __call__(self, layer: nn.Module, density: float, shape: tuple[int, ...]) -> Timing:
        self.asked.append((layer, density, shape))
        return Timing(2.0, 1.0) if self._says(layer, density) else Timing(1.0, 2.0)


@contextmanager
def measuring(sparse_is_faster: Callable[[nn.Module, float], bool]) -> Iterator[Measured]:
    """Within it, `storage="auto"` finds csr faster where the function says so."""
    measured = Measured(sparse_is_faster)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage_choice, "measure", measured)
        yield measured


def wrap(
    storage: str,
    policy: st.Policy | str,
    optimizer: str = "momentum",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    steps: int = 14,
    worth: float = 1.0,
) -> tuple[SmallNet, st.SparseOptimizer]:
    """As `runs.wrap`, in float64, with masks changing every third of 14 steps."""
    model = SmallNet(seed).to(dtype)
    chosen = policies(steps, 3)[policy] if isinstance(policy, str) else policy
    base = OPTIMIZERS[optimizer](model.parameters())
    with worth_it_from(worth):
        return model, st.SparseOptimizer(base, model, chosen, seed=seed, storage=storage)


def loss_of(model: nn.Module, step: int) -> Tensor:
    """The loss of one step's batch."""
    x, y = batch(step)
    return F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)


def backward(model: nn.Module, step: int) -> Tensor:
    """Gradients of one step's batch."""
    model.zero_grad()
    loss = loss_of(model, step)
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: st.SparseOptimizer, first: int, last: int) -> list[float]:
    """Steps first to last - 1; returns the losses."""
    losses = []
    for step in range(first, last):
        if isinstance(optimizer.base, torch.optim.LBFGS):
            losses.append(float(optimizer.step(lambda step=step: backward(model, step))))
        else:
            losses.append(float(backward(model, step)))
            optimizer.step()
    return losses


def agree(
    one: st.SparseOptimizer, other: st.SparseOptimizer, *, within: float | None = None
) -> None:
    """The same masks, and (within a tolerance) the same weights."""
    assert one.targets.keys() == other.targets.keys()
    for name, target in one.targets.items():
        twin = other.targets[name]
        assert torch.equal(target.mask, twin.mask), f"masks of {name} differ"
        assert target.active == twin.active == int(twin.mask.sum())
        if within is not None:
            assert torch.allclose(dense_weight(target), dense_weight(twin), rtol=0, atol=within)


def dense_weight(target: Any) -> Tensor:
    """The weight of a target as a dense tensor, however it is held."""
    if isinstance(target, CsrTarget):
        return target.layer.to_dense()
    return target.param.detach()


def spread(target: Any, tensor: Tensor) -> Tensor:
    """A tensor shaped like a target's parameter, as a dense one of the weight's shape."""
    if not isinstance(target, CsrTarget):
        return tensor
    dense = tensor.new_zeros(target.numel)
    dense[target.active_indices()] = tensor
    return dense.view(target.shape)


def held(optimizer: st.SparseOptimizer) -> dict[str, str]:
    """How each weight is held."""
    return {name: target.storage for name, target in optimizer.targets.items()}


def why(optimizer: st.SparseOptimizer) -> dict[str, str]:
    """What the summary says of how each weight is held."""
    return {row.name: row.why for row in optimizer.summary().rows}


def record(optimizer: st.SparseOptimizer) -> list[dict[str, Tensor]]:
    """A list that gets all masks at every update from now on."""
    seen: list[dict[str, Tensor]] = []
    optimizer.register_update_hook(lambda event: seen.append(optimizer.masks()))
    return seen


def twins(
    policy: st.Policy | str,
    optimizer: str,
    run: Callable[[nn.Module, st.SparseOptimizer, int], float],
    steps: int,
    *,
    tolerance: float = 1e-9,
    dtype: torch.dtype = torch.float64,
) -> tuple[st.SparseOptimizer, st.SparseOptimizer]:
    """Train masked and by non-zeros, `run` making each step, and compare masks and losses."""
    made = [
        wrap(storage, policy, optimizer, steps=steps, dtype=dtype) for storage in ("masked", "csr")
    ]
    assert set(held(made[1][1]).values()) == {"csr"}
    (model, masked), (other, csr) = made
    for step in range(steps):
        losses = run(model, masked, step), run(other, csr, step)
        assert abs(losses[0] - losses[1]) <= tolerance * max(1.0, abs(losses[0])), f"step {step}"
        agree(masked, csr)
    agree(masked, csr, within=100 * tolerance)
    return masked, csr

"""What policies see of a target in csr storage, its dense gradient above all."""

from __future__ import annotations

import copy

import pytest
import torch
from csr_targets import NAME, Pair, brute_largest
from hypothesis import given, settings
from hypothesis import strategies as some
from sparse_twins import random_mask
from torch import Tensor

from sparsetrain.storage.csr import growth
from sparsetrain.storage.csr.layers import SparseLinear
from sparsetrain.storage.csr.product import Tape
from sparsetrain.storage.csr.target import CsrTarget


@settings(max_examples=60)
@given(seed=some.integers(0, 10**6), kinds=some.sampled_from([1, 3, 1000]))
def test_the_least_active_and_the_largest_free(seed: int, kinds: int) -> None:
    """With ties among the weights and among the scores."""
    generator = torch.Generator().manual_seed(seed)
    both = Pair((5, 7), random_mask((35,), 0.5, seed).nonzero().view(-1).tolist(), seed)
    masked, csr = both.targets
    weight = torch.randint(-kinds, kinds + 1, (5, 7), generator=generator).double()
    with torch.no_grad():
        masked.param.copy_(torch.where(masked.mask, weight, 0.0))
        csr.param.copy_(weight.view(-1)[csr.active_indices()])
    scores = torch.randint(-kinds, kinds + 1, (5, 7), generator=generator).double()
    assert csr.shape == masked.shape and csr.numel == masked.numel
    assert csr.density == masked.density
    for count in {0, 1, masked.active // 2, masked.active}:
        dropped = masked.least_active(count)
        assert torch.equal(csr.least_active(count), dropped)
        assert torch.equal(csr.active_values(dropped), masked.active_values(dropped))
        room = masked.numel - masked.active + count
        for many in {0, room // 2, room}:
            grown = masked.largest_free(scores, many, dropped)
            assert torch.equal(csr.largest_free(scores, many, dropped), grown)
    assert torch.equal(csr.at_active(csr.param.detach()), masked.at_active(masked.param.detach()))


def test_bad_weights_and_scores_name_the_layer() -> None:
    csr = Pair((4, 5), [0, 3, 7, 9], 0).targets[1]
    none = torch.tensor([], dtype=torch.int64)
    scores = torch.ones(4, 5).double()
    scores[0, 0] = float("nan")
    assert csr.largest_free(scores, 2, none).numel() == 2
    scores[0, 1] = float("nan")
    with pytest.raises(ValueError, match=r"hidden\.weight"):
        csr.largest_free(scores, 2, none)
    with pytest.raises(ValueError, match=r"hidden\.weight"):
        csr.least_active(5)
    with torch.no_grad():
        csr.param[1] = float("nan")
    with pytest.raises(ValueError, match=r"hidden\.weight"):
        csr.least_active(2)


def test_what_it_says_of_itself() -> None:
    layer = SparseLinear(10, 8, 0.1)
    target = CsrTarget(NAME, layer)
    assert (target.storage, target.holds_zeros, target.built) == ("csr", False, False)
    assert (target.active, target.numel, target.shape, target.density) == (8, 80, (8, 10), 0.1)
    assert int(target.mask.sum()) == 8 and target.mask.shape == (8, 10)
    assert CsrTarget(NAME, layer, built=True).built
    before = layer.weight
    target.before_step(), target.after_step(True), target.mask_weight(), target.mask_gradient()
    target.check_outside_writes(), target.conceal(), target.check_gradient()
    assert torch.equal(layer.weight, before)


# The dense gradient, which never is one tensor.


def dense_gradient(passes: list[tuple[Tensor, Tensor]]) -> Tensor:
    return sum((grad.t() @ x for x, grad in passes), torch.zeros(8, 10).double())


class Watched:
    """A sparse layer whose dense gradient is wanted, and the passes that went through it."""

    def __init__(self, density: float = 0.2) -> None:
        generator = torch.Generator().manual_seed(1)
        self.layer = SparseLinear(10, 8, density, dtype=torch.float64, generator=generator)
        self.target = CsrTarget(NAME, self.layer)
        self.target.watch_gradient(True)
        self.passes: list[tuple[Tensor, Tensor]] = []

    def run(self, seed: int, batch: int = 4) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, 10, generator=generator).double()
        grad = torch.randn(batch, 8, generator=generator).double()
        self.layer(x).backward(grad)
        self.passes.append((x, grad))

    def zero(self, set_to_none: bool) -> None:
        self.layer.zero_grad(set_to_none=set_to_none)
        self.passes.clear()

    def agrees(self) -> bool:
        found = self.target.whole_gradient()
        assert found is not None and found.shape == (8, 10)
        wanted = dense_gradient(self.passes)
        at = self.target.active_indices()
        assert torch.allclose(self.layer.values.grad, wanted.view(-1)[at])
        return torch.allclose(found, wanted)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_it_is_the_sum_over_the_passes_since_zero_grad(set_to_none: bool) -> None:
    watched = Watched()
    assert not watched.target.has_gradient and watched.target.whole_gradient() is None
    for seeds in ((0,), (1, 2, 3), (4, 5)):
        watched.zero(set_to_none)
        for seed in seeds:
            watched.run(seed)
        assert watched.target.has_gradient and watched.agrees()


def test_the_steepest_are_the_largest_of_the_dense_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched = Watched()
    for seed in range(3):
        watched.run(seed)
    gradient, target = dense_gradient(watched.passes), watched.target
    freed = target.active_indices()[::3].contiguous()
    kept = set(target.active_indices().tolist()) - set(freed.tolist())
    for block in (1, 25, 10**6):
        monkeypatch.setattr(growth, "_BLOCK", block)
        for count in (0, 1, 9, 80 - len(kept)):
            found = target.steepest_free(count, freed)
            assert found.tolist() == brute_largest(gradient, count, kept)


def test_several_calls_in_one_pass_belong_together() -> None:
    for set_to_none in (True, False):
        watched = Watched()
        for _ in range(2):
            watched.zero(set_to_none)
            x = torch.randn(3, 10).double()
            outs = [watched.layer(factor * x) for factor in (1, 2, 3)]
            sum(out.square().sum() for out in outs).backward()
            for factor, out in zip((1, 2, 3), outs, strict=True):
                watched.passes.append((factor * x, 2 * out.detach()))
            assert watched.agrees()


def test_a_pass_that_leaves_the_active_weights_without_gradient_counts_too() -> None:
    """Its zeros in the values' gradient are not those of `zero_grad`."""
    watched = Watched(0.05)
    columns = watched.layer.pattern.columns.unique().tolist()
    x = torch.ones(3, 10).double()
    x[:, columns] = 0.0
    grad = torch.ones(3, 8).double()
    watched.layer(x).backward(grad)
    watched.passes.append((x, grad))
    assert not watched.layer.values.grad.any()
    watched.run(1)
    assert watched.agrees()


def test_gradients_that_are_taken_aside_do_not_count() -> None:
    """Of the input alone, as for adversarial examples or a look at saliency."""
    watched = Watched()
    watched.run(0)
    x = torch.ones(2, 10, dtype=torch.float64, requires_grad=True)
    torch.autograd.grad(watched.layer(x).square().sum(), x)
    assert watched.agrees()
    watched.run(1)
    torch.autograd.grad(watched.layer(x).square().sum(), x)
    assert watched.agrees()


def test_inputs_may_be_overwritten_once_the_pass_is_over() -> None:
    """One buffer for all micro-batches, of one sample or turned, of which no copy is needed."""
    for make in (lambda: torch.zeros(1, 10), lambda: torch.zeros(10, 3).t()):
        watched = Watched()
        buffer = make().double()
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
            grad = torch.randn(buffer.shape[0], 8, generator=generator).double()
            watched.layer(buffer).backward(grad)
            watched.passes.append((buffer.clone(), grad.clone()))
            grad.zero_()
        buffer.zero_()
        assert watched.agrees()


def test_a_layer_that_the_last_pass_did_not_reach() -> None:
    """With gradients set to zero and not to None its gradient is 0, as that of a dense weight."""
    watched = Watched()
    watched.run(0)
    watched.zero(set_to_none=False)
    gradient = watched.target.whole_gradient()
    assert gradient is None or not gradient.any()
    fresh = Watched()
    fresh.layer.values.grad = torch.zeros_like(fresh.layer.values)
    none = torch.tensor([], dtype=torch.int64)
    for target in (watched.target, fresh.target):
        free = [i for i in range(80) if i not in set(target.active_indices().tolist())]
        assert target.steepest_free(3, none).tolist() == free[:3]


def test_without_watching_an_update_says_what_to_do() -> None:
    watched = Watched()
    watched.target.watch_gradient(False)
    assert watched.layer.tape is None
    watched.run(0)
    for ask in (
        watched.target.whole_gradient,
        lambda: watched.target.steepest_free(1, torch.tensor([], dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match=r"hidden\.weight.*optimizer\.expect_update\(\)"):
            ask()


def test_watching_twice_forgets_nothing_and_release_ends_it() -> None:
    watched = Watched()
    watched.run(0)
    watched.target.watch_gradient(True)
    assert watched.agrees()
    again = copy.deepcopy(watched.target)
    assert again.layer.values.grad is None  # as torch copies parameters
    assert isinstance(again.layer.tape, Tape) and again.layer.tape is not watched.layer.tape
    watched.target.release()
    assert watched.layer.tape is None


def test_a_gradient_that_accumulates_does_not_keep_passes_of_cleared_ones() -> None:
    watched = Watched()
    for seed in range(5):
        watched.zero(set_to_none=seed % 2 == 0)
        watched.run(seed)
        assert watched.layer.tape is not None and len(watched.layer.tape.factors) == 1

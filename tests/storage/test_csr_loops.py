"""What training loops do between the lines is the same by non-zeros as with masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from csr_training import DYNAMIC, step_of
from runs import same, weights
from sparse_twins import (
    agree,
    backward,
    held,
    loss_of,
    policies,
    train,
    twins,
    worth_it_from,
    wrap,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sparsetrain as st


def two_micro_batches(model: nn.Module, optimizer: Any, step: int) -> float:
    optimizer.zero_grad()
    losses = [loss_of(model, 2 * step + k) / 2 for k in range(2)]
    for loss in losses:
        loss.backward()
    optimizer.step()
    return float(sum(losses).detach())


def one_pass_of_two_batches(model: nn.Module, optimizer: Any, step: int) -> float:
    optimizer.zero_grad()
    loss = (loss_of(model, 2 * step) + loss_of(model, 2 * step + 1)) / 2
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def zero_by(how: str) -> Callable[[nn.Module, Any, int], float]:
    def run(model: nn.Module, optimizer: Any, step: int) -> float:
        if how == "after the step":
            pass
        elif how == "model":
            model.zero_grad()
        elif how == "model to zeros":
            model.zero_grad(set_to_none=False)
        else:
            optimizer.zero_grad(set_to_none=how == "to none")
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        if how == "after the step":
            optimizer.zero_grad()
        return float(loss.detach())

    return run


def closure(model: nn.Module, optimizer: Any, step: int) -> float:
    def again() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss.detach()

    return float(optimizer.step(again))


def skipping(model: nn.Module, optimizer: Any, step: int) -> float:
    """As a gradient scaler does: some steps are left out, with zeroed gradients before the next."""
    optimizer.zero_grad(set_to_none=step % 2 == 0)
    loss = loss_of(model, step)
    loss.backward()
    if step % 3 != 1:
        optimizer.step()
    return float(loss.detach())


def twice_backward(model: nn.Module, optimizer: Any, step: int) -> float:
    optimizer.zero_grad()
    loss = loss_of(model, step)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def clipped(model: nn.Module, optimizer: Any, step: int) -> float:
    loss = backward(model, step)
    optimizer.mask_gradients()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return float(loss)


def adversarial(model: nn.Module, optimizer: Any, step: int) -> float:
    """Gradients of inputs, taken aside between the micro-batches."""
    optimizer.zero_grad()
    total = 0.0
    for k in range(2):
        x = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(step)).double()
        x.requires_grad_()
        (direction,) = torch.autograd.grad(model(x).logsumexp(1).sum(), x)
        loss = F.cross_entropy(model(x.detach() + direction.sign()), torch.tensor([0, 1, 2, k]))
        loss.backward()
        torch.autograd.grad(model(x).square().sum(), x)
        total += float(loss.detach())
    optimizer.step()
    return total


def checkpointed(reentrant: bool) -> Callable[[nn.Module, Any, int], float]:
    """Two micro-batches whose activations are computed again in the backward pass."""

    def run(model: Any, optimizer: Any, step: int) -> float:
        optimizer.zero_grad()
        total = 0.0
        for k in range(2):
            generator = torch.Generator().manual_seed(2 * step + k)
            x = torch.randn(6, 4, 4, 4, generator=generator).double().requires_grad_()
            h = checkpoint(model.conv, x, use_reentrant=reentrant)
            h = checkpoint(lambda h: F.relu(model.hidden(h)), h.flatten(1), use_reentrant=reentrant)
            loss = F.cross_entropy(model.head(h), torch.arange(6) % 3)
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        return total

    return run


LOOPS = {
    "two micro-batches": two_micro_batches,
    "one pass of two batches": one_pass_of_two_batches,
    "zero_grad to none": zero_by("to none"),
    "zero_grad to zeros": zero_by("to zeros"),
    "model.zero_grad": zero_by("model"),
    "model.zero_grad to zeros": zero_by("model to zeros"),
    "zero_grad after the step": zero_by("after the step"),
    "closure": closure,
    "skipped steps": skipping,
    "backward twice": twice_backward,
    "checkpointed, reentrant": checkpointed(True),
    "checkpointed": checkpointed(False),
    "adversarial": adversarial,
}


@pytest.mark.parametrize("policy", ["rigl", "snfs", "set_grow_std"])
@pytest.mark.parametrize("loop", LOOPS)
def test_the_same_in_every_training_loop(loop: str, policy: str) -> None:
    steps = 30
    masked, csr = twins(policies(steps, 3)[policy], "momentum", LOOPS[loop], steps)
    assert masked.step_count == csr.step_count == (20 if loop == "skipped steps" else steps)


@pytest.mark.parametrize("policy", ["rigl", "set", "gradual"])
def test_the_same_with_clipped_gradients(policy: str) -> None:
    twins(policies(20, 5)[policy], "momentum", clipped, 20)


def test_the_same_with_gradients_that_were_scaled_and_unscaled() -> None:
    """SNFS follows the gradient as `step()` finds it: unscaled, by a factor that changes."""

    def run(model: nn.Module, optimizer: Any, step: int) -> float:
        optimizer.zero_grad()
        loss, scale = loss_of(model, step), 10.0 ** (step % 4)
        (loss * scale).backward()
        for param in model.parameters():
            param.grad.div_(scale)
        optimizer.step()
        return float(loss.detach())

    twins(policies(20, 4)["snfs"], "sgd", run, 20)


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # of torch 2.6, by its own scheduler
@pytest.mark.parametrize("policy", ["rigl", "set"])
def test_the_same_with_learning_rate_schedules(policy: str) -> None:
    made = [wrap(storage, policy, "momentum", steps=30) for storage in ("masked", "csr")]
    schedules = [
        torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 25),
            ],
            milestones=[5],
        )
        for _, optimizer in made
    ]
    for step in range(30):
        losses = []
        for (model, optimizer), schedule in zip(made, schedules, strict=True):
            losses.append(step_of(model, optimizer, step))
            schedule.step()
        assert losses[0] == pytest.approx(losses[1], abs=1e-9)
        agree(made[0][1], made[1][1])
    assert made[0][1].param_groups[0]["lr"] == made[1][1].param_groups[0]["lr"] < 0.05


def test_a_gradient_scaler_works_on_what_is_held() -> None:
    made = [wrap(storage, "rigl", "momentum") for storage in ("masked", "csr")]
    for model, optimizer in made:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        for step in range(14):
            optimizer.zero_grad()
            loss = scaler.scale(loss_of(model, step))
            loss.backward()
            if step in (4, 6):
                optimizer.targets["hidden.weight"].param.grad.view(-1)[-1] = math.inf
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() != 1024.0
    assert made[0][1].step_count == made[1][1].step_count == 12
    agree(made[0][1], made[1][1], within=1e-8)


class Recurrent(nn.Module):
    """One layer under two names, called three times a pass."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(12, 12)
            self.head = nn.Linear(12, 3)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.again(h) + self.first(2 * h)))


@pytest.mark.parametrize("policy", ["rigl", "snfs", "set"])
def test_a_layer_that_is_called_several_times(policy: str) -> None:
    made: list[Any] = []
    for storage in ("masked", "csr"):
        model = Recurrent().double()
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with worth_it_from(1.0):
            optimizer = st.SparseOptimizer(base, model, policies(30, 3)[policy], storage=storage)
        assert held(optimizer)["first.weight"] == storage
        made.append((model, optimizer))
    for step in range(30):
        losses = []
        for model, optimizer in made:
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)).double()
            loss = F.cross_entropy(model(x), torch.arange(8) % 3)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], abs=1e-9)
        agree(made[0][1], made[1][1])


@pytest.mark.parametrize("policy", ["rigl", "snfs", "set"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_layer_that_some_steps_do_not_use(policy: str, set_to_none: bool) -> None:
    """A model with a branch: at every third step the hidden layer is passed by."""
    made = [wrap(storage, policies(24, 2)[policy], "sgd") for storage in ("masked", "csr")]
    for step in range(24):
        for model, optimizer in made:
            optimizer.zero_grad(set_to_none=set_to_none)
            if step % 3 == 2:
                x = torch.ones(5, 4, 4, 4, dtype=torch.float64)
                model.conv(x).square().mean().backward()
            else:
                loss_of(model, step).backward()
            optimizer.step()
        agree(made[0][1], made[1][1])


@pytest.mark.filterwarnings("ignore")  # of what Dynamo does on its way
def test_a_compiled_model_trains_alike() -> None:
    plain, optimizer = wrap("csr", "rigl")
    train(plain, optimizer, 0, 6)
    model, other = wrap("csr", "rigl")
    train(torch.compile(model, backend="eager"), other, 0, 6)
    assert same(weights(plain), weights(model))


def test_a_transformer_trains_and_takes_its_fast_path_in_evaluation() -> None:
    outputs = []
    for storage in ("masked", "csr"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).double()
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        policy = st.RigL(sparsity=0.9, **DYNAMIC)
        optimizer = st.SparseOptimizer(base, model, policy, storage=storage)
        for step in range(12):
            optimizer.zero_grad()
            x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(step)).double()
            (model(x) - x.roll(1, 1)).square().mean().backward()
            optimizer.step()
        wanted = {"masked": "masked", "csr": "csr"}[storage]
        assert held(optimizer)["linear1.weight"] == held(optimizer)["linear2.weight"] == wanted
        assert held(optimizer)["self_attn.out_proj.weight"] == "masked"
        model.eval()
        with torch.no_grad():
            outputs.append(model(x))
    assert torch.allclose(*outputs, atol=1e-9)


def test_inplace_activations_and_views_behind_layers() -> None:
    """As VGG has them: Conv2d, ReLU(inplace=True), view."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.features = nn.Sequential(
                    nn.Conv2d(4, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)
                )
                self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.features(x)
            return self.head(h.view(h.size(0), -1))

    losses = []
    for storage in ("masked", "csr"):
        model = Net().double()
        with worth_it_from(1.0):
            optimizer = st.SparseOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.1),
                model,
                st.RigL(sparsity=0.7, **DYNAMIC),
                storage=storage,
            )
        assert set(held(optimizer).values()) == {storage}
        losses.append(train(model, optimizer, 0, 12))
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)

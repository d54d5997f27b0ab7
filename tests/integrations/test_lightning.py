"""Lightning trains sparse: every policy as in a loop of one's own, and all that a Trainer does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning_runs import (
    ALL,
    BATCHES,
    EPOCHS,
    LEARNED,
    Net,
    agree,
    all_masked,
    by_hand,
    data,
    held,
    sparse,
    sparse_of,
    trainer_of,
)
from runs import STEPS, SmallNet, batch, same, weights
from torch import nn
from torch.nn import functional as F

import sparsetrain as st
from sparsetrain.integrations.lightning import SparsityCallback

# Lightning 2.6 by itself: under torch 2.13, and of what would be faster.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


# Automatic optimization.


@pytest.mark.parametrize("policy", ALL)
def test_automatic_optimization_is_the_loop_of_ones_own(policy: str, tmp_path: Path) -> None:
    module = Net(policy)
    trainer = trainer_of(tmp_path, SparsityCallback())
    trainer.fit(module, data())
    optimizer = sparse_of(trainer)
    assert optimizer.step_count == trainer.global_step == STEPS
    assert agree(module.net, optimizer, *by_hand(policy))


@pytest.mark.parametrize("policy", ["set", "rigl", "snfs"])
def test_in_csr_storage(policy: str, tmp_path: Path) -> None:
    module = Net(policy, storage="csr")
    trainer = trainer_of(tmp_path, SparsityCallback())
    trainer.fit(module, data())
    assert sparse_of(trainer).targets["hidden.weight"].storage == "csr"
    assert agree(module.net, sparse_of(trainer), *by_hand(policy, storage="csr"))


@pytest.mark.parametrize("policy", ["rigl", "nm_sparse", "hard_concrete"])
@pytest.mark.parametrize(
    "accumulate, clip", [(3, None), (1, 0.1), (2, 0.1)], ids=["accumulation", "clipping", "both"]
)
def test_accumulation_and_clipping(
    policy: str, accumulate: int, clip: float | None, tmp_path: Path
) -> None:
    module = Net(policy)
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    trainer = trainer_of(tmp_path, SparsityCallback(check_total_steps=False), **options)
    trainer.fit(module, data())
    twin = by_hand(policy, accumulate=accumulate, clip=clip)
    assert sparse_of(trainer).step_count == EPOCHS * -(-BATCHES // accumulate)
    assert agree(module.net, sparse_of(trainer), *twin)


class ClipsActive(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        optimizer.mask_gradients()

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        self.norm = nn.utils.get_total_norm([p.grad for p in self.parameters()])
        super().configure_gradient_clipping(*args, **kwargs)


def test_clipping_by_the_norm_of_active_gradients(tmp_path: Path) -> None:
    module = ClipsActive("static")
    trainer_of(tmp_path, max_epochs=1, limit_train_batches=1).fit(module, data())
    net, (x, y) = SmallNet(), batch(0)
    optimizer = sparse(net, "static")
    F.cross_entropy(net(x), y).backward()
    dense = nn.utils.get_total_norm([p.grad for p in net.parameters()])
    optimizer.mask_gradients()
    active = nn.utils.get_total_norm([p.grad for p in net.parameters()])
    assert module.norm == active < 0.9 * dense


@pytest.mark.parametrize("policy", ["rigl", "nm_sparse", "hard_concrete"])
def test_the_clock_leaves_out_steps_that_the_scaler_skips(policy: str, tmp_path: Path) -> None:
    def scaler() -> Any:
        return torch.amp.GradScaler("cpu", init_scale=2.0**22)

    module = Net(policy)
    plugin = MixedPrecision("16-mixed", "cpu", scaler())
    trainer = trainer_of(tmp_path, SparsityCallback(), plugins=[plugin])
    trainer.fit(module, data())
    net = SmallNet()
    optimizer, own = sparse(net, policy), scaler()
    for number in [*range(BATCHES)] * EPOCHS:
        torch.manual_seed(number)
        x, y = batch(number)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.half, cache_enabled=False):
            loss = F.cross_entropy(net(x), y)
        own.scale(loss).backward()
        own.unscale_(optimizer)
        own.step(optimizer)
        own.update()
    assert 5 < sparse_of(trainer).step_count < trainer.global_step == STEPS
    assert agree(module.net, sparse_of(trainer), net, optimizer)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(precision: Any, tmp_path: Path) -> None:
    for policy in ("rigl", "nm_sparse", "hard_concrete"):
        module = Net(policy)
        trainer = trainer_of(tmp_path, SparsityCallback(), precision=precision)
        trainer.fit(module, data())
        wanted = {"rigl": 0.8, "nm_sparse": 0.75, "hard_concrete": 0.5}[policy]
        assert sparse_of(trainer).sparsity() == pytest.approx(wanted, abs=0.02)
        assert policy in LEARNED or all_masked(sparse_of(trainer))
        sparse_of(trainer).finalize()


class Scheduled(Net):
    """With the number of steps that the Trainer says, and a rate that falls at each of them."""

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches
        base = torch.optim.SGD(self.parameters(), lr=0.1)
        optimizer = st.SparseOptimizer(base, self, st.RigL(sparsity=0.8, total_steps=steps))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        scheduler = {"scheduler": schedule, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def test_a_scheduler_and_the_trainers_number_of_steps(tmp_path: Path) -> None:
    module = Scheduled("rigl")
    trainer = trainer_of(tmp_path, SparsityCallback(), accumulate_grad_batches=2)
    trainer.fit(module, data())
    optimizer = sparse_of(trainer)
    assert optimizer.recipe.policy.total_steps == optimizer.step_count == 8
    assert set(optimizer.targets) == {"net.conv.weight", "net.hidden.weight", "net.head.weight"}
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(0)


# Manual optimization.


class Manual(Net):
    """Two optimizers, of which the first is sparse; it steps at every second batch."""

    def __init__(self, policy: str) -> None:
        super().__init__(policy)
        self.automatic_optimization = False
        self.seen: list[int] = []

    def configure_optimizers(self) -> Any:
        return two_optimizers(self.net, self.policy)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        sparse, dense = self.optimizers()
        loss = self.loss(batch)
        if batch_idx % 2 == 0:
            sparse.zero_grad()
        dense.zero_grad()
        self.manual_backward(loss)
        dense.step()
        if batch_idx % 2 == 1:
            sparse.mask_gradients()
            self.clip_gradients(sparse, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            sparse.step()
            assert isinstance(sparse, st.SparseOptimizer)
            assert sparse.masks().keys() == sparse.targets.keys()
            self.seen.append(sparse.step_count)


def two_optimizers(net: SmallNet, policy: str) -> list[Any]:
    weights = [p for name, p in net.named_parameters() if "norm" not in name]
    base = torch.optim.SGD(weights, lr=0.05, momentum=0.9)
    dense = torch.optim.SGD(net.norm.parameters(), lr=0.1)
    return [st.SparseOptimizer(base, net, ALL[policy]), dense]


@pytest.mark.parametrize("policy", ["set", "rigl", "nm_sparse", "movement"])
def test_manual_optimization_is_the_loop_of_ones_own(policy: str, tmp_path: Path) -> None:
    module = Manual(policy)
    trainer = trainer_of(tmp_path, SparsityCallback())
    trainer.fit(module, data())
    net = SmallNet()
    optimizer, dense = two_optimizers(net, policy)
    for number in [*range(BATCHES)] * EPOCHS:
        torch.manual_seed(number)
        x, y = batch(number)
        loss = F.cross_entropy(net(x), y)
        if number % 2 == 0:
            optimizer.zero_grad()
        dense.zero_grad()
        loss.backward()
        dense.step()
        if number % 2 == 1:
            optimizer.mask_gradients()
            nn.utils.clip_grad_norm_(held(optimizer), 0.1)
            optimizer.step()
    assert module.seen == [1, 2, 3, 4, 5, 6]
    assert agree(module.net, sparse_of(trainer), net, optimizer)


# The end of training, and evaluation.


@pytest.mark.parametrize("policy", ["rigl", "nm_sparse", "hard_concrete", "soft_threshold"])
def test_finalize_leaves_a_plain_module(policy: str, tmp_path: Path) -> None:
    module = Net(policy)
    trainer = trainer_of(tmp_path, SparsityCallback(finalize=True))
    trainer.fit(module, data())
    net, optimizer = by_hand(policy)
    optimizer.finalize()
    assert same(weights(module.net), weights(net))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Net.load_from_checkpoint(tmp_path / "last.ckpt", policy=policy)
    assert same(weights(loaded), weights(module))
    assert trainer.test(loaded, data(), verbose=False) == trainer.test(
        module, data(), verbose=False
    )


@pytest.mark.parametrize("policy", ["rigl", "nm_sparse", "hard_concrete"])
def test_evaluation_is_of_the_masked_model(policy: str, tmp_path: Path) -> None:
    module = Net(policy)
    trainer = trainer_of(tmp_path, SparsityCallback())
    trainer.fit(module, data())
    before = trainer.test(module, data(), verbose=False)[0]["test_loss"]
    sparse_of(trainer).finalize()
    after = trainer.test(module, data(), verbose=False)[0]["test_loss"]
    assert after == pytest.approx(before, abs=1e-6)


def test_an_interrupted_run_is_not_finalized(tmp_path: Path) -> None:
    class Fails(Net):
        def on_train_epoch_end(self) -> None:
            raise RuntimeError("power is out")

    module = Fails("hard_concrete")
    trainer = trainer_of(tmp_path, SparsityCallback(finalize=True), logger=CSVLogger(tmp_path))
    with pytest.raises(RuntimeError, match="power is out"):
        trainer.fit(module, data())
    assert "net.hidden.parametrizations.weight.original" in module.state_dict()
    assert not module._load_state_dict_pre_hooks
    assert not sparse_of(trainer)._keeper.listeners

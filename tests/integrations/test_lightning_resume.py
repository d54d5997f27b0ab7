"""A run that Lightning resumes from its checkpoint equals the uninterrupted one, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning_runs import (
    ALL,
    EPOCHS,
    LEARNED,
    Early,
    Net,
    agree,
    by_hand,
    data,
    saving,
    sparse_of,
    trainer_of,
)
from runs import POLICIES, STEPS, SmallNet, same, weights

import sparsetrain as st
from sparsetrain.integrations.lightning import SparsityCallback

# Lightning 2.6 by itself: under torch 2.13, and of what would be faster.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def run(
    module: Any, folder: Path, *callbacks: Any, start: Path | None = None, **options: Any
) -> st.SparseOptimizer:
    """Train with a checkpoint an epoch; returns the optimizer at the end."""
    trainer = saving(folder, *callbacks, **options)
    trainer.fit(module, data(), ckpt_path=start)
    assert trainer.global_step == STEPS
    return sparse_of(trainer)


@pytest.mark.parametrize("policy", ALL)
def test_resume_is_exact(policy: str, tmp_path: Path) -> None:
    whole = Net(policy)
    optimizer = run(whole, tmp_path, SparsityCallback())
    resumed = Net(policy)
    again = run(resumed, tmp_path, SparsityCallback(), start=tmp_path / "epoch=0.ckpt")
    assert agree(resumed.net, again, whole.net, optimizer)
    assert agree(resumed.net, again, *by_hand(policy))


@pytest.mark.parametrize("storage", ["csr", "auto"])
@pytest.mark.parametrize("policy", ["set", "rigl", "gradual"])
def test_resume_is_exact_with_weights_held_as_non_zeros(
    policy: str, storage: str, tmp_path: Path
) -> None:
    whole = Net(policy, storage=storage)
    optimizer = run(whole, tmp_path, SparsityCallback())
    resumed = Net(policy, storage=storage)
    again = run(resumed, tmp_path, SparsityCallback(), start=tmp_path / "epoch=0.ckpt")
    assert agree(resumed.net, again, whole.net, optimizer)
    assert [t.storage for t in again.targets.values()] == [
        t.storage for t in optimizer.targets.values()
    ]


@pytest.mark.parametrize(
    "policy", ["set", "rigl", "snfs", "nm_sparse", "soft_threshold", "hard_concrete"]
)
def test_without_the_callback_when_the_optimizer_is_built_early(
    policy: str, tmp_path: Path
) -> None:
    run(Early(policy), tmp_path)
    resumed = Early(policy)
    again = run(resumed, tmp_path, start=tmp_path / "epoch=0.ckpt")
    assert agree(resumed.net, again, *by_hand(policy))


@pytest.mark.parametrize("policy", ["rigl", "hard_concrete"])
def test_a_checkpoint_in_evaluation(policy: str, tmp_path: Path) -> None:
    """Learned masks need a module that wraps its optimizer early; masks are zeros in weights."""
    kind = Early if policy in LEARNED else Net
    module = kind(policy)
    run(module, tmp_path, SparsityCallback())
    trainer = saving(tmp_path)
    (expected,) = trainer.test(module, data(), verbose=False)
    path = tmp_path / "epoch=1.ckpt"
    assert trainer.test(kind(policy), data(), ckpt_path=path, verbose=False) == [expected]
    loaded = kind.load_from_checkpoint(path, policy=policy)
    assert trainer.test(loaded, data(), verbose=False) == [expected]


def test_a_checkpoint_with_gates_does_not_fit_a_plain_module(tmp_path: Path) -> None:
    run(Net("movement"), tmp_path, SparsityCallback())
    trainer, path = saving(tmp_path, SparsityCallback()), tmp_path / "epoch=1.ckpt"
    with pytest.raises(RuntimeError, match=r"net\.hidden\.parametrizations\.weight\.original"):
        trainer.test(Net("movement"), data(), ckpt_path=path, verbose=False)


def test_learned_masks_of_a_checkpoint_become_a_plain_model(tmp_path: Path) -> None:
    module = Net("movement")
    optimizer = run(module, tmp_path, SparsityCallback())
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    loaded = Net("movement")
    again = loaded.configure_optimizers()
    loaded.load_state_dict(saved["state_dict"])
    again.load_state_dict(saved["optimizer_states"][0])
    again.finalize()
    optimizer.finalize()
    assert same(weights(loaded), weights(module))


@pytest.mark.parametrize("policy", ["rigl", "nm_sparse", "hard_concrete"])
def test_a_finished_run_is_finalized_when_it_is_resumed(policy: str, tmp_path: Path) -> None:
    """As when a job is restarted that was over."""
    module = Net(policy)
    run(module, tmp_path, SparsityCallback(finalize=True))
    assert same(weights(module.net), finalized(policy))
    resumed = Net(policy)
    start = tmp_path / "epoch=1.ckpt"
    run(resumed, tmp_path, SparsityCallback(finalize=True), start=start)
    assert same(weights(resumed.net), finalized(policy))


def finalized(policy: str) -> dict[str, torch.Tensor]:
    net, optimizer = by_hand(policy)
    optimizer.finalize()
    return weights(net)


# What a module loads itself.


def test_weights_that_a_module_loads_itself_do_not_wait(tmp_path: Path) -> None:
    trained = {f"net.{name}": value for name, value in weights(SmallNet(5)).items()}
    del trained["net.head.weight"]

    class Pretrained(Net):
        def configure_model(self) -> None:
            self.load_state_dict(trained, strict=False)

    module = Pretrained("gradual")
    trainer_of(tmp_path, SparsityCallback()).fit(module, data())
    net = SmallNet()
    net.load_state_dict(SmallNet(5).state_dict() | {"head.weight": net.head.weight})
    assert not same(weights(module.net), weights(by_hand("gradual")[0]))
    assert same(weights(module.net), weights(by_hand("gradual", net=net)[0]))


class Copies(pl.Callback):
    """Keeps a copy of the module, as callbacks that average do, with a head from the checkpoint."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.copy = copy.deepcopy(pl_module)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        head = checkpoint["state_dict"]["net.head.weight"]
        self.copy.load_state_dict({"net.head.weight": head}, strict=False)
        self.head = head


def test_copies_of_a_module_do_not_wait(tmp_path: Path) -> None:
    run(Net("rigl"), tmp_path, SparsityCallback())
    copies = Copies()
    run(Net("rigl"), tmp_path, SparsityCallback(), copies, start=tmp_path / "epoch=0.ckpt")
    assert torch.equal(copies.copy.net.head.weight, copies.head)


class Partial(Net):
    """Leaves its norm out of checkpoints, as modules do with frozen parts."""

    def __init__(self, policy: str) -> None:
        super().__init__(policy)
        self.strict_loading = False

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if "norm" not in name}

    def on_train_start(self) -> None:
        self.began = weights(self)


@pytest.mark.parametrize("policy", ["rigl", "movement"])
def test_checkpoints_that_leave_parts_out(policy: str, tmp_path: Path) -> None:
    run(Partial(policy), tmp_path, SparsityCallback())
    start = tmp_path / "epoch=0.ckpt"
    resumed = Partial(policy)
    run(resumed, tmp_path, SparsityCallback(), start=start)
    assert same(resumed.began, torch.load(start, weights_only=True)["state_dict"])


# Checkpoints of something else.


def test_a_checkpoint_of_a_dense_run_is_refused(tmp_path: Path) -> None:
    class Dense(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    trainer = trainer_of(tmp_path)
    trainer.fit(Dense("rigl"), data())
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(ValueError, match="this checkpoint has no masks"):
        run(Net("rigl"), tmp_path, SparsityCallback(), start=tmp_path / "dense.ckpt")


@pytest.mark.parametrize("policy", ["rigl", "movement"])
def test_a_checkpoint_of_another_network_is_refused(policy: str, tmp_path: Path) -> None:
    run(Net(policy), tmp_path, SparsityCallback())
    other = Net(policy)
    other.net.extra = torch.nn.Linear(2, 2)
    with pytest.raises((RuntimeError, ValueError), match=r"extra\.weight"):
        run(other, tmp_path, SparsityCallback(), start=tmp_path / "epoch=0.ckpt")
    assert not other._load_state_dict_pre_hooks


def test_a_longer_run_is_refused(tmp_path: Path) -> None:
    run(Net("rigl"), tmp_path, SparsityCallback())

    class Longer(Net):
        def configure_optimizers(self) -> Any:
            policy = POLICIES["rigl"].model_copy(update={"total_steps": STEPS + 7})
            base = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
            return st.SparseOptimizer(base, self.net, policy)

    with pytest.raises(ValueError, match=r"another policy: .*total_steps is 14 there and 21 here"):
        options = {"start": tmp_path / "epoch=0.ckpt", "max_epochs": EPOCHS + 1}
        run(Longer("rigl"), tmp_path, SparsityCallback(), **options)

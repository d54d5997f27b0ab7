"""Averages of weights under masks that differ, as Lightning's callbacks make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning_runs import Net, all_masked, by_hand, data, saving, sparse_of, trainer_of
from runs import same, weights

from sparsetrain.integrations.lightning import SparsityCallback

weight_averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
WeightAveraging = weight_averaging.WeightAveraging

# Lightning 2.6 by itself: under torch 2.13, and of what would be faster.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Averages(WeightAveraging):
    """Remembers the average before it is masked."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        self.average = weights(pl_module.net)


@pytest.mark.parametrize("finalize", [False, True], ids=["masked", "finalized"])
@pytest.mark.parametrize("policy", ["rigl", "nm_sparse"])
def test_averages_end_under_the_last_mask(policy: str, finalize: bool, tmp_path: Path) -> None:
    module, averaging = Net(policy), Averages()
    trainer = trainer_of(tmp_path, averaging, SparsityCallback(finalize=finalize))
    trainer.fit(module, data())
    masks = sparse_of(trainer).masks()
    assert same(masks, by_hand(policy)[1].masks())  # training does not see the averages
    for name, mask in masks.items():
        average = averaging.average[name]
        assert (average[~mask] != 0).any()
        assert torch.equal(module.net.get_parameter(name), torch.where(mask, average, 0.0))


def test_stochastic_weight_averaging(tmp_path: Path) -> None:
    module = Net("set")
    callbacks = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), SparsityCallback()
    trainer = trainer_of(tmp_path, *callbacks)
    trainer.fit(module, data())
    assert all_masked(sparse_of(trainer))


@pytest.mark.parametrize("averaging", [WeightAveraging, StochasticWeightAveraging])
def test_averages_that_would_be_wrong_are_refused(averaging: Any, tmp_path: Path) -> None:
    def made() -> Any:
        return averaging(swa_lrs=0.1) if averaging is StochasticWeightAveraging else averaging()

    with pytest.raises(
        ValueError, match=rf"list SparsityCallback after it, .*{averaging.__name__}"
    ):
        trainer_of(tmp_path, SparsityCallback(), made()).fit(Net("rigl"), data())
    modules = Net("movement"), Net("rigl", storage="csr"), Net("rigl", storage="auto")
    for module, storage in zip(modules, ("learned", "csr", "auto"), strict=True):
        with pytest.raises(ValueError, match=rf"and weights are held as {storage} here"):
            trainer_of(tmp_path, made(), SparsityCallback()).fit(module, data())


@pytest.mark.parametrize("policy", ["rigl", "nm_sparse"])
def test_averages_are_resumed(policy: str, tmp_path: Path) -> None:
    whole, resumed = Net(policy), Net(policy)
    for module, start in ((whole, None), (resumed, tmp_path / "epoch=0.ckpt")):
        trainer = saving(tmp_path, WeightAveraging(), SparsityCallback())
        trainer.fit(module, data(), ckpt_path=start)
    assert same(weights(resumed.net), weights(whole.net))

"""Latent storage: dense weights wait behind the masked ones."""

from __future__ import annotations

import torch
from torch import nn

from sparsetrain.storage.latent import LatentTarget


def target_of(values: list[float], mask: list[int]) -> LatentTarget:
    target = LatentTarget("weight", nn.Parameter(torch.tensor([values])))
    target.begin(torch.tensor([mask]).bool())
    return target


def test_exchanged_weights_go_to_their_latent_value_and_come_back_with_it() -> None:
    target = target_of([4.0, 3.0, 2.0, 1.0], [1, 1, 0, 0])
    gone, new, *_ = target.exchange(torch.tensor([1]), torch.tensor([3]))
    assert (gone.tolist(), new.tolist()) == ([1], [3])
    assert target.param.tolist() == [[4.0, 0.0, 0.0, 1.0]]
    assert target.latent_weight().tolist() == [[4.0, 3.0, 2.0, 1.0]]
    target.exchange(torch.tensor([3]), torch.tensor([1]))
    assert target.param.tolist() == [[4.0, 3.0, 0.0, 0.0]]


def test_the_base_optimizer_steps_on_the_dense_weights() -> None:
    target = target_of([4.0, 3.0, 2.0, 1.0], [1, 0, 1, 0])
    target.before_step()
    assert target.param.tolist() == [[4.0, 3.0, 2.0, 1.0]]
    target.param.data.sub_(1.0)
    target.after_step(keeps_zeros=False)
    assert target.param.tolist() == [[3.0, 0.0, 1.0, 0.0]]
    assert target.latent_weight().tolist() == [[3.0, 2.0, 1.0, 0.0]]


def test_release_keeps_the_masked_weights_only() -> None:
    target = target_of([4.0, 3.0], [1, 0])
    target.release()
    assert target.param.tolist() == [[4.0, 0.0]]

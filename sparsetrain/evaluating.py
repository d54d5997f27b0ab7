"""A model as it is measured, and as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import Parameter


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module's mode comes back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def ordinary_attention() -> Iterator[None]:
    """Attention goes torch's ordinary way, as in training.

    Its shortcut of evaluation mode packs padded tokens into nested tensors, which hooks cannot read
    and which give other outputs.
    """
    has_shortcut = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(has_shortcut)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, ordinary attention, gradients enabled; all is as before at the end.

    Raises:
        ValueError: a layer mixes the samples of a batch even in evaluation mode.
    """
    _check(model)
    with evaluation_mode(model), ordinary_attention(), torch.enable_grad():
        yield


@contextmanager
def wanting(model: nn.Module, parameters: Iterable[Parameter]) -> Iterator[None]:
    """These parameters of the model want gradients, no other does; all are as before at the end."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wanted = {id(parameter) for parameter in parameters}
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, was in before:
            parameter.requires_grad_(was)


def _check(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"{name} normalises by the statistics of the batch even in evaluation mode, so "
                "that no sample has a gradient of its own: give it track_running_stats=True, or "
                "use GroupNorm"
            )

"""What is compared: what pruned networks learn from, how fast, and what was taken from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st

LENET, CNN = "lenet_300_100", "cnn"
#: Hidden layers of each network, after their nonlinearity.
HIDDEN = {LENET: ("relu1", "relu2"), CNN: ("relu1", "relu2", "relu3")}


@dataclass(frozen=True)
class Method:
    """What a pruned network learns from; `attention` is for networks with positions."""

    label: str
    weight: float | None = 0.9  # of the teacher's logits; None for labels alone
    hidden: bool = False
    attention: bool = False

    def loss(
        self, network: str, student: nn.Module, teacher: nn.Module, example: Tensor
    ) -> st.Distillation | None:
        """The loss, or None for labels alone."""
        if self.weight is None:
            return None
        layers = HIDDEN[network]
        return st.distill(
            student,
            teacher,
            loss_fn=F.cross_entropy,
            weight=self.weight,
            hidden=layers if self.hidden else None,
            attention=layers if self.attention else None,
            attention_weight=10.0,
            example_inputs=example,
        )


METHODS = {
    "plain": Method("Labels alone", weight=None),
    "logits": Method("Labels and logits"),
    "logits_only": Method("Logits alone", weight=1.0),
    "hidden": Method("Labels, logits and hidden states", hidden=True),
    "attention": Method("Labels, logits and attention maps", attention=True),
}

#: Rates after pruning; the first is that of the comparison of methods.
RULES = {
    "tenth_cosine": ("0.1 x, cosine", st.Finetune(factor=0.1, shape="cosine")),
    "tenth": ("0.1 x, constant", st.Finetune(factor=0.1)),
    "hundredth": ("0.01 x, constant", st.Finetune(factor=0.01)),
    "rewind": ("rewound", st.Finetune(rule="rewind")),
}
RULE = next(iter(RULES))


@dataclass(frozen=True)
class Cut:
    """What a trained network loses."""

    label: str
    sparsity: float | None = None  # share of weights that become 0, by magnitude over all layers
    channels: float | None = None  # share of each layer's channels that are taken out, by L1 norm

    def make(self, dense: nn.Module, example: Tensor) -> tuple[nn.Module, st.PruneResult | None]:
        """The network that is left, and its masks if it has any; `dense` may be changed."""
        if self.channels is not None:
            result = st.channels.prune(
                dense, example, "l1", self.channels, measure_latency=False, in_place=True
            )
            return result.model, None
        pruned = st.prune(dense, "magnitude", self.sparsity, scope="global")
        return dense, pruned


CUTS = {
    "95": Cut("95 % zeros", sparsity=0.95),
    "98": Cut("98 % zeros", sparsity=0.98),
    "channels": Cut("70 % of channels", channels=0.7),
}


def shown(network: str) -> Sequence[str]:
    """The methods that a network is trained with."""
    return [name for name in METHODS if network == CNN or not METHODS[name].attention]


def cuts_of(network: str) -> Sequence[str]:
    """What a network loses: LeNet-300-100 weights alone."""
    return [name for name, cut in CUTS.items() if network == CNN or cut.channels is None]


def batches(samples: int, size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """The order of an epoch, the same for every method."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(samples, generator=generator).split(size)

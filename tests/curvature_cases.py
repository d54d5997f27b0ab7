"""Small networks in float64 with everything that per-sample gradients have to cope with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """A model, inputs and labels; which parameters have no short way."""

    model: nn.Module
    x: Tensor
    y: Tensor
    slow: tuple[str, ...] = ()

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Two batches of different sizes."""
        return [(self.x[:4], self.y[:4]), (self.x[4:], self.y[4:])]


class Residual(nn.Module):
    """Convolutions with groups, strides, dilation and every padding; norms; a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, (3, 2), padding="same", groups=4, dilation=2)
        self.groups = nn.GroupNorm(2, 8)
        self.strided = nn.Conv2d(8, 4, 2, stride=(2, 1), padding=1, padding_mode="reflect")
        self.point = nn.Conv2d(4, 4, 1, bias=False)
        self.head = nn.Linear(4 * 4 * 7, 5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm(self.first(x)))
        x = x + self.groups(self.grouped(x))
        return self.head(self.point(F.gelu(self.strided(x))).flatten(1))


class Tokens(nn.Module):
    """Embedding, attention and norms over [samples, tokens]; `tied` shares the embedding."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embed(tokens)))).transpose(1, 2)


class Twice(nn.Module):
    """One layer called twice, and an embedding that a function uses as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.layer(self.embed(tokens)))
        x = torch.tanh(self.layer(x))
        return F.linear(x, self.embed.weight).transpose(1, 2)


class TimeFirst(nn.Module):
    """A layer whose samples are along dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(x.transpose(0, 1))).mean(0))


class Unused(nn.Module):
    """A layer that is never called, and one parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) * self.scale


def _flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def case(name: str) -> Case:
    """A fresh case, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x, classes, slow = _MADE[name]()
        y = torch.randint(classes, (len(x), *x.shape[1:]) if x.dtype == torch.int64 else (len(x),))
    x = x.double() if x.is_floating_point() else x
    return Case(model.double(), x, y, slow)


def _tokens() -> Tensor:
    return torch.randint(11, (7, 6))


def _masked() -> nn.Module:
    """A layer behind a parametrization."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def _hooked() -> nn.Module:
    """A hook changes what a layer gives."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    return model


_BEHIND = tuple(f"0.parametrizations.weight.original{i}" for i in (0, 1))
_MADE: dict[str, Callable[[], tuple[nn.Module, Tensor, int, tuple[str, ...]]]] = {
    "mlp": lambda: (
        _flat(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 4)),
        torch.randn(7, 6),
        4,
        (),
    ),
    "residual": lambda: (Residual(), torch.randn(7, 3, 6, 6), 5, ()),
    "tokens": lambda: (Tokens(False), _tokens(), 11, ()),
    "tied": lambda: (Tokens(True), _tokens(), 11, ()),
    "twice": lambda: (Twice(), _tokens(), 11, ("embed.weight",)),
    "time_first": lambda: (TimeFirst(), torch.randn(7, 5, 6), 3, ("inner.weight", "inner.bias")),
    "conv1d": lambda: (
        _flat(nn.Conv1d(3, 6, 3, stride=2, groups=3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)),
        torch.randn(7, 3, 8),
        3,
        (),
    ),
    "conv3d": lambda: (
        _flat(nn.Conv3d(2, 4, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)),
        torch.randn(7, 2, 3, 3, 3),
        3,
        (),
    ),
    "unused": lambda: (Unused(), torch.randn(7, 6), 3, ("scale",)),
    "parametrized": lambda: (_masked(), torch.randn(7, 6), 3, _BEHIND),
    "hooked": lambda: (_hooked(), torch.randn(7, 6), 3, ("0.weight", "0.bias")),
    "relu": lambda: (
        _flat(
            nn.Conv2d(1, 3, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(12, 8),
            nn.ReLU(),
            nn.Linear(8, 4),
        ),
        torch.randn(7, 1, 6, 6),
        4,
        (),
    ),
    "tanh": lambda: (
        _flat(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)),
        torch.randn(7, 6),
        4,
        (),
    ),
}
CASES = tuple(_MADE)


def slow_fisher(case: Case, loss: Loss) -> dict[str, Tensor]:
    """Mean of squared gradients, by autograd for one sample after the other."""
    model = case.model.eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(len(case.x)):
        model.zero_grad()
        loss(model(case.x[i : i + 1]), case.y[i : i + 1]).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] += p.grad**2
    model.zero_grad()
    return {name: value / len(case.x) for name, value in total.items()}


def slow_hessian(case: Case, loss: Loss) -> dict[str, Tensor]:
    """The diagonal of the whole Hessian of each parameter."""
    model = case.model.eval()
    values = {name: p.detach() for name, p in model.named_parameters()}
    found = {}
    for name, value in values.items():

        def mean_loss(w: Tensor, name: str = name) -> Tensor:
            outputs = functional_call(model, {**values, name: w}, (case.x,))
            pairs = zip(outputs.split(1), case.y.split(1), strict=True)
            return torch.stack([loss(o, t) for o, t in pairs]).mean()

        with sdpa_kernel(SDPBackend.MATH):  # the fast kernels have no second derivative
            whole = jacrev(grad(mean_loss))(value)
        whole = whole.reshape(value.numel(), value.numel())
        found[name] = whole.diagonal().reshape(value.shape)
    return found


def largest_error(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest relative error over the parameters; those that are 0 have to be 0."""
    assert found.keys() == right.keys()
    errors = []
    for name, value in right.items():
        error = float((found[name] - value).norm())
        errors.append(error / float(value.norm()) if value.any() else error)
    return max(errors)

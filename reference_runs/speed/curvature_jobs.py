"""What `curvature.py` times: networks, their passes, the peers, and pruning as it was published."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.curvature import fisher_diagonal, ggn_diagonal

BACKPACK, OPACUS = "BackPACK", "Opacus"
LOSS = nn.CrossEntropyLoss()
CLASSES, WIDTH, LENGTH = 10, 128, 64
Job = Callable[[], Any]
Diagonal = dict[str, Tensor]


# Networks.


class Block(nn.Module):
    """A layer of a transformer whose attention is made of Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.inputs, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.inputs(self.norms[0](x)).unflatten(-1, (3, 4, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        down: Tensor = self.down(torch.relu(self.up(self.norms[1](x))))
        return x + down


def torch_block() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)


class ClassesFirst(nn.Module):
    """[samples, classes, tokens], as the loss wants it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def transformer(block: Callable[[], nn.Module]) -> nn.Module:
    blocks = [block() for _ in range(4)]
    last = (nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES), ClassesFirst())
    return nn.Sequential(nn.Embedding(256, WIDTH), *blocks, *last)


def mlp() -> nn.Module:
    hidden = (nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU())
    return nn.Sequential(*hidden, nn.Linear(1024, CLASSES))


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 8 * 8, CLASSES))


class Network(NamedTuple):
    label: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of the inputs, batch first
    goal: float | None  # of the Fisher diagonal, in forward and backward passes
    peers: tuple[str, ...]


NETWORKS = {
    "mlp": Network("MLP 784-1024-1024-10", mlp, (256, 784), 1.3, (BACKPACK, OPACUS)),
    "cnn": Network("CNN, 4 convolutions", cnn, (128, 3, 32, 32), 1.15, (BACKPACK, OPACUS)),
    "transformer": Network(
        "transformer, 4 layers", lambda: transformer(Block), (32, LENGTH), 1.3, (OPACUS,)
    ),
    "torch transformer": Network(
        "the same, torch's layers", lambda: transformer(torch_block), (32, LENGTH), None, ()
    ),
}


def made(network: Network) -> tuple[nn.Module, Tensor, Tensor]:
    """Model, inputs and labels, always the same."""
    torch.manual_seed(0)
    model, has_tokens = network.model(), network.shape[1:] == (LENGTH,)
    x = torch.randint(256, network.shape) if has_tokens else torch.randn(network.shape)
    return model, x, torch.randint(CLASSES, network.shape if has_tokens else network.shape[:1])


# Passes, and diagonals of the peers, each on a model of its own.


def forward_and_backward(model: nn.Module, x: Tensor, y: Tensor, batches: int = 1) -> Job:
    def job() -> None:
        model.zero_grad()
        for _ in range(batches):
            LOSS(model(x), y).backward()

    return job


def backward(model: nn.Module, x: Tensor, y: Tensor) -> Job:
    loss, parameters = LOSS(model(x), y), list(model.parameters())
    return lambda: torch.autograd.grad(loss, parameters, retain_graph=True)


def fisher(model: nn.Module, x: Tensor, y: Tensor, method: Any = "auto", batches: int = 1) -> Job:
    return lambda: fisher_diagonal(model, [(x, y)] * batches, LOSS, method=method)


def ggn(model: nn.Module, x: Tensor, y: Tensor, estimate: Any) -> Job:
    return lambda: ggn_diagonal(model, [(x, y)], LOSS, estimate=estimate)


def backpack(what: str, model: nn.Module, x: Tensor, y: Tensor) -> Job | None:
    """A diagonal by an extension of BackPACK; None where it is not installed."""
    try:
        from backpack import backpack as asking_for
        from backpack import extend, extensions
    except ImportError:
        return None
    own, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())
    extension = getattr(extensions, what)()
    factor = len(x) if what == "SumGradSquared" else 1  # its gradients are of the mean loss

    def job() -> Diagonal:
        own.zero_grad()
        with asking_for(extension):
            loss(own(x), y).backward()
        return {n: getattr(p, extension.savefield) * factor for n, p in own.named_parameters()}

    return job


def opacus(model: nn.Module, x: Tensor, y: Tensor) -> Job | None:
    """Squares of Opacus's per-sample gradients; None where it is not installed."""
    try:
        from opacus import GradSampleModule
    except ImportError:
        return None
    own = GradSampleModule(copy.deepcopy(model))

    def job() -> Diagonal:
        own.zero_grad()
        LOSS(own(x), y).backward()
        named = {name.removeprefix("_module."): p for name, p in own.named_parameters()}
        return {name: p.grad_sample.square().mean(0) for name, p in named.items()}

    return job


def check_same(ours: Job, theirs: Mapping[str, Job | None]) -> None:
    """Stop when a peer computes something else."""
    right = ours()
    for peer, job in theirs.items():
        for name, value in job().items() if job else ():
            if float((right[name] - value).norm()) > 1e-3 * float(value.norm()):
                raise SystemExit(f"{peer} and sparsetrain differ in {name}")


# Pruning of one matrix, as the authors' code does it.


def published_surgery(weight: Tensor, hessian: Tensor, sparsity: float, block: int = 128) -> Tensor:
    """SparseGPT: `fasterprune` of github.com/IST-DASLab/sparsegpt, in its order of operations."""
    weight, damped = weight.clone(), hessian.clone()
    damped.diagonal().add_(0.01 * float(hessian.diagonal().mean()))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    root = torch.linalg.cholesky(inverse, upper=True)
    columns = weight.shape[1]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, triangle = weight[:, start:stop].clone(), root[start:stop, start:stop]
        pruned, errors = torch.zeros_like(part), torch.zeros_like(part)
        scores = part**2 / triangle.diagonal() ** 2
        bar = scores.flatten().sort().values[int(scores.numel() * sparsity)]
        gone = scores <= bar
        for i in range(stop - start):
            kept = part[:, i].clone()
            kept[gone[:, i]] = 0
            error = (part[:, i] - kept) / triangle[i, i]
            part[:, i:] -= error.unsqueeze(1).matmul(triangle[i, i:].unsqueeze(0))
            pruned[:, i], errors[:, i] = kept, error
        weight[:, start:stop] = pruned
        weight[:, stop:] -= errors.matmul(root[start:stop, stop:])
    return weight


def published_rows(scores: Tensor, sparsity: float) -> Tensor:
    """Wanda: the mask of the weights to keep, by sorting each row."""
    order = torch.sort(scores, dim=-1, stable=True).indices
    mask = torch.ones_like(scores, dtype=torch.bool)
    return mask.scatter_(1, order[:, : int(scores.shape[1] * sparsity)], False)

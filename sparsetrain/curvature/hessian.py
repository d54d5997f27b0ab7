"""The diagonal of the Hessian itself, exactly for small models, by random vectors for others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsetrain.batches import Adapter, read
from sparsetrain.candidates import unwrapped
from sparsetrain.curvature.diagonals import Diagonal, chosen_parameters
from sparsetrain.curvature.losses import LossFunction, sample_losses
from sparsetrain.evaluating import evaluating, wanting

Estimate = Literal["exact", "hutchinson"]


def hessian_diagonal(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    estimate: Estimate = "exact",
    probes: int = 10,
    parameters: Iterable[str] | None = None,
    adapter: Adapter | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Diagonal:
    """The diagonal of the Hessian of the mean loss over samples.

    Unlike Fisher and GGN it can be negative. The model is in evaluation mode meanwhile; `.grad` and
    everything else stay as they are.

    Args:
        batches: an iterable of (inputs, targets), or of what `adapter` makes that of.
        loss_fn: (outputs, targets) -> scalar; it is called for one sample at a time.
        estimate: "exact" takes a Hessian-vector product for each weight, so it is for small
            models and for checks; "hutchinson" takes one for each probe: z * (H z) for random
            signs z, right on average (Bekas et al. 2007, "An estimator for the diagonal of a
            matrix").
        probes: of "hutchinson".
        parameters: names; all that train when None.
        seed: of the signs.
        progress: whether to show a bar.

    Returns:
        Parameter name -> tensor of the parameter's shape.

    Raises:
        ValueError: no batch, unknown names, a loss that is no finite scalar.
    """
    if probes < 1:
        raise ValueError(f"probes={probes} must be 1 or more")
    generator = torch.Generator().manual_seed(seed)
    model = unwrapped(model)
    chosen = chosen_parameters(model, parameters)
    sums = {name: torch.zeros_like(p) for name, p in chosen.items()}
    samples = 0
    # Attention's fast kernels have no second derivative.
    with evaluating(model), wanting(model, chosen.values()), sdpa_kernel(SDPBackend.MATH):
        for batch in read(
            batches, model, who="hessian_diagonal", adapter=adapter, progress=progress
        ):
            samples += batch.size
            outputs = batch.forward(model)
            total = sample_losses(loss_fn, outputs, batch.targets, batch.size).sum()
            product = _products(total, list(chosen.values()))
            if estimate == "exact":
                found = _by_units(product, chosen)
            else:
                found = _by_signs(product, chosen, probes, generator)
            for name, diagonal in found:
                sums[name] += diagonal
    name = "Hessian" if estimate == "exact" else f"Hessian, Hutchinson with {probes} probes"
    return Diagonal({key: value / samples for key, value in sums.items()}, name, samples)


Product = Callable[[list[Tensor]], list[Tensor]]


def _products(total: Tensor, parameters: list[Parameter]) -> Product:
    """Vectors -> the Hessian of `total` times them."""
    gradients = torch.autograd.grad(total, parameters, create_graph=True, allow_unused=True)
    pairs = [(i, gradient) for i, gradient in enumerate(gradients) if gradient is not None]

    def product(vectors: list[Tensor]) -> list[Tensor]:
        curved = [(i, gradient) for i, gradient in pairs if gradient.requires_grad]
        if not curved:
            return [torch.zeros_like(p) for p in parameters]
        found = torch.autograd.grad(
            [gradient for _, gradient in curved],
            parameters,
            [vectors[i] for i, _ in curved],
            retain_graph=True,
            allow_unused=True,
        )
        return [
            torch.zeros_like(p) if value is None else value
            for p, value in zip(parameters, found, strict=True)
        ]

    return product


def _by_units(product: Product, chosen: dict[str, Parameter]) -> Iterator[tuple[str, Tensor]]:
    zeros = [torch.zeros_like(p) for p in chosen.values()]
    for number, (name, parameter) in enumerate(chosen.items()):
        diagonal = torch.zeros_like(parameter).view(-1)
        unit = zeros[number].view(-1)
        for i in range(parameter.numel()):
            unit[i] = 1.0
            diagonal[i] = product(zeros)[number].reshape(-1)[i]
            unit[i] = 0.0
        yield name, diagonal.view_as(parameter)


def _by_signs(
    product: Product, chosen: dict[str, Parameter], probes: int, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    for _ in range(probes):
        signs = [
            torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1 for p in chosen.values()
        ]
        for name, sign, value in zip(chosen, signs, product(signs), strict=True):
            yield name, sign * value / probes

"""What scores and pruning look at beside the weights: batches, a loss, and how to read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.batches import Adapter, Batch, read
from sparsetrain.candidates import Candidate
from sparsetrain.curvature.losses import LossFunction, sample_losses
from sparsetrain.distributed.averaging import Ranks, gradients_aside, taken_gradients
from sparsetrain.evaluating import evaluating, wanting

#: (candidate, input of its layer, output) of a call.
See = Callable[[Candidate, Tensor, Tensor], None]


@dataclass(frozen=True)
class Calibration:
    """Data for scores.

    Attributes:
        batches: an iterable of (inputs, targets), or of what `adapter` makes that of.
        loss_fn: (outputs, targets) -> scalar.
        seed: of whatever is random.
        progress: whether to show a bar.
        ranks: processes that have batches of their own.
    """

    batches: Iterable[Any] | None = None
    loss_fn: LossFunction | None = None
    adapter: Adapter | None = None
    seed: int = 0
    progress: bool = False
    ranks: Ranks = field(default_factory=Ranks)

    def require(self, who: str, *, loss: bool = True) -> None:
        """Raise ValueError unless there is what `who` needs."""
        if self.batches is None:
            raise ValueError(f"{who} needs data: give batches of (inputs, targets)")
        if loss and self.loss_fn is None:
            raise ValueError(f"{who} needs a loss: give loss_fn(outputs, targets)")

    def given(self, who: str) -> tuple[Iterable[Any], LossFunction]:
        """Batches and loss, which both have to be there."""
        self.require(who)
        assert self.batches is not None and self.loss_fn is not None
        return self.batches, self.loss_fn

    def require_rereadable(self, who: str) -> None:
        """Raise ValueError for an iterator, which is used up when it was read once."""
        if self.batches is not None and iter(self.batches) is self.batches:
            raise ValueError(f"{who} reads the batches several times: give a list or a DataLoader")

    def read(
        self, model: nn.Module, who: str, *, needs_targets: bool = True, in_step: bool = False
    ) -> Iterator[Batch]:
        """This rank's batches, on the model's device.

        Args:
            in_step: whether each is a batch of all ranks together, so that all need as many.
        """
        self.require(who, loss=needs_targets)
        assert self.batches is not None
        batches = read(
            self.batches,
            model,
            who=who,
            adapter=self.adapter,
            needs_targets=needs_targets,
            progress=self.progress,
        )
        if self.ranks.groups and (in_step or self.ranks.is_sharded):
            batches = self.ranks.in_step(batches, who)
        yield from batches

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the functions in `sparsetrain.curvature`."""
        return {"adapter": self.adapter, "progress": self.progress}

    def gradients(
        self, model: nn.Module, candidates: Sequence[Candidate], who: str
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """For each batch its size and the sums over samples of their gradients.

        The first batch is that of all ranks together, and so on. The model is in evaluation mode
        meanwhile and `.grad` stays as it is.

        Raises:
            ValueError: a weight has no gradient in any batch; the message names it.
        """
        for size, gradients in self._gradients_here(model, candidates, who, in_step=True):
            (samples,) = self.ranks.totals(size)
            yield samples, {n: self.ranks.sum_of_gradients(g) for n, g in gradients.items()}

    def _gradients_here(
        self, model: nn.Module, candidates: Sequence[Candidate], who: str, *, in_step: bool
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """As `gradients`, of the samples of this rank; of sharded weights means over ranks."""
        reached: set[str] = set()
        names = [candidate.name for candidate in candidates]
        params = [candidate.param for candidate in candidates]
        is_sharded = self.ranks.is_sharded
        every = list(model.parameters())
        aside = gradients_aside(every) if is_sharded else nullcontext()
        with evaluating(model), wanting(model, params), aside:
            for batch in self.read(model, who, in_step=in_step):
                total = self.total_loss(model, batch, who)
                if is_sharded:  # gradients go over ranks in backward() alone
                    total.backward()  # type: ignore[no-untyped-call]
                    found: Sequence[Tensor | None] = taken_gradients(params)
                else:
                    found = torch.autograd.grad(total, params, allow_unused=True)
                gradients = {}
                for name, param, gradient in zip(names, params, found, strict=True):
                    if gradient is not None:
                        reached.add(name)
                    gradients[name] = torch.zeros_like(param) if gradient is None else gradient
                yield batch.size, gradients
        require_reached(names, self.ranks.seen_by(names, reached, every=False), who)

    def total_loss(self, model: nn.Module, batch: Batch, who: str) -> Tensor:
        """The sum over samples of each one's own loss."""
        outputs = batch.forward(model)
        return sample_losses(self.given(who)[1], outputs, batch.targets, batch.size).sum()

    def mean_gradients(
        self, model: nn.Module, candidates: Sequence[Candidate], who: str
    ) -> dict[str, Tensor]:
        """Name -> mean over all samples of the gradients of their losses."""
        samples, sums = 0, {c.name: torch.zeros_like(c.param) for c in candidates}
        for size, gradients in self._gradients_here(model, candidates, who, in_step=False):
            samples += size
            for name, gradient in gradients.items():
                sums[name] += gradient
        (samples,) = self.ranks.totals(samples)
        return {n: self.ranks.sum_of_gradients(total) / samples for n, total in sums.items()}

    def watch(self, model: nn.Module, candidates: Sequence[Candidate], who: str, see: See) -> int:
        """Run all batches forward and show what goes in and out of each candidate's layer.

        Each rank looks at its own batches: what is seen has to be added up.

        Returns:
            The number of samples of all ranks.

        Raises:
            ValueError: a layer is never called, on some rank; the message names it.
        """
        called: set[str] = set()
        samples = 0

        def look(candidate: Candidate, given: Tensor, output: Tensor) -> None:
            called.add(candidate.name)
            see(candidate, given.detach(), output.detach())

        with watched(candidates, who, look), evaluating(model), torch.no_grad():
            for batch in self.read(model, who, needs_targets=False):
                batch.forward(model)
                samples += batch.size
        names = [candidate.name for candidate in candidates]
        require_reached(names, self.ranks.seen_by(names, called, every=True), who)
        return self.ranks.totals(samples)[0]


@contextmanager
def watched(candidates: Sequence[Candidate], who: str, see: See) -> Iterator[None]:
    """Show every call of the candidates' layers, as autograd sees it.

    Raises:
        ValueError: a layer is not called by itself, so that hooks on it are not.
    """
    handles = []
    try:
        for candidate in candidates:
            candidate.require_forward(who)
            for owner in candidate.owners:
                hook = partial(_show, see, candidate)
                handles.append(owner.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _show(see: See, candidate: Candidate, module: nn.Module, args: Any, output: Tensor) -> None:
    see(candidate, args[0], output)


def require_reached(names: Iterable[str], reached: set[str], who: str) -> None:
    """Raise ValueError for weights that the data did not reach."""
    missing = [name for name in names if name not in reached]
    if missing:
        raise ValueError(
            f"{who} saw nothing of {', '.join(missing[:5])}: the model does not use "
            "it for these batches; leave it out with match"
        )


def in_float(values: Tensor) -> Tensor:
    """Half precisions as float32, for sums."""
    return values.to(torch.promote_types(values.dtype, torch.float32))

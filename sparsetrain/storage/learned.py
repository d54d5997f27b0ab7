"""A dense weight behind a parametrization that learns its mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from sparsetrain.distributed.sharded_modules import Move, remove_parametrization
from sparsetrain.learned import LearnedMask
from sparsetrain.learned.base import gate_dtype
from sparsetrain.learned.shards import GateShards
from sparsetrain.part import Part, part_of
from sparsetrain.storage.bits import pack_rows, unpack_rows
from sparsetrain.targets import SparseTarget

#: A module and the name that it has for the weight.
Place = tuple[nn.Module, str]


class LearnedTarget(SparseTarget):
    """A weight whose mask is a function of parameters that train with it.

    The weight is dense in memory and so is its training. `mask` is the one of evaluation. Of a
    sharded weight, masks, gates and penalties are those of what is held here, and counts are of the
    whole weight.

    Attributes:
        learned: the parametrization.
        places: every module that has the weight (several when it is tied).
    """

    storage = "learned"

    def __init__(
        self, name: str, param: Parameter, places: list[Place], learned: LearnedMask
    ) -> None:
        super().__init__(name, param)
        self.places = places
        self.learned = learned
        self._hooks: list[RemovableHandle] = []
        self._orders: list[tuple[nn.Module, list[str]]] = []
        self._told: Tensor | None = None
        self._final: Tensor | None = None

    @property
    def active(self) -> int:
        """Number of weights that evaluation keeps; counted at each call, over all ranks."""
        return self.part.totals(int(self.held_mask.count_nonzero()))[0]

    @property
    def mask(self) -> Tensor:
        """Bool tensor of the weight's shape, True where evaluation keeps the weight."""
        return self.part.wrap(self.held_mask)

    @property
    def held_mask(self) -> Tensor:
        """The mask of the weights that are held here."""
        return self._mask() if self._final is None else self._final

    @torch.no_grad()
    def _mask(self) -> Tensor:
        return self._of_rows().mask(self.exact_weight())

    @property
    def resting(self) -> int:
        """0: gates of dropped weights train on, and training computes with dense tensors."""
        return 0

    # What is held here.

    def weight(self) -> Tensor:
        """What is held here of the weight, without its history; shares memory."""
        return self.part.held(self.param)

    def exact_weight(self) -> Tensor:
        """The same in the precision of its gates, in which the layer computes with it."""
        weight = self.weight()
        return weight.to(gate_dtype(weight))

    def _shards(self) -> GateShards:
        return GateShards(self.name, self.learned, self.part)

    def _of_rows(self) -> LearnedMask:
        return self.learned if self.part.is_whole else self._shards().of_rows()

    def _sharded(self) -> LearnedMask:
        return self.learned if self.part.is_whole else self._shards().sharded()

    def gates(self) -> list[tuple[Parameter, Part]]:
        """The gates, and the part of each that is here."""
        found = self.learned.named_parameters(recurse=False)
        return [(gate, part_of(f"{self.name} ({key})", gate)) for key, gate in found]

    def penalty(self) -> Tensor:
        """What the method adds to the loss, for a strength of 1; a scalar, over all ranks."""
        penalty = self._sharded().penalty(self.exact_weight())
        return penalty if self.part.is_whole else self.part.sum(penalty.double().cpu()).to(penalty)

    def add_penalty_gradient(self, strength: float) -> None:
        """Add the gradient of `strength * penalty` to those of gates and weight."""
        if self.part.is_whole:
            self.learned.add_penalty_gradient(self.param, strength)
            return
        shards, mask, weight = self._shards(), self._sharded(), Parameter(self.weight())
        if self.param.grad is not None:
            weight.grad = self.part.held(self.param.grad)
        mask.add_penalty_gradient(weight, strength)
        shards.keep_gradients(mask)
        if self.param.grad is None and weight.grad is not None:
            self.param.grad = self.part.wrap(weight.grad)

    def penalty_gradients(self) -> list[Tensor]:
        """The gradient of the penalty, for a strength of 1, on the gates that are here."""
        mask = self._shards().sharded()
        for gate in mask.gates():
            gate.grad = None
        mask.add_penalty_gradient(Parameter(self.weight()), 1.0)
        return [gate.grad for gate in mask.gates() if gate.grad is not None]

    def margins(self) -> tuple[Tensor, Part]:
        """How far each gate here is from dropping its weights, and the part that they are."""
        return self._sharded().margins(self.exact_weight()), self.gates()[0][1]

    def put_across(self, gates: Tensor, *, keep: bool) -> None:
        """Put the gates at these flat indices of those here just across the border."""
        self._sharded().put_across(self.exact_weight(), gates, keep=keep)

    @contextmanager
    def changing_gates(self) -> Iterator[LearnedMask]:
        """The mask of the rows that are here, whose gates may be changed, alike on every rank."""
        if self.part.is_whole:
            yield self.learned
            return
        shards = self._shards()
        mask = shards.of_rows()
        yield mask
        with torch.no_grad():
            shards.take_back(mask)

    # In the model.

    def moves(self) -> list[Move]:
        """How the weight moves when the parametrization is taken out."""
        places = [(m, leaf) for m, leaf in self.places if parametrize.is_parametrized(m, leaf)]
        return [(m.parametrizations[leaf], m, leaf) for m, leaf in places]  # type: ignore[index, misc]

    def attach(self) -> None:
        """Put the parametrization between the weight and its modules.

        Raises:
            ValueError: a module does not let it; all of them are then as they were.
        """
        self._orders = [(module, list(module._parameters)) for module, _ in self.places]
        try:
            for module, leaf in self.places:
                parametrize.register_parametrization(module, leaf, self.learned, unsafe=True)
                self._hooks += self.learned.hook(module)
        except Exception as error:
            self.detach()
            raise ValueError(f"{self.name} cannot be parametrized: {error}") from error

    def detach(self) -> None:
        """Take the parametrization out; the weight stays as the optimizer trains it."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        for module, leaf in self.places:
            if parametrize.is_parametrized(module, leaf):
                if self.part.is_whole:
                    parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
                else:
                    remove_parametrization(module, leaf)
        # torch puts the weight behind the bias; who loads an optimizer's state counts parameters.
        for module, order in self._orders:
            for name in order:
                if name in module._parameters:
                    module._parameters[name] = module._parameters.pop(name)

    @torch.no_grad()
    def release(self) -> None:
        """Leave in the model what evaluation computes with."""
        self._final = self._mask()
        baked = self._of_rows().evaluated(self.exact_weight())
        self.detach()
        self.weight().copy_(torch.where(self._final, baked, 0.0))

    @torch.no_grad()
    def settle(self) -> tuple[int, int, int]:
        """Count what evaluation keeps, and take up the best gate again when that is nothing.

        Returns:
            Weights that it dropped and took up since the last call, and those that are active.
        """
        now = self.held_mask
        active = self.part.totals(int(now.count_nonzero()))[0]
        if not active:  # a layer without weights is lost
            gates = Part(()) if self.part.is_whole else self._shards().part
            with self.changing_gates() as mask:
                mask.revive(self.exact_weight(), self.part, gates)
            now = self.held_mask
        before = torch.ones_like(now) if self._told is None else self._told
        self._told = now
        dropped = int((before & ~now).count_nonzero())
        grown = int((now & ~before).count_nonzero())
        counts = self.part.totals(dropped, grown, int(now.count_nonzero()))
        return counts[0], counts[1], counts[2]

    def after_step(self, keeps_zeros: bool) -> None:
        """Bring the gates back into their range."""
        with torch.no_grad():
            self._sharded().constrain()

    def follow(self, param: Parameter) -> None:
        """Go on with a parameter that has taken the weight's place and is sharded."""
        super().follow(param)
        if self._told is not None:
            self._told = self.part.held(self._told)

    # Checkpoints. Gates and weight are parameters of the model, which saves them.

    def describe(self) -> dict[str, Any]:
        """The mask, for those who read the checkpoint."""
        return {"mask": self.part.wrap(pack_rows(self.held_mask))}

    def check_entry(self, entry: Mapping[str, Any]) -> None:
        """Nothing beside the mask."""

    def restore_entry(self, entry: Mapping[str, Any]) -> None:
        """The mask, where it is no function of gates and weight."""
        packed = entry["mask"]
        here = unpack_rows(self.part.held(packed), self.part.held_shape)
        self._told = here.to(self.weight().device)
        # A mask that is kept beside the gates is in the forward pass, which is of the whole weight.
        packed = packed.full_tensor() if hasattr(packed, "full_tensor") else packed
        self.learned.restore(unpack_rows(packed, self.shape).to(self.param.device))

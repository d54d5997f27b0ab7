"""Knowledge distillation: a teacher's outputs, hidden states and attention as a loss."""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsetrain.batches import called
from sparsetrain.calibration import in_float
from sparsetrain.candidates import unwrapped
from sparsetrain.curvature.losses import LossFunction
from sparsetrain.evaluating import evaluation_mode, ordinary_attention
from sparsetrain.finetuning import terms
from sparsetrain.finetuning.chosen import Layers, Places, Terms, pairs_of
from sparsetrain.finetuning.outputs import logits_of, part_of, probabilities_of
from sparsetrain.finetuning.projections import Projection, projection_for, require_same
from sparsetrain.finetuning.taps import Taps

_CHANNELS_FIRST = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d)


def distill(
    student: nn.Module,
    teacher: nn.Module,
    *,
    loss_fn: LossFunction | None = None,
    temperature: float = 4.0,
    weight: float = 0.9,
    hidden: Layers | None = None,
    hidden_weight: float = 1.0,
    attention: Places | None = None,
    attention_weight: float = 1.0,
    class_dim: int | None = None,
    example_inputs: Any = None,
) -> Distillation:
    """A loss by which a student learns from labels and from a teacher.

    ``(1 - weight) task + weight T^2 KL(teacher / T || student / T) + hidden_weight hidden +
    attention_weight attention``, where the last two are sums over the pairs of layers (Hinton,
    Vinyals & Dean 2015; Romero et al. 2015, "FitNets"; Zagoruyko & Komodakis 2017; for
    `outputs.attentions` Wang et al. 2020, "MiniLM").

    Args:
        student: in any loop, wrapped, compiled or pruned; hooks are on the layers that are named.
        teacher: any network for the same inputs, on the same device, such as a copy of the student
            from before it was pruned. It is left as it is.
        loss_fn: (outputs, targets) -> scalar, the task. None takes `outputs.loss`.
        temperature: T, above 0.
        weight: of the teacher's logits, in [0, 1]; with 1 the task is left out, and no targets are
            needed.
        hidden: layers whose outputs are compared: names, or names of the student's -> the
            teacher's.
        hidden_weight, attention_weight: 0 or more.
        attention: the same, for maps of where activations are large: outputs of layers are
            [samples, channels, positions...] or tokens [samples, tokens, features]. Numbers instead
            of names are places in `outputs.attentions`, where probabilities are compared (-1 is the
            last layer).
        class_dim: dimension of the logits that counts classes; None is the last of up to three.
        example_inputs: a small batch as the model takes it. Needed where hidden layers of student
            and teacher differ in width, so that there is a learned projection between them.

    Raises:
        ValueError: an argument is out of range, or names no layer; with `example_inputs` also what
            does not fit in the layers' outputs.
    """
    chosen = Terms(
        temperature=temperature,
        weight=weight,
        hidden=pairs_of(hidden),
        hidden_weight=hidden_weight,
        attention=pairs_of(attention),
        attention_weight=attention_weight,
        class_dim=class_dim,
    )
    return Distillation(student, teacher, chosen, loss_fn, example_inputs)


class Distillation(nn.Module):
    """What `st.distill` gives: `loss = distillation(outputs, inputs, targets)`.

    Its parameters and its state dict are those of the projections alone. It hooks the student and
    the teacher until `close()`, or the end of a `with` block, where layers are compared.

    Attributes:
        parts: name -> scalar without a gradient, the terms of the last loss before their weights:
            "task", "logits" (with T^2), "hidden", "attention", as far as they were asked for.
        projections: one a pair of hidden layers; an identity where widths are equal.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        chosen: Terms,
        loss_fn: LossFunction | None = None,
        example_inputs: Any = None,
    ) -> None:
        super().__init__()
        _check_apart(student, teacher)
        self.chosen = chosen
        self.parts: dict[str, Tensor] = {}
        self.projections = nn.ModuleList(nn.Identity() for _ in chosen.hidden)
        self._given = _Given(student, teacher, loss_fn)
        self._is_open = True
        pairs = [*chosen.hidden.items(), *chosen.maps.items()]
        self._student = Taps(student, [own for own, _ in pairs], "the student")
        try:
            self._teacher = Taps(teacher, [other for _, other in pairs], "the teacher")
            if example_inputs is not None:
                self._fit(example_inputs)
        except Exception:
            self.close()
            raise

    def forward(
        self, outputs: Any, inputs: Any, targets: Any = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch that the student has just seen.

        Args:
            outputs: what the student gave for `inputs`: a tensor of logits, or an object or mapping
                with `logits`.
            inputs: for the teacher: a tensor, a tuple of positional or a mapping of keyword
                arguments.
            targets: second argument of `loss_fn`.
            mask: [samples, tokens], non-zero where a token counts, for all but the task; the
                attention mask of padded text.

        Returns:
            A scalar.

        Raises:
            ValueError: the student has not run since the last loss; outputs of the two networks do
                not fit together; the message says which.
        """
        if not self._is_open:
            raise ValueError("this distillation was closed: make a new one by st.distill")
        own = self._student.take()
        taught, known = self._taught(inputs)
        found = {
            "task": self._task(outputs, targets),
            "logits": self._logits(outputs, taught, mask),
            "hidden": self._hidden(own, known, mask),
            "attention": self._attention(own, known, outputs, taught, mask),
        }
        self.parts = {name: term.detach() for name, term in found.items() if term is not None}
        weights = (
            1 - self.chosen.weight,
            self.chosen.weight,
            self.chosen.hidden_weight,
            self.chosen.attention_weight,
        )
        pairs = zip(weights, found.values(), strict=True)
        return reduce(torch.add, [weight * term for weight, term in pairs if term is not None])

    def close(self) -> None:
        """Remove every hook."""
        self._is_open = False
        for taps in (self._student, getattr(self, "_teacher", None)):
            if taps is not None:
                taps.close()

    def __enter__(self) -> Distillation:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _taught(self, inputs: Any) -> tuple[Any, dict[str, Tensor]]:
        """The teacher's outputs, and those of its layers."""
        teacher = self._given.teacher
        with torch.no_grad(), evaluation_mode(teacher), ordinary_attention():
            return called(teacher, inputs), self._teacher.take()

    def _fit(self, example_inputs: Any) -> None:
        """Projections where widths differ."""
        student = self._given.student
        with torch.no_grad(), evaluation_mode(student), ordinary_attention():
            called(student, example_inputs)
        own, (_, known) = self._student.take(), self._taught(example_inputs)
        for place, (name, other) in enumerate(self.chosen.hidden.items()):
            made = projection_for(own[name], known[other], f"hidden={{{name!r}: {other!r}}}")
            if made is not None:
                self.projections[place] = made
        self._maps(own, known, None)

    def _task(self, outputs: Any, targets: Any) -> Tensor | None:
        if self.chosen.weight == 1:
            return None
        if self._given.loss_fn is not None:
            return self._given.loss_fn(outputs, targets)
        loss = part_of(outputs, "loss")
        if not isinstance(loss, Tensor):
            raise ValueError(
                "there is no loss for the task: give loss_fn(outputs, targets), or weight=1, or "
                "let the student return outputs with a loss"
            )
        return loss

    def _logits(self, outputs: Any, taught: Any, mask: Tensor | None) -> Tensor | None:
        if not self.chosen.weight:
            return None
        own = logits_of(outputs, "the student", self.chosen.class_dim)
        other = logits_of(taught, "the teacher", self.chosen.class_dim)
        require_same(own, other, "logits")
        return terms.logit_divergence(own, other, self.chosen.temperature, mask)

    def _hidden(
        self, own: dict[str, Tensor], known: dict[str, Tensor], mask: Tensor | None
    ) -> Tensor | None:
        errors = []
        pairs = zip(self.projections, self.chosen.hidden.items(), strict=True)
        for projection, (name, other) in pairs:
            wanted = in_float(known[other])
            seen = in_float(projection(in_float(own[name])))
            advice = "" if isinstance(projection, Projection) else _GIVE_EXAMPLE
            require_same(seen, wanted, f"hidden={{{name!r}: {other!r}}}", advice)
            errors.append(terms.hidden_error(seen, wanted, mask))
        return torch.stack(errors).sum() if errors else None

    def _attention(
        self,
        own: dict[str, Tensor],
        known: dict[str, Tensor],
        outputs: Any,
        taught: Any,
        mask: Tensor | None,
    ) -> Tensor | None:
        found = self._maps(own, known, mask)
        for place, other in self.chosen.probabilities.items():
            student = probabilities_of(outputs, place, "the student")
            teacher = probabilities_of(taught, other, "the teacher")
            require_same(student[:, 0], teacher[:, 0], f"attention={{{place}: {other}}}")
            found.append(terms.probability_divergence(student, teacher, mask))
        return torch.stack(found).sum() if found else None

    def _maps(
        self, own: dict[str, Tensor], known: dict[str, Tensor], mask: Tensor | None
    ) -> list[Tensor]:
        distances = []
        for name, other in self.chosen.maps.items():
            student = _map(self._given.student, name, own[name], mask)
            teacher = _map(self._given.teacher, other, known[other], mask)
            require_same(student, teacher, f"attention={{{name!r}: {other!r}}}")
            distances.append(terms.map_distance(student, teacher))
        return distances


class _Given(NamedTuple):
    """What a distillation works with, no modules of its own."""

    student: nn.Module
    teacher: nn.Module
    loss_fn: LossFunction | None


def _map(model: nn.Module, name: str, output: Tensor, mask: Tensor | None) -> Tensor:
    """Where a layer's activations are large, [samples, positions]."""
    if output.dim() < 3:
        raise ValueError(
            f"attention={name!r} gives {tuple(output.shape)}, which has no positions: name a "
            "layer that gives [samples, channels, height, width] or [samples, tokens, features]"
        )
    layer = unwrapped(model).get_submodule(name)
    is_tokens = output.dim() == 3 and not isinstance(layer, _CHANNELS_FIRST)
    return terms.activation_map(in_float(output), 2 if is_tokens else 1, mask)


_GIVE_EXAMPLE = "; give example_inputs to st.distill, and a learned projection goes between them"


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError when what trains the student changes its teacher."""
    trained = {id(p): name for name, p in student.named_parameters() if p.requires_grad}
    shared = [trained[id(p)] for p in teacher.parameters() if id(p) in trained]
    if unwrapped(student) is unwrapped(teacher) or shared:
        what = f"share {', '.join(shared[:3])}" if shared else "are one network"
        raise ValueError(
            f"student and teacher {what}, so that the teacher would change in training: make it by "
            "copy.deepcopy before pruning"
        )

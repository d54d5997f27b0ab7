"""Gates from a stretched concrete distribution (Louizos et al. 2018, L0)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from sparsetrain.learned.base import LearnedMask, MaskFunction, accumulate, put
from sparsetrain.learned.sharing import Sharing

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
_STRETCH = ZETA - GAMMA
#: P(z > 0) = sigmoid(log_alpha + this); eq. 12.
LOG_RATIO = -BETA * math.log(-GAMMA / ZETA)
#: Below this log_alpha the gate of evaluation is 0.
BORDER = math.log(-GAMMA / ZETA)
_LOWEST, _HIGHEST = math.log(0.01), math.log(100.0)
_LEAST_UNIFORM = 1e-6


class HardConcreteMask(LearnedMask):
    """weight * z with z = clamp(stretched concrete, 0, 1), which is exactly 0 with some chance.

    Args:
        sharing: which weights share a gate.
        log_alpha: its start, of the gates' shape.
        sampling: "batch" draws one z a pass; "example" one for each example, which needs gates of
            whole inputs or outputs.
        side: for gates of "input" or "output" units, which of them.
        l2: lambda_2 of the expected squared norm of the gated weights (section 2.4).
    """

    def __init__(
        self,
        sharing: Sharing,
        log_alpha: Tensor,
        *,
        sampling: Literal["batch", "example"] = "batch",
        side: Literal["input", "output"] | None = None,
        l2: float = 0.0,
    ) -> None:
        super().__init__(sharing)
        self.log_alpha = Parameter(log_alpha)
        self.sampling = sampling
        self.side = side
        self.l2 = l2

    def sampled(self, weight: Tensor) -> Tensor:
        """With random gates; as it is when the layer's hook gates each example."""
        if self.sampling == "example":
            return weight
        noise = logistic_noise(self.log_alpha, self.log_alpha.shape)
        return self.sharing.times(weight, _gates(self.log_alpha, noise))

    def evaluated(self, weight: Tensor) -> Tensor:
        """With the gates of eq. 13, without noise."""
        return self.sharing.times(weight, self._fixed_gates())

    def mask(self, weight: Tensor) -> Tensor:
        """Where the fixed gate is not 0."""
        return self.sharing.spread(self._fixed_gates() > 0)

    def _fixed_gates(self) -> Tensor:
        return torch.clamp(torch.sigmoid(self.log_alpha) * _STRETCH + GAMMA, 0, 1)

    def hook(self, module: nn.Module) -> list[RemovableHandle]:
        """Gates for each example, on the layer's input or output."""
        if self.sampling == "batch":
            return []
        if self.side == "input":
            return [module.register_forward_pre_hook(_GateInput(self))]
        return [module.register_forward_hook(_GateOutput(self))]

    def gates_of_examples(self, x: Tensor, channel: int) -> Tensor:
        """Random gates that broadcast against x, another draw for each entry of dimension 0."""
        log_alpha = self.log_alpha.view(-1)
        if x.dim() > -channel:
            log_alpha = log_alpha.expand(x.shape[0], -1)
        gates = _gates(log_alpha, logistic_noise(log_alpha, log_alpha.shape))
        middle = [1] * (x.dim() + channel - 1)
        after = [1] * (-channel - 1)
        return gates.view(*gates.shape[:-1], *middle, gates.shape[-1], *after).to(x.dtype)

    def penalty(self, weight: Tensor) -> Tensor:
        """The expected number of weights, eq. 11, and half the expected squared norm."""
        kept = torch.sigmoid(self.log_alpha + LOG_RATIO)
        penalty = kept.sum() * self.sharing.size
        if self.l2:
            penalty = penalty + 0.5 * self.l2 * (kept * self.sharing.gather(weight.square())).sum()
        return penalty

    def add_penalty_gradient(self, weight: Parameter, strength: float) -> None:
        """In closed form, when there is no squared norm."""
        if self.l2:
            super().add_penalty_gradient(weight, strength)
            return
        kept = torch.sigmoid(self.log_alpha.detach() + LOG_RATIO)
        accumulate(self.log_alpha, kept.sub_(kept * kept), strength * self.sharing.size)

    def margins(self, weight: Tensor) -> Tensor:
        """log_alpha above the border of eq. 13."""
        return self.log_alpha.detach() - BORDER

    def put_across(self, weight: Tensor, gates: Tensor, *, keep: bool) -> None:
        """By log_alpha."""
        put(self.log_alpha, gates, BORDER, above=keep)

    def constrain(self) -> None:
        """log_alpha in [log 0.01, log 100], as in the authors' code, so that no gate is lost."""
        self.log_alpha.data.clamp_(_LOWEST, _HIGHEST)


class _GateInput:
    """A hook that gates the input of each example."""

    def __init__(self, mask: HardConcreteMask) -> None:
        self.mask = mask

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not module.training:
            return None
        x = args[0]
        return x * self.mask.gates_of_examples(x, channel_of(module)), *args[1:]


class _GateOutput:
    """A hook that gates the output of each example, its bias left out."""

    def __init__(self, mask: HardConcreteMask) -> None:
        self.mask = mask

    def __call__(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        channel = channel_of(module)
        gates = self.mask.gates_of_examples(output, channel)
        if module.bias is None:
            return output * gates
        bias: Tensor = module.bias.view(-1, *[1] * (-channel - 1)).to(output.dtype)
        return (output - bias) * gates + bias


def channel_of(module: nn.Module) -> int:
    """The dimension of inputs and outputs that counts units, from the end."""
    if isinstance(module, nn.Linear):
        return -1
    return -1 - len(module.kernel_size)  # type: ignore[arg-type]


def logistic_noise(like: Tensor, shape: torch.Size) -> Tensor:
    """logit(u) for u uniform in (0, 1)."""
    # Half precision draws exactly 0 too often.
    dtype = torch.promote_types(like.dtype, torch.float32)
    uniform = torch.rand(shape, dtype=dtype, device=like.device)
    return torch.logit(uniform, eps=_LEAST_UNIFORM).to(like.dtype)


def _gates(log_alpha: Tensor, noise: Tensor) -> Tensor:
    gates: Tensor = _HardConcrete.apply(log_alpha, noise)  # type: ignore[no-untyped-call]
    return gates


class _HardConcrete(MaskFunction):
    """Eq. 10: z = clamp(sigmoid((log_alpha + noise) / beta) (zeta - gamma) + gamma, 0, 1)."""

    @staticmethod
    def forward(log_alpha: Tensor, noise: Tensor) -> Tensor:
        concrete = (log_alpha + noise).div_(BETA).sigmoid_()
        return concrete.mul_(_STRETCH).add_(GAMMA).clamp_(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gates,) = ctx.saved_tensors
        inside = torch.sign(gates - gates * gates)  # 0 where a gate is clamped, else 1
        concrete = (gates - GAMMA) / _STRETCH
        slope = (concrete - concrete * concrete) * (_STRETCH / BETA)
        return grad * slope * inside, None

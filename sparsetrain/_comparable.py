"""What selection asks of scores, and what it says when they do not comply."""

import torch
from torch import Tensor


def comparable(scores: Tensor) -> Tensor:
    """The scores in float32 or float64, without their history.

    Raises ValueError for complex scores.
    """
    scores = scores.detach()
    if scores.is_complex():
        raise ValueError("complex scores have no order: take their absolute value")
    if not scores.is_floating_point():
        return scores.double()
    return scores if scores.dtype in (torch.float32, torch.float64) else scores.float()


def check_finite(values: Tensor, name: str) -> None:
    """Raise ValueError, naming the layer, when a score is NaN or infinite."""
    # A finite sum proves every term finite; an overflowing one proves nothing.
    if not torch.isfinite(values.sum()):
        check_none_bad(int(torch.count_nonzero(~torch.isfinite(values))), values.numel(), name)


def check_none_bad(bad: int, numel: int, name: str) -> None:
    """Raise ValueError, naming the layer, when `bad` of `numel` scores are not finite."""
    if bad:
        raise ValueError(
            f"{in_layer(name)}{bad} of {numel} scores are NaN or infinite; look for a diverged "
            "loss or an overflow before the masks are updated"
        )


def check_count(k: int, numel: int, name: str) -> None:
    """Raise ValueError, naming the layer, when `k` of `numel` scores cannot be selected."""
    if not 0 <= k <= numel:
        raise ValueError(f"{in_layer(name)}cannot select k={k} of {numel} scores")


def in_layer(name: str) -> str:
    """Beginning of an error message; empty without a name."""
    return f"layer {name!r}: " if name else ""

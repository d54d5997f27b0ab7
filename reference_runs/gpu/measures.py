"""The three things that are measured: ordinary steps, mask updates, 2:4 products."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.gpu.models import GPT2, Workload
from reference_runs.gpu.training import NEVER, SPARSITY, begin, in_ms, interleaved, ratio
from sparsetrain.selection import n_m_mask
from sparsetrain.timing import clock_of

#: An update comes due so often while updates are timed; results are for one in AMORTISED steps.
EVERY = 4
AMORTISED = 100
POLICIES = ("rigl", "set", "gradual", "snfs")
DTYPES = ("float16", "bfloat16")


def steps(
    workload: Workload, optimizer: str, precision: str, device: torch.device, effort: Any
) -> common.Record:
    """A training step between mask updates (RigL at 90 %) against the bare optimizer's."""
    never = {"every": NEVER, "start": NEVER - 1}
    policy = {"kind": "rigl", "sparsity": SPARSITY, "total_steps": 2 * NEVER, "update": never}
    loops = {
        "dense": begin(workload, optimizer, precision, device),
        "sparse": begin(workload, optimizer, precision, device, policy),
    }
    held = loops["sparse"].optimizer
    times = interleaved(
        {name: loop.train_step for name, loop in loops.items()},
        device,
        rounds=effort.rounds,
        calls=effort.calls,
        warm_up=effort.warm_up,
    )
    return {
        "sparse_weights": sum(target.numel for target in held.targets.values()),
        "sparsity": round(held.sparsity(), 4),
        "dense_ms": in_ms(times["dense"]),
        "sparse_ms": in_ms(times["sparse"]),
        "ratio": ratio(times["sparse"], times["dense"]),
    }


def updates(
    workload: Workload, optimizer: str, policy: str, device: torch.device, effort: Any
) -> common.Record:
    """`optimizer.step()` on steps with a mask update and on others, beside whole dense steps.

    RigL's update stands in the place of the gradient step, that of the others follows it; what an
    update costs is the difference to a step without one.
    """
    total = EVERY * (effort.warm_up + effort.rounds)
    fields: dict[str, Any] = {"kind": policy, "sparsity": SPARSITY, "total_steps": total}
    fields["update"] = {"every": EVERY, "start": EVERY - 1, "stop": total}
    if policy == "gradual":  # so that every update has weights to drop
        fields["initial_sparsity"] = 0.5
    dense = begin(workload, optimizer, "bfloat16", device)
    sparse = begin(workload, optimizer, "bfloat16", device, fields)
    clock, held = clock_of(device), sparse.optimizer
    changed: list[int] = []
    held.register_update_hook(lambda event: changed.append(event.step))
    times: dict[str, list[float]] = {"whole": [], "update": [], "ordinary": []}
    for number in range(total):
        marks = [clock.mark()]
        dense.train_step()
        marks.append(clock.mark())
        sparse.backward()
        marks.append(clock.mark())
        held.step()
        marks.append(clock.mark())
        if number < EVERY * effort.warm_up:
            continue
        whole, _, step = clock.spans(marks)
        times["whole"].append(whole)
        times["update" if changed and changed[-1] == number else "ordinary"].append(step)
    ordinary, whole = statistics.median(times["ordinary"]), statistics.median(times["whole"])
    extra = [step - ordinary for step in times["update"]]
    in_steps = [each / whole for each in extra]
    return {
        "updates": len(times["update"]),
        "sparse_weights": sum(target.numel for target in held.targets.values()),
        "dense_training_step_ms": in_ms(times["whole"]),
        "optimizer_step_ms": in_ms(times["ordinary"]),
        "optimizer_step_with_update_ms": in_ms(times["update"]),
        "update_ms": in_ms(extra),
        "update_in_training_steps": ratio(extra, [whole] * len(extra)),
        "amortised": round(1 + statistics.median(in_steps) / AMORTISED, 5),
    }


Convert = Callable[[nn.Module], nn.Module]


def two_of_four(
    size: str,
    dtype: str,
    tokens: int,
    device: torch.device,
    effort: Any,
    convert: Convert = st.storage.semi_structured,
) -> common.Record:
    """Linear layers of GPT-2's shapes with 2:4 weights: sparse tensor cores against dense products.

    Args:
        tokens: rows of the input.
        convert: gives the copy that is timed against the dense layers.
    """
    width, kind = GPT2[size].width, getattr(torch, dtype)
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    return {
        "layers": [
            _product(shape, kind, tokens, device, effort, convert) | {"inputs_outputs": list(shape)}
            for shape in shapes
        ]
    }


def _product(
    shape: tuple[int, int],
    dtype: torch.dtype,
    tokens: int,
    device: torch.device,
    effort: Any,
    convert: Convert,
) -> common.Record:
    generator = torch.Generator().manual_seed(2)
    dense = nn.Linear(*shape)
    with torch.no_grad():
        weight = torch.randn(shape[1], shape[0], generator=generator) / shape[0] ** 0.5
        dense.weight.copy_(weight * n_m_mask(weight.abs(), 2, 4))
    dense = dense.to(device, dtype).eval()
    x = torch.randn(tokens, shape[0], generator=generator).to(device, dtype)
    sparse = convert(dense)
    with torch.inference_mode():
        exact = nn.functional.linear(x.double(), dense.weight.double(), dense.bias.double())
        errors = {
            name: _error(layer(x), exact) for name, layer in (("dense", dense), ("sparse", sparse))
        }
        del exact
        times = interleaved(
            {"dense": lambda: dense(x), "sparse": lambda: sparse(x)},
            device,
            rounds=effort.rounds,
            calls=10 * effort.calls,
            warm_up=effort.warm_up,
        )
    return {
        "dense_ms": in_ms(times["dense"]),
        "sparse_ms": in_ms(times["sparse"]),
        "speed_up": ratio(times["dense"], times["sparse"]),
        "largest_error": errors,
        "is_accurate": errors["sparse"] <= 2 * errors["dense"] + torch.finfo(dtype).eps,
    }


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference from the product in float64, as a share of its largest entry."""
    return float((found.double() - exact).abs().max() / exact.abs().max())

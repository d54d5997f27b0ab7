"""Training of the network, which goes on where it was stopped, and its loss on validation text."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference_runs import _common as common
from reference_runs.char_transformer import data
from reference_runs.char_transformer.model import CharTransformer

SAVE_EVERY = 100  # steps; a run that was killed loses no more


@dataclass(frozen=True)
class Settings:
    """The network, its training, and how much text pruning and evaluation see."""

    steps: int = 2400
    batch_size: int = 32  # windows
    context: int = 128  # characters of a window
    width: int = 128
    blocks: int = 5
    heads: int = 4
    learning_rate: float = 2e-3  # AdamW; warm-up, then a cosine to 0
    warm_up: float = 0.05  # of the steps
    weight_decay: float = 0.1  # of matrices; none on biases and norms
    largest_gradient: float = 1.0  # norm over all weights
    calibration_windows: int = 128  # of the training text
    validation_windows: int = 800


def network(settings: Settings) -> CharTransformer:
    """A network with new weights."""
    return CharTransformer(
        data.load().characters,
        context=settings.context,
        width=settings.width,
        blocks=settings.blocks,
        heads=settings.heads,
    )


def optimizer_of(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices alone."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
        fused=True,
    )


def rate(step: int, settings: Settings) -> float:
    """Learning rate of a step (from 0) as a share of its peak."""
    warm_up = settings.warm_up * settings.steps
    done = max(step - warm_up, 0) / (settings.steps - warm_up)
    return min((step + 1) / max(warm_up, 1), 0.5 + 0.5 * math.cos(math.pi * done))


# Checkpoints.


def checkpoint_file(folder: Path, settings: Settings, seed: int) -> Path:
    """Where the network of a seed is kept."""
    return folder / f"network-{settings.steps}-{seed}.pt"


def _common_ground(settings: Settings) -> dict[str, Any]:
    """What a checkpoint must share with the run that goes on from it."""
    return {"settings": asdict(settings), "data": data.load().digest}


def _read(path: Path, settings: Settings) -> dict[str, Any]:
    """A checkpoint.

    Raises:
        ValueError: it has other settings or another text.
    """
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    if saved["common_ground"] != _common_ground(settings):
        raise ValueError(f"{path.name} has other settings or text: move it away, or give --out")
    return saved


def _write(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    torch.save(state, unfinished)
    unfinished.replace(path)


def trained(folder: Path, settings: Settings, seed: int) -> CharTransformer:
    """The finished network of a seed.

    Raises:
        ValueError: it is missing or not finished.
    """
    path = checkpoint_file(folder, settings, seed)
    saved = _read(path, settings) if path.exists() else None
    if saved is None or saved["step"] < settings.steps:
        raise ValueError(
            f"{path.name} has no finished network: delete the results, so that it trains again"
        )
    model = network(settings)
    model.load_state_dict(saved["model"])
    return model.eval()


# Training and evaluation.


def fit(
    folder: Path, settings: Settings, seed: int, report: Callable[[int, int, str], None]
) -> tuple[CharTransformer, list[float], float]:
    """Train from the last checkpoint, or from the start.

    Returns:
        The network, the loss of each step, and the seconds of all steps.
    """
    text = data.load().train
    torch.manual_seed(seed)
    model = network(settings)
    optimizer = optimizer_of(model, settings)
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    before = 0.0
    path = checkpoint_file(folder, settings, seed)
    if path.exists():
        saved = _read(path, settings)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        order.set_state(saved["order"])
        losses, before = saved["losses"], saved["seconds"]
    model.train()
    started = time.perf_counter()
    for step in range(len(losses), settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate(step, settings)
        starts = data.drawn(text, settings.batch_size, settings.context, order)
        inputs, targets = data.cut(text, starts, settings.context)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.largest_gradient)
        optimizer.step()
        losses.append(loss.item())
        done = step + 1
        if done % 10 == 0:
            report(done, settings.steps, f"loss {common.mean(losses[-50:]):.2f}")
        if done % SAVE_EVERY == 0 or done == settings.steps:
            state = {
                "common_ground": _common_ground(settings),
                "step": done,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "order": order.get_state(),
                "losses": losses,
                "seconds": before + time.perf_counter() - started,
            }
            _write(path, state)
    return model.eval(), losses, before + time.perf_counter() - started


def calibration(settings: Settings, draw: int) -> list[Tensor]:
    """Batches of windows of the training text, for what looks at inputs before it prunes."""
    text = data.load().train
    generator = torch.Generator().manual_seed(1000 + draw)  # other windows than training's first
    starts = data.drawn(text, settings.calibration_windows, settings.context, generator)
    inputs, _ = data.cut(text, starts, settings.context)
    return list(inputs.split(settings.batch_size))


@torch.inference_mode()
def validation_loss(model: nn.Module, settings: Settings) -> float:
    """Mean cross-entropy of a character [nats]: windows are apart, each position is predicted."""
    text = data.load().validation
    starts = data.spaced(text, settings.validation_windows, settings.context)
    model.eval()
    total = 0.0
    for part in starts.split(settings.batch_size):
        inputs, targets = data.cut(text, part, settings.context)
        logits = model(inputs).flatten(0, 1)
        total += F.cross_entropy(logits, targets.flatten(), reduction="sum").item()
    return total / (len(starts) * settings.context)

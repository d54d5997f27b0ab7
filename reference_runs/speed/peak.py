"""Peak memory of one process that trains three 4096 x 4096 layers; run by `run.py`.

    python -m reference_runs.speed.peak bare|steps|updates SGD|AdamW

Prints JSON: the peak resident size above that of the imports, in bytes, and the number of weights
that are made sparse.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

import sparsetrain as st
from reference_runs.speed.contenders import OPTIMIZERS

WIDTH, STEPS = 4096, 6


def peak() -> int:
    """Highest resident size of this process so far, in bytes (Linux)."""
    # Not getrusage: its maximum is handed down by the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])


def main(case: str, optimizer_name: str) -> None:
    """Train a few steps and print the peak."""
    torch.set_num_threads(2)
    nn.Linear(8, 8)(torch.zeros(2, 8)).sum().backward()
    imports = peak()
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)))
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    if case != "bare":
        every = 2 if case == "updates" else 1000
        update = st.UpdateSchedule(every=every, start=1 if case == "updates" else 999)
        policy = st.RigL(sparsity=0.9, total_steps=2000, update=update)
        optimizer = st.SparseOptimizer(optimizer, model, policy)
    x = torch.randn(8, WIDTH)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    weights = sum(p.numel() for p in model.parameters())
    print(json.dumps({"peak_bytes": peak() - imports, "weights": weights}))


if __name__ == "__main__":
    main(*sys.argv[1:])

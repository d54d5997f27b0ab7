"""Settings shared by every test. The `slow` marker is declared in pyproject.toml."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import torch
from hypothesis import settings

# One thread a worker: small tensors gain nothing from more, and sums come out alike everywhere.
torch.set_num_threads(1)

# Timings differ too much between machines for a deadline to mean anything.
settings.register_profile("sparsetrain", deadline=None)
settings.load_profile("sparsetrain")

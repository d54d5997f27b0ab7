"""A worker under torchrun that saves every few steps, and dies once in the middle.

Started anew it goes on from the last checkpoint. Usage: elastic_worker.py FOLDER POLICY.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from distributed_runs import build, outcome, train
from runs import STEPS

SAVE_EVERY, DIES_AT = 4, 10


def main(folder: Path, policy: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, optimizer = build("even", policy, "adam")
    saved = sorted(folder.glob("step*/.metadata"), key=lambda path: int(path.parent.name[4:]))
    if saved:  # asking a fresh optimizer for its state takes a step of Adam, so not before
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=str(saved[-1].parent))
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    first_try = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    for step in range(optimizer.step_count, STEPS):
        if step == DIES_AT and rank == 1 and first_try:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.manual_seed(100 + step)
        train(model, optimizer, [step], rank, ranks)
        if (step + 1) % SAVE_EVERY == 0:
            weights, state = get_state_dict(model, optimizer)
            dcp.save(
                {"model": weights, "optimizer": state},
                checkpoint_id=str(folder / f"step{step + 1}"),
            )
    torch.save(outcome(model, optimizer), folder / f"{rank}.pt")
    (folder / f"restarts{rank}").write_text(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort while the interpreter exits


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""A tiny BERT that tells digits by their rows of pixels, in Hugging Face's `Trainer`."""

from __future__ import annotations

import gc
import os
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from runs import same
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

import sparsetrain as st
from sparsetrain.integrations import transformers as hf

logging.disable_progress_bar()
gc.freeze()  # Trainer collects garbage when it begins, and would look at every module for it

STEPS = 12
_CHANGING: dict[str, Any] = {"total_steps": STEPS, "update": {"every": 2}}
MASKED: dict[str, st.Policy] = {
    "static": st.Static(sparsity=0.7),
    "set": st.SET(sparsity=0.7, **_CHANGING),
    "rigl": st.RigL(sparsity=0.7, **_CHANGING),
    "snfs": st.SNFS(sparsity=0.7, **_CHANGING),
    "gradual": st.Gradual(sparsity=0.7, **_CHANGING),
    "dynamic_network_surgery": st.DynamicNetworkSurgery(sparsity=0.7, total_steps=STEPS),
    "nm_sparse": st.NMSparse(n=1, m=4),
}
LEARNED: dict[str, st.Policy] = {
    "soft_threshold": st.SoftThreshold(sparsity=0.5, **_CHANGING),
    "hard_concrete": st.HardConcrete(sparsity=0.5, **_CHANGING),
    "gumbel_softmax": st.GumbelSoftmax(sparsity=0.5, **_CHANGING),
    "variational_dropout": st.VariationalDropout(sparsity=0.5, **_CHANGING),
    "movement": st.Movement(sparsity=0.5, **_CHANGING),
    "soft_movement": st.Movement(sparsity=0.5, mode="threshold", **_CHANGING),
}


@cache
def digits(first: int = 0, last: int = 1797) -> list[dict[str, Any]]:
    """Samples of the data set: an embedding [8, 32] of the 8 rows, and the digit."""
    images, labels = load_digits(return_X_y=True)
    rows = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 8 - 1
    return [
        {"inputs_embeds": rows[i].repeat(1, 4), "labels": int(labels[i])}
        for i in range(first, last)
    ]


def bert(dropout: float = 0.1) -> BertForSequenceClassification:
    """A classifier of one layer, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=2,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=8,
                num_labels=10,
                initializer_range=0.3,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            )
        )


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """A short run on the CPU that saves once, in its middle, and logs every third step."""
    usual = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "save_steps": STEPS // 2,
        "save_strategy": "no",
        "logging_steps": 3,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**usual, **changes})


def quiet(trainer: Trainer) -> Trainer:
    """The same without printed logs."""
    trainer.pop_callback(PrinterCallback)
    return trainer


def trainer_of(
    folder: Path, policy: Any, *, storage: str = "masked", watch: Any = None, **changes: Any
) -> Trainer:
    """A `Trainer` of `bert` on the digits, sparse as the documentation says."""
    model, args = bert(), arguments(folder, **changes)
    trainer = quiet(
        Trainer(
            model=model,
            args=args,
            train_dataset=digits(),
            eval_dataset=digits(0, 64),
            optimizers=hf.optimizers(model, args, policy, storage=storage),
        )
    )
    trainer.add_callback(hf.SparsityCallback(trainer, **(watch or {})))
    return trainer


def logged(trainer: Trainer, key: str) -> list[tuple[int, float]]:
    """Steps and values of what was logged under a name."""
    return [(e["step"], e[key]) for e in trainer.state.log_history if key in e]


def agree(first: Trainer, second: Trainer) -> bool:
    """Whether two runs ended with the same weights, masks and optimizer state, bit for bit."""
    return (
        same(state_of(first), state_of(second))
        and same(hf.sparse_optimizer(first).masks(), hf.sparse_optimizer(second).masks())
        and same(moments_of(first), moments_of(second))
        and hf.sparse_optimizer(first).step_count == hf.sparse_optimizer(second).step_count
    )


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """The weights, by name."""
    assert trainer.model is not None
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def moments_of(trainer: Trainer) -> dict[str, Tensor]:
    """The optimizer's state, by number and name."""
    state = trainer.optimizer.state_dict()["state"]
    return {f"{i} {k}": v for i, entry in state.items() for k, v in entry.items()}

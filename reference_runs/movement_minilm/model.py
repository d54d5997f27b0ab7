"""MiniLM with a classifier on the mean of its last hidden states, as it was pretrained to be read.

The weights come from a Python package, so that nothing is downloaded when the experiment runs.
"""

from __future__ import annotations

import os
from importlib.resources import as_file, files

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

from reference_runs.movement_minilm.data import PAD, WEIGHTS

#: Names of what is pruned: the Linear layers of the transformer.
ENCODER = "bert.encoder.*"


class Classifier(nn.Module):
    """Embeddings (frozen, as in Sanh et al. 2020, section 5), encoder, mean over tokens, Linear."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        from transformers import BertModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        with as_file(files(WEIGHTS) / "model") as folder:
            self.bert = BertModel.from_pretrained(folder, add_pooling_layer=False)
        self.bert.embeddings.requires_grad_(False)
        self.dropout = nn.Dropout(self.bert.config.hidden_dropout_prob)
        self.classifier = nn.Linear(self.bert.config.hidden_size, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [samples, classes] of token numbers [samples, length]."""
        present = (tokens != PAD).long()
        hidden = self.bert(input_ids=tokens, attention_mask=present).last_hidden_state
        weights = (present / present.sum(1, keepdim=True)).unsqueeze(2)
        logits: Tensor = self.classifier(self.dropout((hidden * weights).sum(1)))
        return logits


def pretrained(classes: int, seed: int) -> Classifier:
    """The pretrained network with a new classifier."""
    torch.manual_seed(seed)
    return Classifier(classes)

"""torch's attention by layers: what it gives, and its diagonals."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from curvature_cases import largest_error
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st
from sparsetrain.batches import Batch
from sparsetrain.curvature import diagonals, fisher_diagonal
from sparsetrain.curvature.attention import Attentions
from sparsetrain.curvature.diagonals import Pass
from sparsetrain.evaluating import evaluating

SAMPLES, TOKENS, WIDTH, HEADS = 6, 5, 8, 2
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options).double().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def inputs(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SAMPLES, TOKENS, WIDTH, dtype=torch.float64, generator=generator)


def padding() -> Tensor:
    return torch.arange(TOKENS) >= torch.tensor([5, 4, 3, 2, 5, 1]).unsqueeze(1)


def many_masks() -> Tensor:
    return torch.rand(SAMPLES * HEADS, TOKENS, TOKENS, dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"dropout": 0.5}])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"attn_mask": CAUSAL, "need_weights": False, "is_causal": True},
        {"attn_mask": CAUSAL},
        {"attn_mask": many_masks(), "need_weights": False},
        {"key_padding_mask": padding(), "need_weights": False},
        {"key_padding_mask": padding(), "attn_mask": CAUSAL},
        {"key_padding_mask": padding().double() * -3, "attn_mask": many_masks()},
    ],
)
def test_by_layers_it_gives_the_same(
    options: dict[str, Any], batch_first: bool, given: dict[str, Any]
) -> None:
    module, x = attention(**options), inputs()
    module.batch_first = batch_first
    x = x if batch_first else x.transpose(0, 1).contiguous()
    expected = module(x, x, x, **given)
    attentions = Attentions(module)
    seen: list[int] = []
    attentions.layers[""].register_forward_hook(lambda *_: seen.append(1))
    with attentions.by_layers():
        found = module(x, x, x, **given)
    assert seen == [1]
    torch.testing.assert_close(found, expected)
    assert "forward" not in vars(module)


@pytest.mark.parametrize("case", ["cross", "one sample", "bias_kv", "zero", "subclass", "kdim"])
def test_anything_special_goes_its_own_way(case: str) -> None:
    x = inputs()
    key = inputs(2) if case in ("cross", "kdim") else x
    if case == "one sample":
        x = key = x[0]
    options = {"bias_kv": {"add_bias_kv": True}, "zero": {"add_zero_attn": True}}
    module = attention(**options.get(case, {"kdim": 9, "vdim": 9} if case == "kdim" else {}))
    if case == "kdim":
        key = torch.cat([key, key[..., :1]], -1)
    if case == "subclass":
        module.__class__ = type("Own", (nn.MultiheadAttention,), {})
    expected = module(x, key, key)
    attentions = Attentions(module)
    with attentions.by_layers():
        torch.testing.assert_close(module(x, key, key), expected)
    assert bool(attentions.layers) == (case in ("cross", "one sample"))


class Masked(nn.Module):
    """Layers of torch's transformer with masks; floats go in, so that nothing wants gradients."""

    def __init__(self, batch_first: bool, nested: bool = False) -> None:
        super().__init__()
        self.batch_first, self.nested = batch_first, nested
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, 0.1, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        mask = None if self.nested else CAUSAL
        x = self.encoder(x, mask, pad, is_causal=not self.nested)
        return self.head(x.mean(1 if self.batch_first else 0))


class CrossAttention(nn.Module):
    """An attention whose keys are other tokens than its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = attention(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        return self.head(self.attention(x, x.flip(1), x.flip(1))[0].mean(1))


MODELS: dict[str, Any] = {
    "batch first": lambda: Masked(True),
    "nested": lambda: Masked(True, nested=True),
    "tokens first": lambda: Masked(False),
    "cross": CrossAttention,
}
#: Modules whose parameters take the long way.
SLOW = {"tokens first": {"linear1", "linear2", "norm1", "norm2"}, "cross": {"attention"}}


@pytest.mark.parametrize("name", list(MODELS))
def test_diagonals_and_what_takes_the_long_way(name: str) -> None:
    torch.manual_seed(0)
    model, y = MODELS[name]().double(), torch.randint(3, (SAMPLES,))
    args = (inputs(), padding())
    found = fisher_diagonal(model, [(args, y)], F.cross_entropy)
    right = fisher_diagonal(model, [(args, y)], F.cross_entropy, method="loop")
    assert largest_error(found, right) < 1e-12
    sums = diagonals.SquareSums(model, dict(model.named_parameters()), "auto", 1 << 20)
    with evaluating(model):
        sums.add(Batch(args, {}, y, SAMPLES), lambda _, t: [Pass(F.cross_entropy, t)])
    slow = SLOW.get(name, set())
    expected = {n for n, _ in model.named_parameters() if slow & set(n.split("."))}
    assert set(sums.slow or {}) == expected


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_the_shortcut_of_torch_is_on_afterwards_if_it_was(fails: bool, before: bool) -> None:
    torch.backends.mha.set_fastpath_enabled(before)
    try:
        with contextlib.suppress(KeyError), evaluating(nn.Linear(1, 1)):
            assert not torch.backends.mha.get_fastpath_enabled()
            if fails:
                raise KeyError
        assert torch.backends.mha.get_fastpath_enabled() == before
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_calibration_reads_padded_tokens_as_training_does() -> None:
    model = Masked(True, nested=True)
    args = (inputs().float(), padding())
    data = [(args, torch.zeros(SAMPLES))]
    result = st.prune(model, "wanda", 0.5, calibration=data, match="*linear*")
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    seen: list[Tensor] = []
    layer = model.encoder.layers[1].linear1
    layer.register_forward_hook(lambda _, given, __: seen.append(given[0].detach()))
    for other in model.encoder.layers:
        other.self_attn.dropout = 0.0
    model(*args)
    score = layer.weight.abs() * seen[0].flatten(0, 1).norm(dim=0)
    kept = torch.zeros_like(score).scatter_(1, score.topk(WIDTH // 2, dim=1).indices, 1.0)
    assert result.masks["encoder.layers.1.linear1.weight"].equal(kept.bool())

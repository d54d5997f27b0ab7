"""Distillation in loops: sparse optimizers, mixed precision, compiled and Hugging Face models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from distill_networks import Net, Tokens, everything
from runs import SmallNet, batch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st


@pytest.mark.parametrize("policy", ["static", "rigl", "soft_threshold"])
@pytest.mark.parametrize("storage", ["masked", "csr"])
def test_a_sparse_optimizer_trains_with_it(policy: str, storage: str) -> None:
    options: dict[str, Any] = {"static": {"sparsity": 0.8}}.get(policy, {})
    if policy == "rigl":
        options = {"sparsity": 0.8, "total_steps": 12, "update": {"every": 3}}
    if policy == "soft_threshold":
        if storage == "csr":
            pytest.skip("learned masks are dense")
        options = {"sparsity": 0.8, "total_steps": 12}
    teacher, student = SmallNet(1), SmallNet(2)
    with st.distill(
        student,
        teacher,
        loss_fn=F.cross_entropy,
        hidden={"hidden": "hidden"},
        attention="conv",
        example_inputs=batch(0)[0],
    ) as distillation:
        parameters = [*student.parameters(), *distillation.parameters()]
        optimizer = st.SparseOptimizer(
            torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
            student,
            {"policy": {"kind": policy, **options}},
            storage=storage,
        )
        first = last = math.nan
        for step in range(12):
            x, y = batch(step % 2)
            loss = distillation(student(x), x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            first = loss.item() if step == 0 else first
            last = loss.item()
        assert last < first
        if policy != "soft_threshold":
            assert optimizer.sparsity() == pytest.approx(0.8, abs=1e-3)
        optimizer.finalize()
        assert set(distillation.parts) == {"task", "logits", "hidden", "attention"}


def test_gradients_add_up_over_small_batches() -> None:
    student, teacher = Net((3, 2), 1), Net(seed=2)
    student.eval()
    distillation = everything(student, teacher)
    x, y = batch(0)
    parameters = [*student.parameters(), *distillation.parameters()]

    def gradients(parts: int) -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        for inputs, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (distillation(student(inputs), inputs, labels) / parts).backward()
        return [p.grad for p in parameters]  # type: ignore[misc]

    for one, four in zip(gradients(1), gradients(4), strict=True):
        torch.testing.assert_close(one, four)


@pytest.mark.parametrize("loss_within", [True, False])
def test_mixed_precision(loss_within: bool) -> None:
    student, teacher = Net((3, 2), 1), Net(seed=2)
    distillation = everything(student, teacher)
    x, y = batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = student(x)
        assert outputs.dtype == torch.bfloat16
        loss = distillation(outputs, x, y) if loss_within else None
    if loss is None:
        loss = distillation(outputs, x, y)
    loss.backward()
    assert loss.dtype == torch.float32
    assert {part.dtype for name, part in distillation.parts.items() if name != "task"} == {
        torch.float32
    }
    assert all(p.grad.isfinite().all() for p in distillation.parameters())  # type: ignore[union-attr]
    student, exact = student.eval(), Net(seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        near = distillation(student(x), x, y).item()
    assert near == pytest.approx(everything_again(student, exact, distillation, x, y), rel=0.05)


def everything_again(
    student: nn.Module, teacher: nn.Module, known: st.Distillation, x: Tensor, y: Tensor
) -> float:
    """The same loss without autocast."""
    with everything(student, teacher) as distillation:
        distillation.load_state_dict(known.state_dict())
        return distillation(student(x), x, y).item()


def test_outputs_with_a_loss_of_their_own() -> None:
    student, teacher = Tokens(seed=1), Tokens(seed=2)
    inputs = {"x": torch.randn(3, 6, 5), "labels": torch.randint(7, (3, 6))}
    distillation = st.distill(student, teacher, weight=0.5)
    outputs = student(**inputs)
    loss = distillation(outputs, inputs)
    assert distillation.parts["task"] == outputs.loss
    assert loss.item() == pytest.approx(
        (0.5 * outputs.loss + 0.5 * distillation.parts["logits"]).item(), rel=1e-6
    )
    del inputs["labels"]
    with pytest.raises(ValueError, match="no loss for the task: give loss_fn"):
        distillation(student(**inputs), inputs)


def test_transformers_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    options = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2}
    options |= {"num_attention_heads": 4, "intermediate_size": 20, "num_labels": 3}
    teacher = _bert(transformers, options, 1)
    student = _bert(transformers, options | {"hidden_size": 8, "num_attention_heads": 2}, 2)
    inputs = {
        "input_ids": torch.randint(50, (4, 7)),
        "attention_mask": torch.ones(4, 7, dtype=torch.long),
        "labels": torch.randint(3, (4,)),
        "output_attentions": True,
    }
    inputs["attention_mask"][1, 5:] = 0  # type: ignore[index]
    with st.distill(
        student,
        teacher,
        hidden={"bert.encoder.layer.1": "bert.encoder.layer.1"},
        attention=-1,
        example_inputs=inputs,
    ) as distillation:
        assert [p.shape for p in distillation.parameters()] == [(16, 8), (16,)]
        outputs = student(**inputs)
        loss = distillation(outputs, inputs, mask=inputs["attention_mask"])
        loss.backward()
        assert distillation.parts["task"] == outputs.loss
        assert distillation.parts["attention"] > 0
        del inputs["output_attentions"]
        with pytest.raises(ValueError, match="output_attentions=True"):
            distillation(student(**inputs), inputs)
    assert all(p.grad is None for p in teacher.parameters())


def _bert(transformers: Any, options: dict[str, Any], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.BertConfig(**options, attn_implementation="eager")
    return transformers.BertForSequenceClassification(config)  # type: ignore[no-any-return]


def test_compiled_students() -> None:
    plain, teacher = Net((3, 2), 1).eval(), Net(seed=2)
    x, y = batch(0)
    distillation = everything(plain, teacher)
    expected = distillation(plain(x), x, y)
    compiled = torch.compile(plain, backend="eager")
    torch.testing.assert_close(distillation(compiled(x), x, y), expected)
    torch.testing.assert_close(distillation(compiled(x), x, y), expected)

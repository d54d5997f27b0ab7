"""torch.compile: compiled models and optimizers train alike, and masks cost no recompilation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runs import POLICIES, STEPS, same, weights
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import sparsetrain as st
from sparsetrain.base_state import find_resting
from sparsetrain.master_weights import MasterWeights
from sparsetrain.storage.csr import kernels

pytestmark = [
    # What torch warns of that it does itself on its way.
    pytest.mark.filterwarnings("ignore:.*script_method.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Profiler record function:UserWarning"),
]

ASKED: dict[str, Any] = {"sparsity": 0.7, "total_steps": STEPS, "update": {"every": 3}}
LEARNED: dict[str, st.Policy] = {
    "soft_threshold": st.SoftThreshold(**ASKED),
    "hard_concrete": st.HardConcrete(**ASKED),
    "hard_concrete_examples": st.HardConcrete(strength=1e-3, per="input", sampling="example"),
    "gumbel_softmax": st.GumbelSoftmax(**ASKED),
    "two_of_four": st.GumbelSoftmax(structure="2:4", total_steps=STEPS),
    "variational_dropout": st.VariationalDropout(strength=1e-3, total_steps=STEPS, warm_up=0.2),
    "weight_noise": st.VariationalDropout(strength=1e-3, warm_up=0.0, local=False),
    "movement": st.Movement(**ASKED),
    "soft_movement": st.Movement(**ASKED, mode="threshold", allocation="global"),
}
ALL = POLICIES | LEARNED
OFTEN = (*POLICIES, "soft_threshold", "hard_concrete", "gumbel_softmax", "movement")
#: All policies, of which some are slow to compile and much like others.
EVERY = [p if p in OFTEN else pytest.param(p, marks=pytest.mark.slow) for p in ALL]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4)).to(dtype)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def backward(net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    dtype = optimizer.param_groups[0]["params"][0].dtype
    x = torch.randn(8, 24, generator=generator).to(dtype)
    y = torch.randint(4, (8,), generator=generator)
    torch.manual_seed(step)  # what learned masks draw
    optimizer.zero_grad()
    F.cross_entropy(net(x).float(), y).backward()


def evaluate(net: nn.Module) -> Tensor:
    net.eval()
    with torch.no_grad():
        out: Tensor = net(torch.linspace(-1, 1, 120).view(5, 24))
    net.train()
    return out


def all_masked(optimizer: st.SparseOptimizer) -> bool:
    return all((t.param.detach()[~t.mask] == 0).all() for t in optimizer.targets.values())


# Models.


@pytest.mark.parametrize("policy", EVERY)
def test_a_compiled_model_trains_alike_and_masks_recompile_nothing(policy: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model, plain = network(), network()
    compiled = torch.compile(model, backend=counter)
    optimizer = st.SparseOptimizer(momentum(model), compiled, ALL[policy])
    other = st.SparseOptimizer(momentum(plain), plain, ALL[policy])
    compilations = []
    changed = set()
    for step in range(STEPS):
        masks = optimizer.masks()
        for net, chosen in ((compiled, optimizer), (plain, other)):
            backward(net, chosen, step)
            chosen.step()
        if step in (0, 6):
            torch.testing.assert_close(evaluate(compiled), evaluate(plain), rtol=1e-3, atol=1e-4)
        if step == 8:
            optimizer.update_masks()
            other.update_masks()
        changed |= {n for n, m in optimizer.masks().items() if not torch.equal(m, masks[n])}
        compilations.append(counter.frame_count)
    assert compilations == [compilations[0]] * STEPS
    assert compilations[0] == 2  # with and without gradients
    assert bool(changed) == (policy not in ("static", "hard_concrete_examples"))
    if policy in ("variational_dropout", "weight_noise"):  # in eager mode numba computes them
        torch.testing.assert_close(weights(model), weights(plain), rtol=1e-3, atol=1e-4)
    else:
        assert same(weights(model), weights(plain))
        assert same(optimizer.masks(), other.masks())


@pytest.mark.parametrize("policy", ["nm_sparse", "hard_concrete_examples"])
def test_a_model_that_was_compiled_before_and_runs_after(policy: str) -> None:
    """Parametrizations and hooks come and go between runs of one compiled model."""
    model, plain = network(), network()
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(evaluate(compiled), evaluate(plain))
    optimizers = [
        st.SparseOptimizer(momentum(model), compiled, ALL[policy]),
        st.SparseOptimizer(momentum(plain), plain, ALL[policy]),
    ]
    for step in range(4):
        for net, optimizer in zip((compiled, plain), optimizers, strict=True):
            backward(net, optimizer, step)
            optimizer.step()
    for optimizer in optimizers:
        optimizer.finalize()
    assert same(weights(model), weights(plain))
    assert torch.equal(evaluate(compiled), evaluate(plain))
    base = momentum(model)
    backward(compiled, base, 4)
    backward(plain, momentum(plain), 4)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)


# Dynamo looks at what comes out of a layer that it leaves alone.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("policy", ["rigl", "snfs"])
def test_changes_of_csr_patterns_recompile_nothing(policy: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model, plain = network(), network()
    compiled = torch.compile(model, backend=counter)
    sparser = ALL[policy].with_sparsity(0.9)
    with kernels.using("torch"):
        optimizer = st.SparseOptimizer(momentum(model), compiled, sparser, storage="csr")
        other = st.SparseOptimizer(momentum(plain), plain, sparser, storage="csr")
        assert optimizer.targets["0.weight"].storage == "csr"
        compilations = []
        for step in range(STEPS):
            for net, chosen in ((compiled, optimizer), (plain, other)):
                backward(net, chosen, step)
                chosen.step()
            compilations.append(counter.frame_count)
    assert compilations == [compilations[0]] * STEPS
    assert same(weights(model), weights(plain))


def has_a_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


@pytest.mark.slow
@pytest.mark.skipif(not has_a_compiler(), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("policy", ["rigl", "nm_sparse", "hard_concrete", "variational_dropout"])
def test_inductor(policy: str) -> None:
    """Its generated code sums in another order and draws other noise."""
    counter = CompileCounterWithBackend("inductor")
    model, plain = network(), network()
    compiled = torch.compile(model, backend=counter)
    optimizer = st.SparseOptimizer(momentum(model), compiled, ALL[policy])
    other = st.SparseOptimizer(momentum(plain), plain, ALL[policy])
    optimizer.base.step = torch.compile(optimizer.base.step)  # type: ignore[method-assign]
    for step in range(STEPS):
        for net, chosen in ((compiled, optimizer), (plain, other)):
            backward(net, chosen, step)
            chosen.step()
    assert counter.frame_count == 1
    assert optimizer.step_count == STEPS
    close = 0.1 if policy == "variational_dropout" else 0.02
    assert optimizer.sparsity() == pytest.approx(other.sparsity(), abs=close)
    if policy in POLICIES:
        assert all_masked(optimizer)
        assert same(optimizer.masks(), other.masks())
        torch.testing.assert_close(weights(model), weights(plain), rtol=1e-4, atol=1e-5)


# Optimizers.


def run_compiled(
    how: str,
    policy: str,
    make: Callable[[nn.Module], Any] = momentum,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Sequential, st.SparseOptimizer, list[int]]:
    """Train with an optimizer that is compiled in one of the ways people do it.

    The arithmetic is traced and left to eager kernels.
    """
    counter = CompileCounterWithBackend("eager")

    def compiler(function: Any) -> Any:
        return torch.compile(function, backend=counter)

    model = network(dtype)
    base = make(model)
    if how == "base before wrapping":
        base.step = compiler(base.step)
    optimizer = st.SparseOptimizer(base, model, ALL[policy])
    step_of: Any = optimizer.step
    if how == "base after wrapping":
        base.step = compiler(base.step)
    elif how == "step":
        step_of = compiler(optimizer.step)
    elif how == "function":
        step_of = compiler(lambda: optimizer.step())
    compilations = []
    for step in range(STEPS):
        backward(model, optimizer, step)
        step_of()
        compilations.append(counter.frame_count)
        assert policy in LEARNED or all_masked(optimizer)
    return model, optimizer, compilations


WAYS = ("base before wrapping", "base after wrapping", "step", "function")
TRIED = [(WAYS[0], p) for p in OFTEN]
TRIED += [(how, p) for how in WAYS[1:] for p in ("rigl", "nm_sparse")]


@pytest.mark.parametrize("how, policy", TRIED)
def test_a_compiled_optimizer_steps_alike(how: str, policy: str) -> None:
    """Its arithmetic is compiled, at most twice: the first step makes the state."""
    model, optimizer, compilations = run_compiled(how, policy)
    plain, other, _ = run_compiled("not", policy)
    assert optimizer.step_count == STEPS
    assert 1 <= compilations[2] <= 2
    assert compilations[2:] == [compilations[2]] * (STEPS - 2)
    assert same(weights(model), weights(plain))
    assert same(optimizer.masks(), other.masks())
    with pytest.raises(RuntimeError, match=r"step\(\) of the SparseOptimizer"):
        optimizer.base.step()


@pytest.mark.parametrize("how", [WAYS[0], "function"])
@pytest.mark.parametrize("policy", ["rigl"])
def test_masters_under_a_compiled_optimizer(how: str, policy: str) -> None:
    def make(model: nn.Module) -> MasterWeights:
        return MasterWeights(momentum(model))

    model, optimizer, compilations = run_compiled(how, policy, make, torch.bfloat16)
    plain, _, _ = run_compiled("not", policy, make, torch.bfloat16)
    assert 1 <= compilations[2] <= 2
    assert compilations[2:] == [compilations[2]] * (STEPS - 2)
    assert same(weights(model), weights(plain))
    assert "master" in optimizer.base.state[next(iter(optimizer.targets.values())).param]


@pytest.mark.parametrize("policy", ["set", pytest.param("hard_concrete", marks=pytest.mark.slow)])
def test_a_learning_rate_in_a_tensor_can_change_without_recompiling(policy: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    models, rates = [], []
    for compiles in (True, False):
        model = network()
        base = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.01), momentum=0.9)
        if compiles:
            base.step = torch.compile(base.step, backend=counter)  # type: ignore[method-assign]
        optimizer = st.SparseOptimizer(base, model, ALL[policy])
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        compilations = []
        for step in range(STEPS):
            backward(model, optimizer, step)
            optimizer.step()
            scheduler.step()
            compilations.append(counter.frame_count)
        assert compilations[2:] == [compilations[2]] * (STEPS - 2)
        models.append(weights(model))
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
    assert rates[0] == rates[1] and rates[0][0] == pytest.approx(0.01 * 0.9**STEPS)
    torch.testing.assert_close(*models, rtol=1e-4, atol=1e-5)


def test_an_optimizer_that_is_compiled_is_tried_out_as_it_is() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    found = []
    for compiles in (False, True):
        param = nn.Parameter(torch.ones(4, 5))
        base = torch.optim.RMSprop([param], lr=0.01, momentum=0.9)
        if compiles:
            base.step = torch.compile(base.step, backend=counter)  # type: ignore[method-assign]
        found.append(find_resting(base, base.param_groups[0], param))
    assert found[0] == found[1] and found[0].keeps_zeros
    assert not counter.frame_count


def test_hooks_of_users_run_around_a_compiled_step() -> None:
    model = network()
    base = momentum(model)
    base.step = torch.compile(base.step, backend="eager")  # type: ignore[method-assign]
    optimizer = st.SparseOptimizer(base, model, POLICIES["set"])
    masked: list[bool] = []
    steps: list[int] = []
    optimizer.register_step_post_hook(lambda *a: masked.append(all_masked(optimizer)))
    optimizer.register_update_hook(lambda event: steps.append(event.step))
    for step in range(STEPS):
        backward(model, optimizer, step)
        optimizer.step()
    assert masked == [True] * STEPS
    assert steps == [0, 3, 6, 9, 12]


def test_a_compiled_step_is_not_to_be_called_by_itself() -> None:
    model = network()
    base = momentum(model)
    base.step = torch.compile(base.step, backend="eager")  # type: ignore[method-assign]
    optimizer = st.SparseOptimizer(base, model, POLICIES["static"])
    backward(model, optimizer, 0)
    with pytest.raises(RuntimeError, match=r"step\(\) of the SparseOptimizer"):
        base.step()


def test_a_gradient_scaler_with_a_compiled_model_and_optimizer() -> None:
    found = []
    for backend in ("aot_eager", None):
        model = network()
        net = torch.compile(model, backend=backend) if backend else model
        base = momentum(model)
        if backend:
            base.step = torch.compile(base.step, backend=backend)  # type: ignore[method-assign]
        optimizer = st.SparseOptimizer(base, net, POLICIES["rigl"])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
        for step in range(STEPS):
            optimizer.zero_grad()
            x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step))
            with torch.autocast("cpu", torch.bfloat16):
                loss = net(x).square().mean()
            scaler.scale(loss * torch.inf if step == 4 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.step_count == STEPS - 1
        found.append(weights(model))
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-3)

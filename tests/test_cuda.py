"""The core on CUDA, each test also on the CPU and on a device that is only pretended.

A pretended tensor lies on the CPU, says that it is on cuda:0, and refuses to be mixed with tensors
that do not. So code that would fail on a card for want of a `.to(device)` fails without one too,
and so does code that makes the CPU wait for the card where it must not.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from runs import POLICIES, STEPS, SmallNet, batch, same, shaped_state
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import sparsetrain as st
from sparsetrain.selection import (
    bottom_k_indices,
    extreme_indices,
    n_m_mask,
    select,
    top_k,
    top_k_across,
    top_k_indices,
)
from sparsetrain.sharded_selection import radix_threshold, top_k_shards
from sparsetrain.structures import parse_structure

# The pretended device.

THERE = torch.device("cuda", 0)
#: Methods for which the CPU waits for the card.
WAITS = {"item", "nonzero", "__bool__", "__int__", "__float__", "tolist", "cpu", "equal", "unique"}
#: Methods that may take tensors of two devices.
CROSSES = {"to", "copy_", "__get__", "__set__", "__setitem__", "__getitem__", "type_as"}


class Pretended(Tensor):
    """A CPU tensor that says it is elsewhere."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func.__name__
        if name == "__get__" and (owner := func.__self__.__name__) in ("device", "is_cpu"):
            return THERE if owner == "device" else False
        if name in ("numpy", "__array__", "__dlpack__"):
            raise TypeError(f"{name} of a tensor on {THERE}")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        near = [t for t in tensors if not isinstance(t, Pretended) and t.dim() > 0]
        if near and name not in CROSSES:
            raise RuntimeError(f"{name}: some tensors are on {THERE} and some on the CPU")
        _note_waiting(name, args)
        if name == "to":
            return _moved(func, args, kwargs)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]) == THERE:
            kwargs["device"] = "cpu"
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        if name == "cpu":
            return home(found)
        is_written_to = name in ("__set__", "__setitem__") or (tensors and found is args[0])
        return found if is_written_to else tree_map(there, found)


class PretendedParameter(Pretended, nn.Parameter):
    """What a parameter becomes that is moved: it stays the same object."""


class Factories(TorchFunctionMode):
    """Makes what is asked for on the pretended device, and moves there by `to`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") == "to" and isinstance(args[0], Tensor):
            return _moved(func, args, kwargs)
        device = kwargs.get("device")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if device is None or torch.device(device) != THERE or tensors:
            return func(*args, **kwargs)
        return there(func(*args, **kwargs | {"device": "cpu"}))


waited: list[str] = []


def _note_waiting(name: str, args: Any) -> None:
    if name in WAITS:
        waited.append(name)
    places = tree_leaves(args[1]) if name in ("__getitem__", "__setitem__") else []
    if any(isinstance(place, Tensor) and place.dtype == torch.bool for place in places):
        waited.append("index by bools")


def _moved(func: Any, args: Any, kwargs: Any) -> Tensor:
    """What `to` gives, a copy if that is on the other device."""
    tensor, before = args[0], args[0].device
    device = before
    for value in (*args[1:], *kwargs.values()):
        if isinstance(value, Tensor):
            device = value.device
        elif isinstance(value, torch.device | str):
            device = torch.device(value)
    rest = [_without_device(value) for value in args[1:]]
    options = {key: _without_device(value) for key, value in kwargs.items()}
    with torch._C.DisableTorchFunctionSubclass():
        found: Tensor = func(tensor, *rest, **options)
        if device != before and found is tensor:
            found = found.clone()
    return home(found) if device.type == "cpu" else there(found)


def _without_device(value: Any) -> Any:
    return "cpu" if isinstance(value, torch.device | str) else home(value)


def there(value: Any) -> Any:
    is_here = isinstance(value, Tensor) and not isinstance(value, Pretended)
    return value.as_subclass(Pretended) if is_here else value


def home(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, Pretended) else value


def _move_in_pretence(model: nn.Module) -> None:
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.__class__ = PretendedParameter
        for name, buffer in module._buffers.items():
            module._buffers[name] = there(buffer)


class Place:
    """A device to run on."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def device(self) -> torch.device:
        return THERE if self.name == "pretended" else torch.device(self.name)

    def move(self, model: nn.Module) -> None:
        if self.name == "pretended":
            _move_in_pretence(model)
        else:
            model.to(self.name)

    def put(self, tensor: Tensor) -> Tensor:
        return there(tensor) if self.name == "pretended" else tensor.to(self.name)

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """An error where the CPU waits for the card."""
        if self.name == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        waited.clear()
        try:
            yield
            assert not waited
        finally:
            if self.name == "cuda":
                torch.cuda.set_sync_debug_mode("default")


on_cuda = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA card"),
)
EVERYWHERE = ("cpu", "pretended", on_cuda)
AWAY = ("pretended", on_cuda)
REAL = ("cpu", on_cuda)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """The device; on CUDA with the same results at every call."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    with Factories() if request.param == "pretended" else nullcontext():
        yield Place(request.param)
    torch.backends.cudnn.deterministic = before


everywhere = pytest.mark.parametrize("place", EVERYWHERE, indirect=True)
away = pytest.mark.parametrize("place", AWAY, indirect=True)
real = pytest.mark.parametrize("place", REAL, indirect=True)

# Policies and a loop.

_ASKED: dict[str, Any] = {"sparsity": 0.7, "total_steps": STEPS, "update": {"every": 3}}
LEARNED: dict[str, st.Policy] = {
    "soft_threshold": st.SoftThreshold(**_ASKED),
    "hard_concrete": st.HardConcrete(**_ASKED, exact=True),
    "gumbel_softmax": st.GumbelSoftmax(**_ASKED, exact=True),
    "variational_dropout": st.VariationalDropout(**_ASKED, exact=True),
    "movement": st.Movement(**_ASKED),
    "soft_movement": st.Movement(**_ASKED, mode="threshold", allocation="global"),
    "two_of_four": st.GumbelSoftmax(structure="2:4", total_steps=STEPS),
}
STRUCTURED: dict[str, st.Policy] = {
    "set_constant_fan_in": st.SET(**_ASKED, structure="constant_fan_in"),
    "set_by_sign": st.SET(**_ASKED, drop="magnitude_by_sign", grow_std=0.1),
    "gradual_global": st.Gradual(**_ASKED, allocation="global", score="movement"),
    "surgery_by_threshold": st.DynamicNetworkSurgery(c_rate=0.5, total_steps=STEPS),
}
ALL = POLICIES | STRUCTURED | LEARNED
#: Their noise is drawn on the device, whose random numbers are others.
NOISY = {"hard_concrete", "gumbel_softmax", "variational_dropout", "two_of_four"}
MakeBase = Callable[[Any], torch.optim.Optimizer]


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def begin(
    policy: st.Policy, place: Place, make: MakeBase = momentum, *, late: bool = False
) -> tuple[SmallNet, st.SparseOptimizer]:
    """A network in float64 and its optimizer; moved after the wrapping when that is `late`."""
    model = SmallNet().double()
    if not late:
        place.move(model)
    optimizer = st.SparseOptimizer(make(model.parameters()), model, policy, seed=3)
    if late:
        place.move(model)
    return model, optimizer


def loss_of(model: nn.Module, place: Place, step: int) -> Tensor:
    x, y = batch(step)
    torch.manual_seed(step)  # what learned masks draw
    return F.cross_entropy(model(place.put(x.double())), place.put(y))


def train(model: nn.Module, optimizer: Any, place: Place, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, place, step).backward()
        optimizer.step()


def assert_exact(optimizer: st.SparseOptimizer, place: Place) -> None:
    """Masks are where the weights are; inactive weights and their state are exactly 0."""
    for target in optimizer.targets.values():
        mask = target.mask
        assert mask.device == target.param.device
        assert mask.device.type == place.device.type
        if target.storage == "masked":
            assert (target.param.detach()[~mask] == 0).all()
            if not isinstance(target, st.storage.latent.LatentTarget):
                state = shaped_state(optimizer, target.param)
                assert all((value[~mask] == 0).all() for value in state.values())


def on_the_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: home(tensor.detach()).cpu() for name, tensor in tensors.items()}


# Training.


@away
@pytest.mark.parametrize("policy", ALL)
def test_training_is_that_of_the_cpu(policy: str, place: Place) -> None:
    found = []
    for where in (place, Place("cpu")):
        model, optimizer = begin(ALL[policy], where)
        train(model, optimizer, where, 0, STEPS)
        assert optimizer.step_count == STEPS
        active = {name: target.active for name, target in optimizer.targets.items()}
        masks = on_the_cpu(optimizer.masks())
        optimizer.finalize()
        found.append((active, masks, on_the_cpu(dict(model.named_parameters()))))
    (active, masks, weights), (active_there, masks_there, weights_there) = found
    assert sum(active.values()) == sum(active_there.values())
    if policy in NOISY and place.name == "cuda":
        return
    assert active == active_there
    assert same(masks, masks_there)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, weights_there[name])


@everywhere
@pytest.mark.parametrize("policy", ALL)
def test_zeros_are_exact_after_each_step(policy: str, place: Place) -> None:
    model, optimizer = begin(ALL[policy], place)
    for step in range(4):
        train(model, optimizer, place, step, step + 1)
        assert_exact(optimizer, place)


@real
@pytest.mark.parametrize("policy", ALL)
def test_a_resumed_run_is_the_uninterrupted_one(policy: str, place: Place) -> None:
    model, optimizer = begin(ALL[policy], place)
    optimizer.register_update_hook(lambda event: None)  # so that explored weights are saved too
    train(model, optimizer, place, 0, 7)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, place, 7, STEPS)
    for location in {"cpu", place.device.type}:
        file.seek(0)
        of_model, of_optimizer = torch.load(file, map_location=location, weights_only=True)
        other_model, other = begin(ALL[policy], place)
        other_model.load_state_dict(of_model)
        other.load_state_dict(of_optimizer)
        train(other_model, other, place, 7, STEPS)
        assert same(other_model.state_dict(), model.state_dict())
        assert same(other.masks(), optimizer.masks())


@away
def test_a_checkpoint_may_be_loaded_to_the_card_with_all_it_holds(place: Place) -> None:
    model, optimizer = begin(POLICIES["set"], place)
    optimizer.register_update_hook(lambda event: None)
    train(model, optimizer, place, 0, 4)
    saved = optimizer.state_dict()
    tracked = saved["sparsetrain"]["tracker"]
    tracked["explored"] = {name: place.put(bits) for name, bits in tracked["explored"].items()}
    optimizer.load_state_dict(saved)
    train(model, optimizer, place, 4, STEPS)


@real
@pytest.mark.parametrize("policy", ["set", "rigl", "gradual", "nm_sparse", "movement"])
@pytest.mark.parametrize("kind", ["fused", "foreach", "capturable"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_other_ways_to_step_train_alike(name: str, kind: str, policy: str, place: Place) -> None:
    if kind == "capturable" and (name == "SGD" or place.name == "cpu"):
        pytest.skip("capturable is AdamW's, on CUDA")
    kinds: dict[str, Any] = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}
    options = {"SGD": {"lr": 0.05, "momentum": 0.9}, "AdamW": {"lr": 0.01}}[name]
    found = []
    for flags in ({kind: True}, {"foreach": False}):
        model, optimizer = begin(
            ALL[policy], place, lambda p, f=flags: kinds[name](p, **options, **f)
        )
        for step in range(5):
            train(model, optimizer, place, step, step + 1)
            assert_exact(optimizer, place)
        found.append((optimizer.masks(), dict(model.named_parameters())))
    assert same(found[0][0], found[1][0])
    for weight, other in zip(found[0][1].values(), found[1][1].values(), strict=True):
        torch.testing.assert_close(weight, other)


@real
@pytest.mark.parametrize("policy", ALL)
def test_steps_that_a_scaler_skips_have_never_been(policy: str, place: Place) -> None:
    found = []
    for skip in (True, False):
        model, optimizer = begin(
            ALL[policy],
            place,
            lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        )
        for module in model.modules():  # those would see skipped steps
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = False
                module.running_mean = module.running_var = None
        scaler = torch.amp.GradScaler(place.name, init_scale=2.0**10, growth_interval=1000)
        for step in range(4):
            for infinite in (True, False) if skip and step in (1, 3) else (False,):
                optimizer.zero_grad()
                loss = loss_of(model, place, step)
                scaler.scale(loss * torch.inf if infinite else loss).backward()
                scaler.step(optimizer)
                scaler.update(2.0**10)
        assert optimizer.step_count == 4
        found.append((optimizer.masks(), dict(model.named_parameters())))
    assert same(found[0][0], found[1][0])
    assert same(found[0][1], found[1][1])


# Moving the model after it was wrapped.


def _clip(model: nn.Module, optimizer: st.SparseOptimizer, place: Place) -> None:
    loss_of(model, place, 0).backward()
    optimizer.mask_gradients()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def _load(model: nn.Module, optimizer: st.SparseOptimizer, place: Place) -> None:
    optimizer.load_state_dict(copy.copy(optimizer.state_dict()))


def _force(model: nn.Module, optimizer: st.SparseOptimizer, place: Place) -> None:
    loss_of(model, place, 0).backward()
    optimizer.update_masks()


def _closure(model: nn.Module, optimizer: st.SparseOptimizer, place: Place) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, place, 0)
        loss.backward()
        return loss

    optimizer.step(closure)


FIRST: dict[str, Callable[[Any, Any, Place], None]] = {
    "step": lambda model, optimizer, place: None,
    "clip": _clip,
    "load": _load,
    "force": _force,
    "closure": _closure,
    "apply": lambda model, optimizer, place: optimizer.apply_masks(),
}


@away
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("policy", ["static", "rigl", "nm_sparse", "soft_threshold", "movement"])
def test_a_model_may_be_moved_after_it_was_wrapped(policy: str, first: str, place: Place) -> None:
    found = []
    for where in (place, Place("cpu")):
        model, optimizer = begin(ALL[policy], where, late=True)
        FIRST[first](model, optimizer, where)
        train(model, optimizer, where, 1, 6)
        assert_exact(optimizer, where)
        found.append(on_the_cpu(optimizer.masks()))
    assert same(*found)


# Waiting for the card.


@away
@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(
            name,
            marks=pytest.mark.xfail(
                name == "soft_threshold", reason="it reads sums over its thresholds at every step"
            ),
        )
        for name in ALL
    ],
)
def test_an_ordinary_step_does_not_wait_for_the_card(policy: str, place: Place) -> None:
    chosen = ALL[policy]
    if policy in ("dynamic_network_surgery", "nm_sparse", "surgery_by_threshold"):
        chosen = chosen.model_copy(update={"update": st.UpdateSchedule(every=3)})
    model, optimizer = begin(chosen, place)
    data = [tuple(place.put(tensor) for tensor in batch(step)) for step in range(STEPS)]
    for step, (x, y) in enumerate(data):
        due = chosen.update_is_due(step)
        with nullcontext() if due or step < 4 else place.no_waiting():
            optimizer.zero_grad()
            F.cross_entropy(model(x.double()), y).backward()
            optimizer.step()


# Selection.

_SELECTIONS: dict[str, Callable[[Tensor], Any]] = {
    "top_k": lambda s: top_k(s, 300),
    "none": lambda s: top_k(s, 0),
    "all": lambda s: top_k(s, s.numel()),
    "top_k_indices": lambda s: top_k_indices(s, 300),
    "bottom_k_indices": lambda s: bottom_k_indices(s, 300),
    "least_among": lambda s: extreme_indices(s, s > 0, 50, among=True, largest=False),
    "largest_not_among": lambda s: extreme_indices(s, s > 0, 50, among=False, largest=True),
    "across": lambda s: top_k_across({"a": s[:8], "b": s[8:] * 0.1}, 320, minimum=40),
    "two_of_four": lambda s: n_m_mask(s, 2, 4),
    "three_of_sixteen": lambda s: n_m_mask(s, 3, 16),
    "block": lambda s: select(s, 320, parse_structure({"kind": "block", "size": (4, 2)})),
    "constant_fan_in": lambda s: select(s, 320, parse_structure("constant_fan_in")),
    "shards": lambda s: top_k_shards([s[:5], s[5:]], 300),
    "threshold": lambda s: torch.tensor(radix_threshold([s[:5], s[5:]], 300)),
}


@away
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("selection", _SELECTIONS)
def test_selection_is_that_of_the_cpu(selection: str, dtype: str, place: Place) -> None:
    """Rounded, so that most scores have equals."""
    generator = torch.Generator().manual_seed(5)
    scores = (torch.randn(16, 64, generator=generator) * 8).round() / 8
    scores = scores.to(getattr(torch, dtype))
    here = _SELECTIONS[selection](scores)
    found = _SELECTIONS[selection](place.put(scores))
    for mine, other in zip(tree_leaves(here), tree_leaves(found), strict=True):
        if selection != "threshold":
            assert other.device.type == place.device.type
        assert torch.equal(mine, home(other).cpu())


@real
@pytest.mark.parametrize("policy", ["static", "set", "rigl", "hard_concrete"])
def test_random_choices_do_not_depend_on_the_default_device(policy: str, place: Place) -> None:
    if place.name == "cuda":
        pytest.xfail("random numbers of a CPU generator are asked for on the default device")
    model, optimizer = begin(ALL[policy], place)
    train(model, optimizer, place, 0, 7)
    torch.set_default_device(place.device)
    try:
        other_model, other = begin(ALL[policy], place)
        train(other_model, other, place, 0, 7)
    finally:
        torch.set_default_device(None)
    assert same(optimizer.masks(), other.masks())

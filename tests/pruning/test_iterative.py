"""Pruning over training runs: what is rewound, what is kept on disk, exact counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from runs import SmallNet, batch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st

STEPS = 9
Run = st.TrainingRun


class Dropped(nn.Module):
    """Batch normalisation and dropout: buffers and random numbers matter."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet()
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.dropout(x))


class Training:
    """A training function that remembers how its runs began."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] | None = None) -> None:
        self.make = optimizer or (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
        self.order = torch.Generator().manual_seed(5)
        self.begins: list[tuple[Run, dict[str, Tensor], int, float]] = []
        self.fails_in: str | None = None

    def __call__(self, run: Run) -> dict[str, float]:
        label = f"{run.number}{run.control or ''}"
        if label == self.fails_in:
            raise KeyboardInterrupt
        optimizer = run.hold(self.make(run.model.parameters()))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        run.model.train()
        loss = torch.zeros(())
        for step in run.steps(STEPS, optimizer, scheduler, self.order):
            if step == run.first_step:
                weights = {k: v.clone() for k, v in run.model.state_dict().items()}
                self.begins.append((run, weights, step, optimizer.param_groups[0]["lr"]))
            x, y = batch(int(torch.randint(50, (), generator=self.order)))
            loss = F.cross_entropy(run.model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        optimizer.finalize()
        return {"loss": float(loss.detach())}


def fresh(seed: int = 3) -> Dropped:
    torch.manual_seed(seed)
    return Dropped()


def same_state(a: nn.Module, b: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.state_dict().items())


OPTIMIZERS: list[Callable[..., torch.optim.Optimizer]] = [
    lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    lambda p: torch.optim.AdamW(p, lr=0.01),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("rewind_to", [0, 1, 4, STEPS])
def test_a_rewound_run_without_pruning_is_the_first_run_again(make: Any, rewind_to: int) -> None:
    ends = []

    class Remembering(Training):
        def __call__(self, run: Run) -> dict[str, float]:
            metrics = super().__call__(run)
            ends.append({k: v.clone() for k, v in run.model.state_dict().items()})
            return metrics

    result = st.prune_iteratively(
        Remembering(make), fresh(), rounds=2, rate=1e-9, rewind_to=rewind_to
    )
    assert [done.sparsity for done in result.rounds] == [0.0, 0.0, 0.0]
    for end in ends[1:]:
        assert all(torch.equal(value, ends[0][name]) for name, value in end.items())
    if rewind_to < STEPS:
        assert len({done.metrics["loss"] for done in result.rounds}) == 1


def test_without_rewinding_training_goes_on_from_the_trained_weights() -> None:
    training, model = Training(), fresh()
    result = st.prune_iteratively(training, model, rounds=1, rate=0.5)
    (_, _, _, first_rate), (run, begun, step, second_rate) = training.begins
    assert (step, first_rate, second_rate) == (0, 0.05, 0.05)
    # What the second run began with is what the first has left, but for the zeros.
    twin = fresh()
    st.prune_iteratively(Training(), twin, rounds=1, rate=1e-9, rewind_to=STEPS)
    for name, mask in run.masks.items():
        weight = twin.get_parameter(name)
        assert torch.equal(begun[name], torch.where(mask, weight, 0.0))
        assert weight[~mask].abs().max() <= weight[mask].abs().min()
    assert result.last.sparsity == result.rounds[1].sparsity == 0.5


@pytest.mark.parametrize("rewind_to", [0, 4])
def test_rounds_are_those_of_a_hand_written_loop(rewind_to: int) -> None:
    training, model = Training(), fresh()
    result = st.prune_iteratively(training, model, rounds=3, rate=0.4, rewind_to=rewind_to)

    # By hand: masks multiply weights after each step, momentum where pruned is 0.
    twin, order = fresh(), torch.Generator().manual_seed(5)
    weights = {n: p for n, p in twin.named_parameters() if p.dim() > 1}
    masks = {n: torch.ones_like(p) for n, p in weights.items()}
    kept: dict[str, Any] = {}
    for number in range(4):
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        first = 0
        if number:
            first = rewind_to
            twin.load_state_dict(kept["model"])
            optimizer.load_state_dict(_deep(kept["optimizer"]))
            scheduler.load_state_dict(kept["scheduler"])
            torch.set_rng_state(kept["random"])
            order.set_state(kept["order"])
            for name, weight in weights.items():
                weight.data.mul_(masks[name])
                state = optimizer.state[weight]
                if state.get("momentum_buffer") is not None:
                    state["momentum_buffer"].mul_(masks[name])
        twin.train()
        for step in range(first, STEPS):
            if number == 0 and step == rewind_to:
                kept = {
                    "model": {k: v.clone() for k, v in twin.state_dict().items()},
                    "optimizer": _deep(optimizer.state_dict()),
                    "scheduler": dict(scheduler.state_dict()),
                    "random": torch.get_rng_state(),
                    "order": order.get_state(),
                }
            x, y = batch(int(torch.randint(50, (), generator=order)))
            optimizer.zero_grad()
            F.cross_entropy(twin(x), y).backward()
            for name, weight in weights.items():
                weight.grad.mul_(masks[name])  # type: ignore[union-attr]
            optimizer.step()
            scheduler.step()
        if number < 3:
            for name, weight in weights.items():
                count = round(0.6 ** (number + 1) * weight.numel())
                order_of = weight.detach().abs().flatten().sort(descending=True).indices
                chosen = torch.zeros(weight.numel())
                chosen[order_of[: result.rounds[number + 1].masks[name].sum()]] = 1
                assert abs(int(chosen.sum()) - count) <= len(weights)
                masks[name] = chosen.view_as(weight)
    for name, mask in masks.items():
        assert torch.equal(result.last.masks[name], mask.bool())
    assert same_state(model, twin.state_dict())


def _deep(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _deep(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_deep(value) for value in state]
    return state.clone() if isinstance(state, Tensor) else state


@settings(max_examples=15)
@given(rate=some.floats(0.05, 0.7), rounds=some.integers(1, 4), seed=some.integers(0, 20))
def test_counts_are_exact_and_masks_shrink(rate: float, rounds: int, seed: int) -> None:
    def untrained(run: Run) -> None:
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.add_(torch.randn_like(parameter))
        run.hold(torch.optim.SGD(run.model.parameters(), lr=0.1)).finalize()

    result = st.prune_iteratively(untrained, SmallNet(seed), rounds=rounds, rate=rate)
    total = sum(mask.numel() for mask in result.last.masks.values())
    for done in result.rounds:
        kept = sum(int(mask.sum()) for mask in done.masks.values())
        assert kept == round((1 - (1 - (1 - rate) ** done.number)) * total)
    for before, after in zip(result.rounds[:-1], result.rounds[1:], strict=True):
        assert not any((after.masks[n] & ~mask).any() for n, mask in before.masks.items())


def test_a_rate_for_each_layer() -> None:
    rate = {"net.head.*": 0.1, "*": 0.2}
    result = st.prune_iteratively(Training(), fresh(), rounds=2, rate=rate, rewind_to=0)
    masks = result.last.masks
    assert int(masks["net.head.weight"].sum()) == round(0.9**2 * 48)
    assert int(masks["net.hidden.weight"].sum()) == round(0.8**2 * 512)


def test_controls_have_the_same_counts() -> None:
    training = Training()
    start = {k: v.clone() for k, v in fresh().state_dict().items()}
    result = st.prune_iteratively(
        training, fresh(), rounds=2, rate=0.5, rewind_to=4, controls=["fresh", "random"]
    )
    order = [(done.number, done.control) for done in result.rounds]
    runs = [(n, c) for n in (1, 2) for c in (None, "fresh", "random")]
    assert order == [(0, None), *runs]
    for number in (1, 2):
        ticket, anew, shuffled = (
            next(d for d in result.of(c) if d.number == number) for c in (None, "fresh", "random")
        )
        for name, mask in ticket.masks.items():
            assert torch.equal(anew.masks[name], mask)
            assert int(shuffled.masks[name].sum()) == int(mask.sum())
            assert not torch.equal(shuffled.masks[name], mask)
    begun = {(run.number, run.control): (w, s) for run, w, s, _ in training.begins}
    name = "net.hidden.weight"
    ticket_w, step = begun[1, None]
    random_w, random_step = begun[1, "random"]
    fresh_w, fresh_step = begun[1, "fresh"]
    assert (step, random_step, fresh_step) == (4, 4, 0)
    both = result.of(None)[1].masks[name] & result.of("random")[0].masks[name]
    assert torch.equal(ticket_w[name][both], random_w[name][both])
    mask = result.of(None)[1].masks[name]
    assert not fresh_w[name][~mask].any()
    assert (fresh_w[name][mask] != start[name][mask]).all()
    assert (fresh_w["net.norm.running_var"] == 1).all()
    # Every round has fresh weights of its own.
    again = begun[2, "fresh"][0][name]
    assert not torch.equal(again[again != 0], fresh_w[name][again != 0])


@pytest.mark.parametrize("fails_in", ["0", "1", "1fresh", "2random"])
@pytest.mark.parametrize("rewind_to", [None, 0, 4])
def test_the_same_call_goes_on(fails_in: str, rewind_to: int | None, tmp_path: Path) -> None:
    controls: Any = [] if rewind_to is None else ["fresh", "random"]
    if rewind_to is None and len(fails_in) > 1:
        fails_in = fails_in[0]
    options: dict[str, Any] = {"rounds": 2, "rate": 0.5, "rewind_to": rewind_to}
    options |= {"controls": controls, "folder": tmp_path}
    whole_model = fresh()
    whole = st.prune_iteratively(Training(), whole_model, **options | {"folder": None})

    broken = Training()
    broken.fails_in = fails_in
    with pytest.raises(KeyboardInterrupt):
        st.prune_iteratively(broken, fresh(), **options)
    rest, model = Training(), fresh()
    rest.order.set_state(broken.order.get_state())  # the user's own generator, without rewinding
    torch.manual_seed(99)
    if fails_in == "0":
        torch.manual_seed(3)
        Dropped()
    result = st.prune_iteratively(rest, model, **options)
    assert result.to_list() == whole.to_list()
    assert same_state(model, whole_model.state_dict())
    done = len(broken.begins)
    assert len(rest.begins) == len(whole.rounds) - done
    # All is there: nothing is trained again, and the model comes back.
    last, model = Training(), SmallNet()
    model = fresh(7)
    assert st.prune_iteratively(last, model, **options).to_list() == whole.to_list()
    assert not last.begins
    assert same_state(model, whole_model.state_dict())
    assert json.loads((tmp_path / "settings.json").read_text())["rate"] == 0.5


def test_a_folder_is_of_one_call(tmp_path: Path) -> None:
    st.prune_iteratively(Training(), fresh(), rounds=1, rate=0.5, folder=tmp_path)
    with pytest.raises(ValueError, match=r"has rounds with rate=0\.5, and this call has rate=0\.2"):
        st.prune_iteratively(Training(), fresh(), rounds=1, folder=tmp_path)
    # More rounds of the same are fine.
    training = Training()
    st.prune_iteratively(training, fresh(), rounds=2, rate=0.5, folder=tmp_path)
    assert [run.number for run, *_ in training.begins] == [2]


def test_a_trained_model_is_pruned_first() -> None:
    training, model = Training(), fresh()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = st.prune_iteratively(training, model, rounds=1, rate=0.75, trained=True)
    assert [done.number for done in result.rounds] == [1]
    run, begun, _, _ = training.begins[0]
    for name, mask in run.masks.items():
        assert torch.equal(begun[name], torch.where(mask, before[name], 0.0))


def test_scores_with_data() -> None:
    result = st.prune_iteratively(
        Training(),
        fresh(),
        st.Fisher(),
        rounds=1,
        rate=0.5,
        scope="global",
        calibration=[batch(0)],
        loss_fn=F.cross_entropy,
    )
    assert result.last.sparsity == 0.5
    assert "pruned by fisher" in str(result)
    assert "50.00%" in str(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds=0 must be 1 or more"),
        ({"rounds": 1, "rate": 1.0}, r"rate=1\.0 in \(0, 1\)"),
        ({"rounds": 1, "rate": {"*": 0.0}}, r"rate=.* in \(0, 1\)"),
        ({"rounds": 1, "rewind_to": -1}, "rewind_to=-1 must be 0 or more"),
        ({"rounds": 1, "rewind_to": 0, "trained": True}, "a model that is not trained yet"),
        ({"rounds": 1, "controls": ["fresh"]}, "give rewind_to"),
        ({"rounds": 1, "controls": ["frsh"], "rewind_to": 0}, "'frsh' is not one of"),
        ({"rounds": 1, "rate": {"*": 0.1}, "scope": "global"}, "give one rate"),
        ({"rounds": 1, "score": "wanda"}, "needs data"),
        ({"rounds": 1, "match": "nothing"}, "names nothing"),
        ({"rounds": 1, "rewind_to": STEPS + 1}, "after the last of 9 steps"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        st.prune_iteratively(Training(), fresh(), **options)


def test_training_functions_that_cannot_be_rewound() -> None:
    def without_steps(run: Run) -> None:
        return None

    with pytest.raises(ValueError, match="as far as rewind_to=3"):
        st.prune_iteratively(without_steps, fresh(), rounds=1, rewind_to=3)
    result = st.prune_iteratively(without_steps, fresh(), rounds=1, rewind_to=0)
    assert result.last.sparsity == pytest.approx(0.2, abs=1e-3)

    def gives_tensors(run: Run) -> Tensor:
        return torch.zeros(2)

    with pytest.raises(ValueError, match="plain data for JSON"):
        st.prune_iteratively(gives_tensors, fresh(), rounds=1)

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3))

    model = nn.Sequential(Bare(), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="new weights for 0: give Bare a method"):
        st.prune_iteratively(without_steps, model, rounds=1, rewind_to=0, controls=["fresh"])


def test_weights_and_random_numbers_begin_anew_without_steps() -> None:
    begins: list[tuple[Run, Tensor, Tensor]] = []

    def train(run: Run) -> None:
        weight = run.model.get_parameter("net.hidden.weight")
        begins.append((run, weight.detach().clone(), torch.rand(())))
        with torch.no_grad():
            weight.add_(torch.randn_like(weight))

    st.prune_iteratively(train, fresh(), rounds=1, rate=0.5, rewind_to=0, controls=["fresh"])
    (_, start, first), (ticket, rewound, second), (_, anew, third) = begins
    mask = ticket.masks["net.hidden.weight"]
    assert torch.equal(rewound, torch.where(mask, start, 0.0))
    assert not torch.equal(anew, rewound)
    assert first == second == third
    begins.clear()
    st.prune_iteratively(train, fresh(), rounds=1, rate=0.5)
    assert begins[0][2] == first  # making controls draws nothing

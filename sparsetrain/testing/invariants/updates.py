"""What holds when masks change."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsetrain.base_state import find_resting, group_of, shaped_state
from sparsetrain.report.events import UpdateEvent
from sparsetrain.storage.latent import LatentTarget
from sparsetrain.storage.learned import LearnedTarget
from sparsetrain.targets import ExchangeTarget, SparseTarget
from sparsetrain.testing.broken import require
from sparsetrain.testing.case import Case, Run, fingerprint

#: Forced updates come so often.
_EVERY = 3


def masks_change_at_updates_only(case: Case) -> str | None:
    """A mask changes at steps for which `update_is_due` says so, and in no backward pass."""
    run = case.start()
    if all(isinstance(target, LearnedTarget) for _, target in run.held):
        return "learned masks follow their gates, which move at every step"
    before = _masks(run)

    def look(step: int, may: bool) -> None:
        for policy, target in run.held:
            if target.name not in before or (may and policy.update_is_due(step)):
                continue
            same = bool(torch.equal(target.mask, before[target.name]))
            says = "the mask changed, though no update was due"
            require(same, says, step=step, layer=target.name)

    run.disturb = lambda step: look(step, may=False)
    for step in run.steps():
        look(step, may=True)
        before = _masks(run)
    return None


def _masks(run: Run) -> dict[str, Tensor]:
    return {t.name: t.mask.clone() for _, t in run.held if not isinstance(t, LearnedTarget)}


def events_tell_what_changed(case: Case) -> str | None:
    """Each update comes with one event that has its step and net numbers of dropped and grown.

    Of learned masks it has to be there; their gates may move before it is heard.
    """
    run = case.start()
    told: list[int] = []
    before = _masks(run)

    def hear(event: UpdateEvent) -> None:
        told.append(event.step)
        _require_told(run, event, before)

    run.optimizer.register_update_hook(hear)
    for step in run.steps():
        due = [step] if run.is_due(step) else []
        says = f"{told.count(step)} events tell of this step, and {len(due)} updates were due"
        require([s for s in told if s == step] == due, says, step=step)
    return None if told else "its policy makes no updates"


def _require_told(run: Run, event: UpdateEvent, before: dict[str, Tensor]) -> None:
    for name in dict.fromkeys(c.name for c in event.layers if c.name in before):
        target = run.optimizer.targets[name]
        was, now = before[name], target.mask.clone()
        changes = [change for change in event.layers if change.name == name]
        did = int((was & ~now).sum()), int((now & ~was).sum())
        told = sum(c.dropped for c in changes), sum(c.grown for c in changes)
        # Several exchanges of one layer may undo each other.
        right = told == did if len(changes) == 1 else told[0] - told[1] == did[0] - did[1]
        says = f"told to have dropped and grown {told} weights, but did {did}"
        require(right, says, step=event.step, layer=name)
        says = f"told to have {changes[-1].active} of {changes[-1].total} active weights"
        right = (changes[-1].active, changes[-1].total) == (target.active, target.numel)
        require(right, says, step=event.step, layer=name)
        before[name] = now
    says = f"told to be {event.sparsity} sparse, but is {run.optimizer.sparsity()}"
    require(event.sparsity == run.optimizer.sparsity(), says, step=event.step)


def grown_weights_start_fresh(case: Case) -> str | None:
    """A new weight starts at 0, or at the value that its policy handed to `group.exchange`.

    Its optimizer state is what the optimizer holds for a weight that has always been 0: nothing of
    the time when it was active before.
    """
    run = case.start()
    names = [t.name for _, t in run.held if _can_grow_fresh(t)]
    if not names:
        return "its weights come back with the value that they have behind the mask"
    asked = _starts_asked_for(run)
    before = {name: run.optimizer.targets[name].mask.clone() for name in names}
    grown = 0

    def hear(event: UpdateEvent) -> None:
        nonlocal grown
        for name in names:
            target = run.optimizer.targets[name]
            new = (target.mask & ~before[name]).view(-1).nonzero().view(-1)
            before[name] = target.mask.clone()
            if new.numel():
                grown += new.numel()
                _require_fresh(run, target, new, asked.get(name), event.step)
        asked.clear()

    run.optimizer.register_update_hook(hear)
    run.advance()
    return None if grown else "no weight grew within these steps"


def _can_grow_fresh(target: SparseTarget) -> bool:
    return isinstance(target, ExchangeTarget) and not isinstance(target, LatentTarget)


def _starts_asked_for(run: Run) -> dict[str, Tensor]:
    """Layer -> its start values, dense, as the policies hand them over from now on."""
    asked: dict[str, Tensor] = {}

    def listening(exchange: Callable[..., None]) -> Callable[..., None]:
        def heard(
            target: ExchangeTarget, dropped: Tensor, grown: Tensor, values: Tensor | None = None
        ) -> None:
            if values is not None:
                start = torch.zeros(target.numel, dtype=values.dtype, device=values.device)
                asked[target.name] = start.index_copy(0, grown, values)
            exchange(target, dropped, grown, values)

        return heard

    for _, group in run.groups:
        group.exchange = listening(group.exchange)  # type: ignore[method-assign]
    return asked


def _require_fresh(
    run: Run, target: SparseTarget, new: Tensor, asked: Tensor | None, step: int
) -> None:
    assert isinstance(target, ExchangeTarget)
    values = target.active_values(new)
    expected = torch.zeros_like(values) if asked is None else asked[new].to(values)
    wrong = int((values != expected).sum())
    says = f"{wrong} of {new.numel()} new weights do not start at " + (
        "0" if asked is None else "the values that the policy gave"
    )
    require(wrong == 0, says, step=step, layer=target.name)
    base = run.optimizer.base
    fresh = find_resting(base, group_of(base, target.param), target.param).fresh
    places = torch.searchsorted(target.active_indices(), new)
    for key, state in shaped_state(base.state.get(target.param, {}), target.param):
        held = target.at_active(state)[places]
        wrong = int((held != torch.tensor(fresh.get(key, 0.0)).to(held)).sum())
        says = f"{key!r} of {wrong} of {new.numel()} new weights is not {fresh.get(key, 0.0)}"
        require(wrong == 0, says, step=step, layer=target.name)


def updates_touch_nothing_else(case: Case) -> str | None:
    """A forced `update_masks()` leaves kept weights and their state, biases, buffers and clock.

    Latent weights stay altogether, and so do the weights behind a learned mask.
    """
    run = case.start()
    for step in range(case.steps):
        if step % _EVERY == 1:
            run.optimizer.expect_update()
            run.backward(step)
            masks = run.optimizer.masks()
            before = _kept(run), _others(run), run.optimizer.step_count
            run.optimizer.update_masks()
            _require_untouched(run, before, masks, step)
        run.step(step)
    return None


def _kept(run: Run) -> dict[str, dict[str, Tensor]]:
    """Layer -> what belongs to its weights one by one, of the weight's shape; 0 where inactive."""
    found: dict[str, dict[str, Tensor]] = {}
    for _, target in run.held:
        state = shaped_state(run.optimizer.state.get(target.param, {}), target.param)
        parts = {"value": target.param.detach(), **dict(state)}
        if isinstance(target, LatentTarget):
            parts["value"] = target.latent_weight()
        if isinstance(target, ExchangeTarget) and not isinstance(target, LatentTarget):
            parts = {key: _spread(target, values) for key, values in parts.items()}
        found[target.name] = {key: values.clone() for key, values in parts.items()}
    return found


def _differing(one: Tensor, other: Tensor) -> int:
    both_nan = one.isnan() & other.isnan()
    return int(((one != other) & ~both_nan).sum())


def _spread(target: ExchangeTarget, values: Tensor) -> Tensor:
    active = target.at_active(values)
    whole = torch.zeros(target.numel, dtype=active.dtype, device=active.device)
    return whole.index_copy(0, target.active_indices(), active).view(target.shape)


def _others(run: Run) -> dict[str, bytes]:
    """Fingerprints of parameters and buffers that are neither targets nor gates."""
    targets = {id(target.param) for _, target in run.held}
    gates = {
        id(tensor)
        for _, target in run.held
        if isinstance(target, LearnedTarget)
        for tensor in [*target.learned.parameters(), *target.learned.buffers()]
    }
    named = [*run.model.named_parameters(), *run.model.named_buffers()]
    return {n: fingerprint(t) for n, t in named if id(t) not in targets | gates}


def _require_untouched(
    run: Run,
    before: tuple[dict[str, dict[str, Tensor]], dict[str, bytes], int],
    masks: dict[str, Tensor],
    step: int,
) -> None:
    kept, others, clock = before
    says = "a forced update changed"
    require(run.optimizer.step_count == clock, f"{says} the step count", step=step)
    for name, fingerprinted in _others(run).items():
        require(others.get(name) == fingerprinted, f"{says} {name}", step=step)
    now = _kept(run)
    for _, target in run.held:
        stays = masks[target.name] & target.mask
        if isinstance(target, LatentTarget | LearnedTarget):
            stays = torch.ones_like(stays)
        for key, values in kept[target.name].items():
            after = now[target.name].get(key)
            if after is None or after.shape != values.shape:
                continue  # an optimizer may have to start its state anew
            wrong = _differing(after[stays], values[stays])
            what = "value" if key == "value" else repr(key)
            says_kept = f"{says} the {what} of {wrong} weights that it kept"
            require(wrong == 0, says_kept, step=step, layer=target.name)

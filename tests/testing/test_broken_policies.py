"""Policies with a fault each: the kit finds it, and by the right name."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import Field
from torch import Tensor

import sparsetrain as st
from sparsetrain import testing
from sparsetrain.candidates import Candidate
from sparsetrain.learned import LearnedMask
from sparsetrain.policies.group import TargetGroup
from sparsetrain.report.events import LayerChange
from sparsetrain.storage.learned import LearnedTarget
from sparsetrain.targets import ExchangeTarget

UNIFORM: dict[str, Any] = {
    "sparsity": 0.8,
    "allocation": "uniform",
    "total_steps": 14,
    "update": {"every": 3},
}


@pytest.fixture(autouse=True)
def _known_kinds_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies of these tests are not among those of recipes when they are over."""
    monkeypatch.setattr(st.Policy, "members", dict(st.Policy.members))


# Counts.


def one_weight_short() -> st.Policy:
    class OneWeightShort(st.SET):
        kind: Literal["one_weight_short"] = "one_weight_short"

        def initial_masks(self, group: TargetGroup) -> dict[str, Tensor]:
            masks = super().initial_masks(group)
            mask = masks["hidden.weight"].view(-1)
            mask[mask.nonzero()[0]] = False
            return masks

    return OneWeightShort(**UNIFORM)


def loses_a_weight_an_update() -> st.Policy:
    class LosesAWeight(st.RigL):
        kind: Literal["loses_a_weight"] = "loses_a_weight"

        def update_masks(self, group: TargetGroup, step: int) -> None:
            for target in group.exchangeable:
                dropped = target.least_active(3)
                group.exchange(target, dropped, target.steepest_free(2, dropped))

    return LosesAWeight(**UNIFORM)


def forgets_a_layer() -> st.Policy:
    class ForgetsALayer(st.Static):
        kind: Literal["forgets_a_layer"] = "forgets_a_layer"

        def initial_masks(self, group: TargetGroup) -> dict[str, Tensor]:
            masks = super().initial_masks(group)
            masks.pop("head.weight", None)
            return masks

    return ForgetsALayer(sparsity=0.8, allocation="uniform")


def stops_pruning_early() -> st.Policy:
    class StopsEarly(st.Gradual):
        kind: Literal["stops_early"] = "stops_early"

        def sparsity_at(self, step: int) -> float:
            return 0.9 * super().sparsity_at(step)

    return StopsEarly(**UNIFORM)


def steers_nothing() -> st.Policy:
    class SteersNothing(st.HardConcrete):
        kind: Literal["steers_nothing"] = "steers_nothing"

        def update_masks(self, group: TargetGroup, step: int) -> None:
            for target in group.held_as(LearnedTarget):
                group.plan(lambda target=target: told(target, *target.settle()[:2]))

    return SteersNothing(sparsity=0.7, total_steps=8, update={"every": 2})


def ignores_its_structure() -> st.Policy:
    class IgnoresStructure(st.RigL):
        kind: Literal["ignores_structure"] = "ignores_structure"

        def update_masks(self, group: TargetGroup, step: int) -> None:
            for target in group.exchangeable:
                dropped = target.least_active(3)
                group.exchange(target, dropped, target.steepest_free(3, dropped))

    return IgnoresStructure(**UNIFORM, structure="constant_fan_in")


# Weights and state.


def writes_everywhere() -> st.Policy:
    class WritesEverywhere(st.SET):
        kind: Literal["writes_everywhere"] = "writes_everywhere"

        def update_masks(self, group: TargetGroup, step: int) -> None:
            super().update_masks(group, step)
            for target in group.targets:
                target.param.data.add_(1e-3)

    return WritesEverywhere(**UNIFORM)


def shrinks_what_stays() -> st.Policy:
    class Shrinks(st.SET):
        kind: Literal["shrinks"] = "shrinks"

        def update_masks(self, group: TargetGroup, step: int) -> None:
            for target in group.targets:
                target.param.detach().mul_(0.9)
            super().update_masks(group, step)

    return Shrinks(**UNIFORM)


def shrinks_latent_weights() -> st.Policy:
    class ShrinksLatent(st.NMSparse):
        kind: Literal["shrinks_latent"] = "shrinks_latent"

        def update_masks(self, group: TargetGroup, step: int) -> None:
            for target in group.targets:
                target.param.detach().mul_(0.9)
            super().update_masks(group, step)

    return ShrinksLatent(n=1, m=4)


def starts_somewhere() -> st.Policy:
    class StartsSomewhere(st.SET):
        kind: Literal["starts_somewhere"] = "starts_somewhere"

        def update_masks(self, group: TargetGroup, step: int) -> None:
            for target in group.exchangeable:
                dropped = target.least_active(3)
                grown = target.random_free(3, dropped, group.generator)
                group.exchange(target, dropped, grown)
                group.plan(lambda target=target, grown=grown: started(target, grown))

    def started(target: ExchangeTarget, grown: Tensor) -> LayerChange:
        target.param.detach().view(-1)[grown] = 0.5
        return told(target, 0, 0)

    return StartsSomewhere(**UNIFORM)


def starts_with_momentum() -> st.Policy:
    class StartsWithMomentum(st.SET):
        kind: Literal["starts_with_momentum"] = "starts_with_momentum"

        def update_masks(self, group: TargetGroup, step: int) -> None:
            for target in group.exchangeable:
                dropped = target.least_active(3)
                grown = target.random_free(3, dropped, group.generator)
                group.exchange(target, dropped, grown)
                state = group.state_of(target.param)["momentum_buffer"]
                group.plan(lambda t=target, g=grown, s=state: started(t, g, s))

    def started(target: ExchangeTarget, grown: Tensor, state: Tensor) -> LayerChange:
        state.view(-1)[grown] = 1.0
        return told(target, 0, 0)

    return StartsWithMomentum(**UNIFORM)


def leaves_state_behind() -> st.Policy:
    class LeavesState(st.SET):
        kind: Literal["leaves_state"] = "leaves_state"

        def update_masks(self, group: TargetGroup, step: int) -> None:
            for target in group.exchangeable:
                dropped = target.least_active(3)
                grown = target.random_free(3, dropped, group.generator)
                group.plan(lambda t=target, d=dropped, g=grown: exchanged(t, d, g))

    def exchanged(target: ExchangeTarget, dropped: Tensor, grown: Tensor) -> LayerChange:
        was = target.mask.clone()
        target.exchange(dropped, grown)
        return told(target, int((was & ~target.mask).sum()), int((target.mask & ~was).sum()))

    return LeavesState(**UNIFORM)


# Updates.


def changes_masks_while_it_observes() -> st.Policy:
    class ChangesAnyTime(st.Static):
        kind: Literal["changes_any_time"] = "changes_any_time"

        def observe(self, group: TargetGroup, step: int) -> None:
            [*_, target] = group.exchangeable
            target.replace_mask(target.mask.roll(1))

    return ChangesAnyTime(sparsity=0.8, allocation="uniform")


def lies_about_its_updates() -> st.Policy:
    class Lies(st.SET):
        kind: Literal["lies"] = "lies"

        def update_masks(self, group: TargetGroup, step: int) -> None:
            for target in group.exchangeable:
                dropped = target.least_active(3)
                grown = target.random_free(3, dropped, group.generator)
                group.plan(lambda t=target, d=dropped, g=grown: exchanged(t, d, g))

    def exchanged(target: ExchangeTarget, dropped: Tensor, grown: Tensor) -> LayerChange:
        target.exchange(dropped, grown)
        return told(target, dropped.numel() + 1, grown.numel())

    return Lies(**UNIFORM)


def told(target: Any, dropped: int, grown: int) -> LayerChange:
    return LayerChange(target.name, dropped, grown, target.active, target.numel)


# Randomness and memory.


def draws_from_torch() -> st.Policy:
    class DrawsFromTorch(st.SET):
        kind: Literal["draws_from_torch"] = "draws_from_torch"

        def initial_masks(self, group: TargetGroup) -> dict[str, Tensor]:
            masks = super().initial_masks(group)
            return {
                n: m.view(-1)[torch.randperm(m.numel())].view(m.shape) for n, m in masks.items()
            }

    return DrawsFromTorch(**UNIFORM)


def draws_in_vain() -> st.Policy:
    class DrawsInVain(st.SET):
        kind: Literal["draws_in_vain"] = "draws_in_vain"

        def update_masks(self, group: TargetGroup, step: int) -> None:
            random.random()
            super().update_masks(group, step)

    return DrawsInVain(**UNIFORM)


def draws_gates_from_torch() -> st.Policy:
    class DrawsGates(st.HardConcrete):
        kind: Literal["draws_gates"] = "draws_gates"

        def learned_mask(self, candidate: Candidate, generator: torch.Generator) -> LearnedMask:
            other = torch.Generator().manual_seed(int(torch.randint(1000, (1,))))
            return super().learned_mask(candidate, other)

    return DrawsGates(strength=1e-3, spread=0.5, total_steps=6)


def remembers_on_the_class() -> st.Policy:
    class RemembersOnTheClass(st.SET):
        kind: Literal["remembers_on_the_class"] = "remembers_on_the_class"
        seen: ClassVar[set[str]] = set()

        def update_masks(self, group: TargetGroup, step: int) -> None:
            for target in group.exchangeable:
                count = 2 if target.name in self.seen else 5
                self.seen.add(target.name)
                dropped = target.least_active(count)
                group.exchange(target, dropped, target.random_free(count, dropped, group.generator))

    return RemembersOnTheClass(**UNIFORM)


def remembers_beside_its_memory() -> st.Policy:
    class RemembersBeside(st.RigL):
        kind: Literal["remembers_beside"] = "remembers_beside"

        def update_masks(self, group: TargetGroup, step: int) -> None:
            group.updates = getattr(group, "updates", 0) + 1
            for target in group.exchangeable:
                dropped = target.least_active(group.updates)
                group.exchange(target, dropped, target.steepest_free(group.updates, dropped))

    return RemembersBeside(**UNIFORM)


def remembers_objects() -> st.Policy:
    class RemembersObjects(st.SET):
        kind: Literal["remembers_objects"] = "remembers_objects"

        def observe(self, group: TargetGroup, step: int) -> None:
            group.memory["share"] = Fraction(1, step + 1)

    return RemembersObjects(**UNIFORM)


def counts_looks_at_the_clock() -> st.Policy:
    class CountsLooks(st.RigL):
        kind: Literal["counts_looks"] = "counts_looks"

        def follow_clock(self, group: TargetGroup, step: int) -> None:
            group.memory["looks"] = group.memory.get("looks", 0) + 1

        def update_masks(self, group: TargetGroup, step: int) -> None:
            for target in group.exchangeable:
                dropped = target.least_active(group.memory["looks"] % 9)
                grown = target.steepest_free(dropped.numel(), dropped)
                group.exchange(target, dropped, grown)

    return CountsLooks(**UNIFORM)


def looks_at_gradients_it_does_not_ask_for() -> st.Policy:
    class LooksSecretly(st.SET):
        kind: Literal["looks_secretly"] = "looks_secretly"

        def observe(self, group: TargetGroup, step: int) -> None:
            for target in group.exchangeable:
                group.memory[target.name] = target.whole_gradient().clone()

        def update_masks(self, group: TargetGroup, step: int) -> None:
            for target in group.exchangeable:
                dropped = target.least_active(3)
                grown = target.largest_free(group.memory[target.name], 3, dropped)
                group.exchange(target, dropped, grown)

    return LooksSecretly(**UNIFORM)


# Both ends of a run.


def changes_the_model_when_it_is_wrapped() -> st.Policy:
    class ChangesTheModel(st.Static):
        kind: Literal["changes_the_model"] = "changes_the_model"

        def initial_masks(self, group: TargetGroup) -> dict[str, Tensor]:
            for target in group.targets:
                target.param.mul_(2.0)
            return super().initial_masks(group)

    return ChangesTheModel(sparsity=0.8)


def loses_a_field() -> st.Policy:
    class LosesAField(st.SET):
        kind: Literal["loses_a_field"] = "loses_a_field"
        pace: int = Field(1, exclude=True)

    return LosesAField(**UNIFORM, pace=2)


def takes_the_kind_of_another() -> st.Policy:
    class Another(st.SET):  # joins the family in the place of SET itself
        pass

    assert Another.model_fields["kind"].default == "set"
    return st.SET(**UNIFORM)


def scales_at_the_end() -> st.Policy:
    class ScalesAtTheEnd(st.Static):
        kind: Literal["scales_at_the_end"] = "scales_at_the_end"

        def finish(self, group: TargetGroup, step: int) -> None:
            for target in group.targets:
                target.param.mul_(2.0)

    return ScalesAtTheEnd(sparsity=0.8)


def moves_gates_at_the_end() -> st.Policy:
    class MovesGates(st.HardConcrete):
        kind: Literal["moves_gates"] = "moves_gates"

        def finish(self, group: TargetGroup, step: int) -> None:
            for target in group.held_as(LearnedTarget):
                for gate in target.learned.gates():
                    gate.sub_(2.0)

    return MovesGates(strength=1e-3, total_steps=6)


#: What is wrong with it -> (how it is made, what finds it, in which layer if it is about one).
FAULTS: dict[str, tuple[Callable[[], st.Policy], str, str | None]] = {
    "one weight short": (one_weight_short, "counts_are_exact", "hidden.weight"),
    "loses a weight an update": (loses_a_weight_an_update, "counts_are_exact", "conv.weight"),
    "forgets a layer": (forgets_a_layer, "counts_are_exact", "head.weight"),
    "stops pruning early": (stops_pruning_early, "counts_are_exact", "conv.weight"),
    "steers nothing": (steers_nothing, "counts_are_exact", None),
    "ignores its structure": (ignores_its_structure, "structures_hold", "conv.weight"),
    "writes everywhere": (writes_everywhere, "inactive_weights_are_zero", "conv.weight"),
    "shrinks what stays": (shrinks_what_stays, "updates_touch_nothing_else", "conv.weight"),
    "shrinks latent weights": (shrinks_latent_weights, "updates_touch_nothing_else", "conv.weight"),
    "starts somewhere": (starts_somewhere, "grown_weights_start_fresh", "conv.weight"),
    "starts with momentum": (starts_with_momentum, "grown_weights_start_fresh", "conv.weight"),
    "leaves state behind": (leaves_state_behind, "inactive_state_is_zero", "conv.weight"),
    "changes masks while it observes": (
        changes_masks_while_it_observes,
        "masks_change_at_updates_only",
        "head.weight",
    ),
    "lies about its updates": (lies_about_its_updates, "events_tell_what_changed", "conv.weight"),
    "draws from torch": (draws_from_torch, "seeds_repeat_runs", "conv.weight"),
    "draws in vain": (draws_in_vain, "global_random_numbers_are_left_alone", None),
    "draws gates from torch": (draws_gates_from_torch, "seeds_repeat_runs", None),
    "remembers on the class": (remembers_on_the_class, "seeds_repeat_runs", "conv.weight"),
    "remembers beside its memory": (
        remembers_beside_its_memory,
        "resumed_runs_are_the_same",
        "conv.weight",
    ),
    "remembers objects": (remembers_objects, "resumed_runs_are_the_same", None),
    "counts looks at the clock": (
        counts_looks_at_the_clock,
        "resumed_runs_are_the_same",
        "conv.weight",
    ),
    "looks at gradients it does not ask for": (
        looks_at_gradients_it_does_not_ask_for,
        "gradients_outside_the_mask_do_not_leak",
        None,
    ),
    "changes the model when it is wrapped": (
        changes_the_model_when_it_is_wrapped,
        "refused_wraps_change_nothing",
        None,
    ),
    "loses a field": (loses_a_field, "recipes_round_trip", None),
    "takes the kind of another": (takes_the_kind_of_another, "recipes_round_trip", None),
    "scales at the end": (scales_at_the_end, "finalize_leaves_a_plain_model", None),
    "moves gates at the end": (moves_gates_at_the_end, "finalize_leaves_a_plain_model", None),
}
#: Faults of what an optimizer keeps show where it keeps something, others without it, too.
OPTIMIZER = {"starts with momentum": "momentum", "leaves state behind": "momentum"}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fault_is_found_by_name(fault: str) -> None:
    make, invariant, layer = FAULTS[fault]
    policy = make()
    optimizer = OPTIMIZER.get(fault, "adamw" if "gates" in fault or "steers" in fault else "sgd")
    with pytest.raises(testing.BrokenInvariant) as raised:
        testing.check_policy(policy, optimizer=optimizer)
    broken = raised.value
    assert broken.invariant == invariant, str(broken)
    assert broken.optimizer == optimizer
    if layer is not None:
        assert broken.layer == layer, str(broken)
        assert layer in str(broken)
    assert str(broken).startswith(invariant)


def test_every_invariant_is_broken_by_some_policy_or_by_what_surrounds_it() -> None:
    """Three others take a broken optimizer, scaler or model: `test_broken_surroundings.py`."""
    found = {invariant for _, invariant, _ in FAULTS.values()}
    others = {"closures_step_alike", "skipped_steps_move_nothing", "state_dict_names_stay"}
    copies = {"copies_go_on_alike"}  # below: what copies lose, checkpoints lose before
    assert found | others | copies == {check.__name__ for check in testing.INVARIANTS}


@pytest.mark.parametrize("fault", ["remembers beside its memory", "remembers on the class"])
def test_what_copies_lose(fault: str) -> None:
    policy = FAULTS[fault][0]()
    with pytest.raises(testing.BrokenInvariant, match="a copy made at step 4 differs"):
        testing.check_policy(policy, optimizer="sgd", only="copies_go_on_alike")


def test_the_step_is_told() -> None:
    with pytest.raises(testing.BrokenInvariant) as raised:
        testing.check_policy(loses_a_weight_an_update(), optimizer="momentum")
    assert raised.value.step == 0
    assert str(raised.value) == (
        "counts_are_exact in conv.weight, at step 0, with optimizer 'momentum': 57 weights are "
        "active, 58 should be"
    )


def test_errors_of_a_policy_come_through_with_what_was_checked() -> None:
    class Fails(st.SET):
        kind: Literal["fails"] = "fails"

        def update_masks(self, group: TargetGroup, step: int) -> None:
            raise KeyError("somewhere")

    with pytest.raises(KeyError, match="somewhere") as raised:
        testing.check_policy(Fails(**UNIFORM), optimizer="sgd", only=["counts_are_exact"])
    assert raised.value.__notes__ == ["while counts_are_exact was checked with optimizer 'sgd'"]

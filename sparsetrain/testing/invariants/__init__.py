"""Every invariant, one function each.

An invariant takes a `Case`, starts runs of it, and raises `BrokenInvariant` where it does not hold.
It returns None, or the reason why it says nothing about this case. The first line of its docstring
is what reports say of it.
"""

from __future__ import annotations

from collections.abc import Callable

from sparsetrain.testing.case import Case
from sparsetrain.testing.invariants.holding import (
    counts_are_exact,
    inactive_state_is_zero,
    inactive_weights_are_zero,
    structures_hold,
)
from sparsetrain.testing.invariants.repeating import (
    copies_go_on_alike,
    global_random_numbers_are_left_alone,
    resumed_runs_are_the_same,
    seeds_repeat_runs,
)
from sparsetrain.testing.invariants.stepping import (
    closures_step_alike,
    gradients_outside_the_mask_do_not_leak,
    skipped_steps_move_nothing,
)
from sparsetrain.testing.invariants.updates import (
    events_tell_what_changed,
    grown_weights_start_fresh,
    masks_change_at_updates_only,
    updates_touch_nothing_else,
)
from sparsetrain.testing.invariants.wrapping import (
    finalize_leaves_a_plain_model,
    recipes_round_trip,
    refused_wraps_change_nothing,
    state_dict_names_stay,
)

Invariant = Callable[[Case], str | None]

#: In the order in which they are checked. Repetition comes first: of two runs of a policy that
#: remembers things outside of the optimizer, the first is another one only once. Then causes before
#: what follows from them: stale momentum moves weights outside the mask, and both make a resumed
#: run another one.
INVARIANTS: tuple[Invariant, ...] = (
    seeds_repeat_runs,
    global_random_numbers_are_left_alone,
    recipes_round_trip,
    refused_wraps_change_nothing,
    state_dict_names_stay,
    counts_are_exact,
    structures_hold,
    inactive_state_is_zero,
    inactive_weights_are_zero,
    masks_change_at_updates_only,
    events_tell_what_changed,
    grown_weights_start_fresh,
    updates_touch_nothing_else,
    resumed_runs_are_the_same,
    copies_go_on_alike,
    closures_step_alike,
    skipped_steps_move_nothing,
    gradients_outside_the_mask_do_not_leak,
    finalize_leaves_a_plain_model,
)

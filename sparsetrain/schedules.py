"""When masks are updated, and how a quantity moves between two values over training.

An :class:`UpdateSchedule` says at which steps a policy may change its masks. A :class:`Schedule`
is a curve over the progress of training (0 at its beginning, 1 at its end) and serves sparsity,
drop fraction and learning-rate-like quantities alike.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    model_validator,
)

ScheduleShape = Literal["constant", "linear", "cosine", "cubic", "cyclic"]


class UpdateSchedule(BaseModel):
    """The steps at which masks are updated: ``start, start + every, ...`` below ``stop``.

    Steps are counted by the clock *before* the optimizer step, so the first step is 0. A ``stop``
    given as an integer is a step, a ``stop`` given as a float is a fraction of ``total_steps``
    (``1`` is the first step, ``1.0`` is the end of training). An integer ``stop`` equal to
    ``start`` says that there are no updates but those that are forced.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: int = Field(default=100, ge=1, description="Steps between two updates, at least 1.")
    start: int = Field(default=0, ge=0, description="First step at which an update may happen.")
    stop: StrictInt | StrictFloat | None = Field(
        default=None,
        description="End of the updates (exclusive): an integer is a step, a float in (0, 1] a "
        "fraction of total_steps, null the default of the policy.",
    )

    @model_validator(mode="after")
    def _stop_is_sensible(self) -> "UpdateSchedule":
        if isinstance(self.stop, float):
            if not 0.0 < self.stop <= 1.0:
                raise ValueError(
                    f"stop={self.stop}: as a fraction of total_steps it must lie in (0, 1]; "
                    "write an integer for a step"
                )
        elif self.stop is not None and self.stop < self.start:
            raise ValueError(
                f"stop={self.stop} lies before start={self.start}: no update would ever happen"
            )
        return self

    def stop_step(self, total_steps: int | None, default: float | int | None = 0.75) -> int | None:
        """First step at which no update happens any more, or None for never.

        ``default`` stands in for a ``stop`` that is None (same meaning of int and float); a
        default fraction without ``total_steps`` means that updates never stop.

        Raises ValueError when the stop lies beyond ``total_steps`` or leaves no step after
        ``start``, and when ``stop`` is a fraction but ``total_steps`` is not known.
        """
        stop = default if self.stop is None else self.stop
        if isinstance(stop, float):
            if total_steps is None:
                if self.stop is None:
                    return None
                raise ValueError(f"stop={stop} is a fraction of total_steps: give total_steps")
            stop = round(stop * total_steps)
        if stop is None:
            return None
        if total_steps is not None and stop > total_steps:
            raise ValueError(
                f"stop={stop} lies beyond total_steps={total_steps}: lower stop, or give it as a "
                "fraction such as 0.75"
            )
        if stop <= self.start and self.stop != self.start:
            raise ValueError(
                f"updates start at step {self.start} but stop before step {stop}, so none would "
                "ever happen: lower start or raise stop"
            )
        return stop

    def is_due(
        self, step: int, total_steps: int | None, default: float | int | None = 0.75
    ) -> bool:
        """Whether masks are updated at ``step`` (arguments and errors as in :meth:`stop_step`)."""
        stop = self.stop_step(total_steps, default)
        if step < self.start or (stop is not None and step >= stop):
            return False
        return (step - self.start) % self.every == 0


class Schedule(BaseModel):
    """A curve from ``initial`` to ``final`` over progress 0 to 1.

    Shapes, with ``p`` the progress:

    - ``constant``: ``initial`` throughout.
    - ``linear``: a straight line.
    - ``cosine``: ``final + (initial - final) / 2 * (1 + cos(pi p))``
      (Evci et al. 2020, RigL, section 3, decay of the drop fraction).
    - ``cubic``: ``final + (initial - final) * (1 - p)^3`` (Zhu and Gupta 2017, equation 1).
    - ``cyclic``: the cosine ``cycles`` times over, back at ``initial`` at each restart
      (Loshchilov and Hutter 2017, warm restarts of equal length).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: ScheduleShape = Field(description="The curve; cubic is Zhu and Gupta's.")
    initial: float = Field(allow_inf_nan=False, description="Value at progress 0.")
    final: float = Field(
        allow_inf_nan=False, description="Value at progress 1 (a constant does not use it)."
    )
    cycles: int = Field(default=1, ge=1, description="Number of repeats; for shape cyclic only.")

    @model_validator(mode="after")
    def _cycles_are_for_cyclic(self) -> "Schedule":
        if self.cycles != 1 and self.shape != "cyclic":
            raise ValueError(f"cycles={self.cycles} needs shape='cyclic', not {self.shape!r}")
        return self

    def at(self, progress: float) -> float:
        """Value at ``progress``, which is clamped to [0, 1]; exact at both ends.

        Raises ValueError when ``progress`` is NaN.
        """
        if math.isnan(progress):
            raise ValueError("the progress of a schedule is NaN")
        if self.shape == "constant" or progress <= 0.0:
            return self.initial
        if progress >= 1.0:
            return self.final
        value = self.final + (self.initial - self.final) * self._share_of_initial(progress)
        # Rounding must not overshoot: a rising sparsity would otherwise fall by one ulp.
        return min(max(value, min(self.initial, self.final)), max(self.initial, self.final))

    def _share_of_initial(self, progress: float) -> float:
        rest = 1.0 - progress
        if self.shape == "linear":
            return rest
        if self.shape == "cubic":
            return rest * rest * rest
        phase = (progress * self.cycles) % 1.0 if self.shape == "cyclic" else progress
        return 0.5 * (1.0 + math.cos(math.pi * phase))


def as_schedule(
    value: "float | Mapping[str, Any] | Schedule",
    shape: ScheduleShape = "cosine",
    final: float = 0.0,
) -> Schedule:
    """Turn what a user may write for a schedule into one.

    A number becomes a curve of the given ``shape`` from that number to ``final``; a mapping is
    validated as a :class:`Schedule` whose missing ``shape`` and ``final`` are the ones given here;
    a schedule is returned as it is.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, Mapping):
        return Schedule.model_validate({"shape": shape, "final": final, **value})
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a schedule: give a number, a mapping or a Schedule")
    return Schedule(shape=shape, initial=value, final=final)


def _within_0_and_1(schedule: Schedule) -> Schedule:
    for end, value in (("initial", schedule.initial), ("final", schedule.final)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{end} value {value} is not a share in [0, 1]")
    return schedule


def _every_step(value: Any) -> Any:
    return {"every": 1, **value} if isinstance(value, Mapping) else value


EveryStepSchedule = Annotated[
    UpdateSchedule, BeforeValidator(_every_step, json_schema_input_type=UpdateSchedule)
]
"""Annotation for the `update` of a policy whose masks change at every step unless told."""


class _ShortSchedule(Schedule):
    """What a mapping may leave out; for the JSON schema."""

    shape: ScheduleShape = Field(default="cosine", description="The curve.")
    final: float = Field(default=0.0, allow_inf_nan=False, description="Value at progress 1.")


_SCHEDULE_INPUT: Any = float | _ShortSchedule

CosineFraction = Annotated[
    Schedule,
    BeforeValidator(lambda v: as_schedule(v, "cosine"), json_schema_input_type=_SCHEDULE_INPUT),
    AfterValidator(_within_0_and_1),
]
"""Annotation for a field that takes a share in [0, 1]; a number decays to 0 as a cosine."""

LinearSchedule = Annotated[
    Schedule,
    BeforeValidator(lambda v: as_schedule(v, "constant"), json_schema_input_type=_SCHEDULE_INPUT),
]
"""Annotation for a field that takes any curve; a number stays as it is."""

ConstantFraction = Annotated[
    Schedule,
    BeforeValidator(lambda v: as_schedule(v, "constant"), json_schema_input_type=_SCHEDULE_INPUT),
    AfterValidator(_within_0_and_1),
]
"""Annotation for a field that takes a share in [0, 1]; a number stays as it is."""

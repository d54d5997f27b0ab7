"""How layers and networks are timed: clocks, and where in a network time passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sparsetrain import timing
from sparsetrain.cost.lookup.passes import network_seconds, sized
from sparsetrain.timing import CpuClock, CudaClock, clock_of, median_seconds


class HandClock:
    """Moves on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def spans(self, marks: Any) -> list[float]:
        return CpuClock().spans(marks)


class FakeEvent:
    """An event of a GPU that is always 3 ms behind."""

    now = 0.0  # milliseconds
    waited = 0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at: float | None = None

    def record(self, stream: str) -> None:
        assert stream == "stream of cuda:1"
        self.at = FakeEvent.now + 3

    def synchronize(self) -> None:
        assert self.at is not None
        FakeEvent.waited += 1
        FakeEvent.now = max(FakeEvent.now, self.at)

    def elapsed_time(self, after: FakeEvent) -> float:
        assert self.at is not None and after.at is not None
        assert FakeEvent.now >= after.at, "not waited for"
        return after.at - self.at


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[FakeEvent]:
    FakeEvent.now, FakeEvent.waited = 0.0, 0
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    return FakeEvent


def test_the_clock_is_that_of_the_device() -> None:
    assert isinstance(clock_of(torch.device("cpu")), CpuClock)
    clock = clock_of(torch.device("cuda:1"))
    assert isinstance(clock, CudaClock) and clock.device == torch.device("cuda:1")


def test_events_are_waited_for_once_and_give_seconds(gpu: type[FakeEvent]) -> None:
    clock = CudaClock(torch.device("cuda:1"))
    marks = []
    for moment in (0.0, 4.0, 5.0):
        gpu.now = moment
        marks.append(clock.mark())
    assert clock.spans(marks) == pytest.approx([0.004, 0.001])
    assert gpu.waited == 1


def test_medians_on_a_gpu(gpu: type[FakeEvent]) -> None:
    def job() -> None:
        gpu.now += 2

    found = median_seconds([job], CudaClock(torch.device("cuda:1")), rounds=3, seconds=0.01)
    assert found == pytest.approx([0.002])


def test_medians_are_taken_in_turn_and_fast_jobs_run_often(monkeypatch) -> None:
    clock, calls = HandClock(), []

    def job(name: str, seconds: float):
        def run() -> None:
            calls.append(name)
            # One round in the middle is disturbed.
            clock.now += seconds * (100 if len(calls) in (13, 14) else 1)

        return run

    found = median_seconds([job("a", 1.0), job("b", 0.25)], clock, rounds=3, seconds=1.0)
    assert found == pytest.approx([1.0, 0.25])
    assert "".join(calls) == "ab" + "ab" + "abbbb" * 3


@pytest.fixture
def hand_clock() -> HandClock:
    return HandClock()


def slow(kind: type[nn.Module], clock: HandClock, seconds: float, *args: Any) -> nn.Module:
    """A layer during which the clock moves on."""

    class Slow(kind):  # type: ignore[valid-type, misc]
        def forward(self, *inputs: Any, **options: Any) -> Any:
            clock.now += seconds
            return super().forward(*inputs, **options)

    return Slow(*args)


def test_time_belongs_to_layers_and_to_what_is_between(hand_clock: HandClock) -> None:
    c = hand_clock
    model = nn.Sequential(
        slow(nn.Flatten, c, 0.5),
        slow(nn.Linear, c, 1.0, 4, 4),
        slow(nn.ReLU, c, 2.0),
        slow(nn.Linear, c, 3.0, 4, 4),
        slow(nn.Linear, c, 4.0, 4, 2),
        slow(nn.Softmax, c, 5.0, 1),
    )
    (found,) = network_seconds([sized(model, torch.randn(2, 4))], torch.randn(2, 4), c, 2)
    assert (found.before, found.layers, found.rests) == (0.5, (1.0, 3.0, 4.0), (2.0, 0.0, 5.0))
    assert found.total == 15.5
    assert [(w.inputs, w.outputs, w.storage) for w in found.widths] == [
        (4, 4, "dense"),
        (4, 4, "dense"),
        (4, 2, "dense"),
    ]
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_layer_keeps_a_forward_of_its_own(hand_clock: HandClock) -> None:
    def own(x: torch.Tensor) -> torch.Tensor:
        hand_clock.now += 3.0
        return x + 1

    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    layer.forward = own  # type: ignore[method-assign]
    (found,) = network_seconds([sized(nn.Sequential(layer), x)], x, hand_clock, 1)
    assert found.layers == (3.0,) and layer.forward is own


def test_time_of_attention_is_in_the_rest(hand_clock: HandClock) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = slow(nn.Linear, hand_clock, 1.0, 4, 4)
            self.attention = slow(nn.MultiheadAttention, hand_clock, 2.0, 4, 2)
            self.last = slow(nn.Linear, hand_clock, 4.0, 4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.last(self.attention(x, x, x)[0])

    x = torch.randn(2, 3, 4)
    (found,) = network_seconds([sized(Attending(), x)], x, hand_clock, 1)
    assert found.layers == (1.0, None, None, None, None, 4.0)
    assert found.rests == (2.0, 0, 0, 0, 0, 0) and found.total == 7.0


def test_networks_are_timed_in_turn(hand_clock: HandClock) -> None:
    order: list[str] = []

    class Named(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order.append(self.name)
            hand_clock.now += 1.0
            return super().forward(x)

    networks = [nn.Sequential(Named(4, 4)), nn.Sequential(Named(4, 4))]
    for name, network in zip("ab", networks, strict=True):
        network[0].name = name
    x = torch.randn(2, 4)
    pairs = [sized(network, x) for network in networks]
    order.clear()
    network_seconds(pairs, x, hand_clock, 2)
    assert "".join(order) == "aabb" + "aaabbb" * 2  # warm up; then warm, whole and by layers


def test_the_cpu_clock_reads_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([1.0, 1.5, 4.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(moments))
    clock = CpuClock()
    assert clock.spans([clock.mark(), clock.mark(), clock.mark()]) == [0.5, 2.5]

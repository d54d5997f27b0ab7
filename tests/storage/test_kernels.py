from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from sparsetrain.storage import kernels
from sparsetrain.storage.kernels import keep_where_, read_flat, write_flat_

INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16}
INTEGERS |= {torch.float32: torch.int32, torch.float64: torch.int64}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "every second": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "expanded": lambda t: t[:1].expand_as(t),
}
WRITABLE = [name for name in LAYOUTS if name != "expanded"]

shapes = some.lists(some.integers(0, 5), max_size=4).map(tuple)
seeds = some.integers(0, 2**31)


def any_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Every pattern of bits is as likely: NaNs of all kinds, infinities, denormals, -0.0."""
    generator = torch.Generator().manual_seed(seed)
    size = [*shape, torch.finfo(dtype).bits // 8]
    values = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).view(dtype)
    values = values.squeeze(-1)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=dtype)
    chosen = torch.randint(0, 8, shape, generator=generator)
    return torch.where(chosen < 4, special[chosen.clamp(max=3)], values)


def random_mask(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(INTEGERS[tensor.dtype])


def check_keep_where(tensor: Tensor, mask: Tensor) -> None:
    """Against `torch.where`, bit for bit: kept values as they were, the others +0.0."""
    expected = torch.where(mask, bits(tensor), 0)
    before, stride = mask.clone(), tensor.stride()
    keep_where_(tensor, mask)
    assert torch.equal(bits(tensor), expected)
    assert torch.equal(mask, before) and tensor.stride() == stride


@given(shape=shapes, dtype=some.sampled_from(sorted(INTEGERS, key=str)), seed=seeds)
def test_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    check_keep_where(any_bits(shape, dtype, seed), random_mask(shape, seed + 1))


@pytest.mark.parametrize("mask_layout", LAYOUTS)
@pytest.mark.parametrize("layout", WRITABLE)
def test_any_memory_layout(layout: str, mask_layout: str) -> None:
    shape = (4, 6, 3, 5)
    tensor = LAYOUTS[layout](any_bits(shape, torch.float32))
    check_keep_where(tensor, LAYOUTS[mask_layout](random_mask(shape)))


def test_what_lies_between_a_view_is_left_alone() -> None:
    whole = torch.arange(1.0, 13).reshape(3, 4)
    keep_where_(whole[:, ::2], torch.zeros(3, 2, dtype=torch.bool))
    assert whole.tolist() == [[0, 2, 0, 4], [0, 6, 0, 8], [0, 10, 0, 12]]


def test_scalars_and_empty_tensors() -> None:
    for keep in (True, False):
        for dtype in INTEGERS:
            check_keep_where(torch.tensor(2.0, dtype=dtype), torch.tensor(keep))
            check_keep_where(torch.empty((0, 3), dtype=dtype), torch.full((0, 3), keep))


def test_parameters() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    with torch.no_grad():
        keep_where_(weight, torch.eye(2) > 0)
    assert weight.tolist() == [[1, 0], [0, 1]] and weight.requires_grad and weight.is_leaf


def test_masks_of_a_subclass_take_the_way_of_other_devices() -> None:
    class Mask(Tensor):
        pass

    for dtype in INTEGERS:
        check_keep_where(any_bits((4, 5), dtype), random_mask((4, 5)).as_subclass(Mask))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.usefixtures("two_threads")
def test_two_threads_do_the_work_of_one(layout: str) -> None:
    shape = (5, 64, 41, 41)
    tensor = LAYOUTS[layout](any_bits(shape, torch.float32))
    assert tensor.numel() > 2 * kernels._PIECE
    check_keep_where(tensor, random_mask(shape))


@pytest.mark.parametrize("shape", [(1 << 19,), (1, 1 << 19), (2, 1 << 18), ((1 << 19) - 1,)])
@pytest.mark.usefixtures("two_threads")
def test_shapes_at_the_limits_of_threading(shape: tuple[int, ...]) -> None:
    check_keep_where(any_bits(shape, torch.float16), random_mask(shape))


@pytest.mark.parametrize("layout", WRITABLE)
@given(seed=seeds, number=some.integers(0, 60))
def test_flat_indices_are_row_major_in_any_layout(layout: str, seed: int, number: int) -> None:
    shape = (4, 3, 5, 2)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(seed))
    indices, plain = order[:number], torch.arange(120.0)
    tensor = LAYOUTS[layout](plain.reshape(shape).clone())
    stride = tensor.stride()
    assert torch.equal(read_flat(tensor, indices), plain[indices])

    values = -1 - torch.arange(float(number))
    write_flat_(tensor, indices, values)
    plain[indices] = values
    assert torch.equal(tensor, plain.reshape(shape))
    write_flat_(tensor, indices, 0.5)
    plain[indices] = 0.5
    assert torch.equal(tensor, plain.reshape(shape)) and tensor.stride() == stride


def test_flat_access_to_scalars_and_vectors() -> None:
    scalar, column = torch.tensor(3.0), torch.arange(8.0).reshape(4, 2)[:, 1]
    assert read_flat(scalar, torch.tensor([0])).tolist() == [3]
    write_flat_(scalar, torch.tensor([0]), 4.0)
    assert scalar == 4
    assert read_flat(column, torch.tensor([2, 0])).tolist() == [5, 1]
    write_flat_(column, torch.tensor([3]), torch.tensor([9.0]))
    assert column.tolist() == [1, 3, 5, 9]

"""Short float32 vectors for numba: what a compiler would call SIMD types.

numba vectorises plain loops, but keeps the sums over a sparse row in memory and not in registers.
These few operations say exactly what is wanted; LLVM turns a vector of any width into the registers
that the processor has. Importing this module needs numba.

`width` is a constant of the calling function, and part of each signature, by which numba tells the
operations of different widths apart. Nothing is checked: indices must be in range.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

_FLOAT, _INT32, _INT64, _BIT = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(1)
_ALIGNMENT = 4  # bytes: rows begin anywhere
_PARTIAL_SUMS = 32


class _VectorType(types.Type):
    """The numba type of `width` floats."""

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(name=f"float32x{width}")


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _VectorType) -> None:
        super().__init__(manager, kind, ir.VectorType(_FLOAT, kind.width))


@intrinsic(prefer_literal=True)
def splat(context: Any, width: Any, x: Any) -> Any:
    """All elements `x`."""
    kind = _VectorType(width.literal_value)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _repeat(builder, args[1], kind.width)

    return kind(width, types.float32), generate


@intrinsic(prefer_literal=True)
def load(context: Any, width: Any, array: Any, i: Any) -> Any:
    """array[i : i + width] of a 1-D float32 array."""
    kind = _VectorType(width.literal_value)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = _data(context, builder, signature, args, 1)
        return _load(builder, array, args[2], ir.VectorType(_FLOAT, kind.width))

    return kind(width, array, types.intp), generate


@intrinsic
def store(context: Any, array: Any, i: Any, vector: Any) -> Any:
    """array[i : i + width] = vector."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = builder.gep(_data(context, builder, signature, args, 0), [args[1]])
        stored = builder.store(args[2], builder.bitcast(start, args[2].type.as_pointer()))
        stored.align = _ALIGNMENT
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic(prefer_literal=True)
def gather(context: Any, width: Any, array: Any, indices: Any, i: Any) -> Any:
    """array[indices[i : i + width]], of int32 indices."""
    kind = _VectorType(width.literal_value)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        width = kind.width
        indices = _data(context, builder, signature, args, 2)
        at = _load(builder, indices, args[3], ir.VectorType(_INT32, width))
        # An address for each element; LLVM finds out that they share their base.
        start = builder.ptrtoint(_data(context, builder, signature, args, 1), _INT64)
        size = _repeat(builder, _INT64(_ALIGNMENT), width)
        offsets = builder.mul(builder.sext(at, size.type), size)
        addresses = builder.add(_repeat(builder, start, width), offsets)
        pointers = builder.inttoptr(addresses, ir.VectorType(_FLOAT.as_pointer(), width))
        all_of_them = ir.Constant(ir.VectorType(_BIT, width), [1] * width)
        otherwise = ir.Constant(ir.VectorType(_FLOAT, width), [0.0] * width)
        arguments = [pointers, _INT32(_ALIGNMENT), all_of_them, otherwise]
        name = f"llvm.masked.gather.v{width}f32.v{width}p0"
        return _call(builder, name, otherwise.type, arguments)

    return kind(width, array, indices, types.intp), generate


@intrinsic
def add(context: Any, a: Any, b: Any) -> Any:
    """a + b."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(*args, flags=("fast",))

    return a(a, a), generate


@intrinsic
def fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b, c = args
        return _fma(builder, a, b, c)

    return a(a, a, a), generate


@intrinsic
def total(context: Any, a: Any) -> Any:
    """The sum of the elements, in any order."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _sum_of(builder, args[0])

    return types.float32(a), generate


@intrinsic
def dot(context: Any, a: Any, b: Any) -> Any:
    """The sum of the elements of a b, in any order."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # Two registers of sums, so that few additions are left for the end.
        part = min(a.width, _PARTIAL_SUMS)
        sums = ir.Constant(ir.VectorType(_FLOAT, part), [0.0] * part)
        for start in range(0, a.width, part):
            of = ir.Constant(ir.VectorType(_INT32, part), list(range(start, start + part)))
            first, second = (builder.shuffle_vector(arg, arg, of) for arg in args)
            sums = _fma(builder, first, second, sums)
        return _sum_of(builder, sums)

    return types.float32(a, a), generate


@intrinsic(prefer_literal=True)
def transpose(
    context: Any, width: Any, source: Any, i: Any, step: Any, out: Any, j: Any, out_step: Any
) -> Any:
    """A square block: out[j + c out_step + r] = source[i + r step + c], r and c below `width`.

    `width` is a power of two.
    """
    size = width.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, i, step, _, j, out_step = args
        kind = ir.VectorType(_FLOAT, size)
        data = _data(context, builder, signature, args, 1)
        rows = [
            _load(builder, data, builder.add(i, builder.mul(step, _INT64(r))), kind)
            for r in range(size)
        ]
        distance = 1
        while distance < size:  # swap the off-diagonal halves of ever larger squares
            for r in range(size):
                if not r & distance:
                    rows[r], rows[r + distance] = _swapped(
                        builder, rows[r], rows[r + distance], distance
                    )
            distance *= 2
        target = _data(context, builder, signature, args, 4)
        for r, row in enumerate(rows):
            start = builder.gep(target, [builder.add(j, builder.mul(out_step, _INT64(r)))])
            stored = builder.store(row, builder.bitcast(start, kind.as_pointer()))
            stored.align = _ALIGNMENT
        return context.get_dummy_value()

    return types.void(width, source, types.intp, types.intp, out, types.intp, types.intp), generate


def _swapped(builder: Any, a: Any, b: Any, distance: int) -> tuple[Any, Any]:
    size = a.type.count
    places = range(size)
    first = [p if not p & distance else size + p - distance for p in places]
    second = [p + distance if not p & distance else size + p for p in places]
    integers = ir.VectorType(_INT32, size)
    return (
        builder.shuffle_vector(a, b, ir.Constant(integers, first)),
        builder.shuffle_vector(a, b, ir.Constant(integers, second)),
    )


def _data(context: Any, builder: Any, signature: Any, args: Any, place: int) -> Any:
    """Pointer to the first element of an array among the arguments."""
    return context.make_array(signature.args[place])(context, builder, args[place]).data


def _load(builder: Any, array: Any, i: Any, kind: Any) -> Any:
    loaded = builder.load(builder.bitcast(builder.gep(array, [i]), kind.as_pointer()))
    loaded.align = _ALIGNMENT
    return loaded


def _repeat(builder: Any, scalar: Any, width: int) -> Any:
    undefined = ir.Constant(ir.VectorType(scalar.type, width), ir.Undefined)
    first = builder.insert_element(undefined, scalar, _INT32(0))
    zeros = ir.Constant(ir.VectorType(_INT32, width), [0] * width)
    return builder.shuffle_vector(first, undefined, zeros)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])


def _sum_of(builder: Any, vector: Any) -> Any:
    arguments = [ir.Constant(_FLOAT, 0.0), vector]
    name = f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
    return _call(builder, name, _FLOAT, arguments, fastmath=("fast",))


def _call(builder: Any, name: str, result: Any, args: list[Any], **options: Any) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args, **options)

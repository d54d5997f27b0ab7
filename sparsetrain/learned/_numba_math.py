"""exp and log that LLVM can turn into vector code. Importing this needs numba.

Numba calls the C library for them, one number at a time. These are the polynomials of the Cephes
library (S. Moshier) for single precision: relative error about 1e-7.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_f, _i = np.float32, np.int32
_LOG2_E, _LN2_HIGH, _LN2_LOW = _f(1.44269504), _f(0.693359375), _f(-2.12194440e-4)
_E0, _E1, _E2 = _f(1.9875691500e-4), _f(1.3981999507e-3), _f(8.3334519073e-3)
_E3, _E4, _E5 = _f(4.1665795894e-2), _f(1.6666665459e-1), _f(5.0000001201e-1)
_L0, _L1, _L2 = _f(7.0376836292e-2), _f(-1.1514610310e-1), _f(1.1676998740e-1)
_L3, _L4, _L5 = _f(-1.2420140846e-1), _f(1.4249322787e-1), _f(-1.6668057665e-1)
_L6, _L7, _L8 = _f(2.0000714765e-1), _f(-2.4999993993e-1), _f(3.3333331174e-1)
_HALF, _ONE, _ROOT_HALF = _f(0.5), _f(1.0), _f(0.70710678)
_LEAST, _MOST = _f(-87.0), _f(88.0)
_BIAS, _SHIFT, _MANTISSA = _i(127), _i(23), _i(0x007FFFFF)
_HALF_BITS, _HALF_BIAS = _i(0x3F000000), _i(126)


@intrinsic  # type: ignore[untyped-decorator]
def _as_float(typing: Any, bits: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), build


@intrinsic  # type: ignore[untyped-decorator]
def _as_bits(typing: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), build


@intrinsic  # type: ignore[untyped-decorator]
def use_widest_registers(typing: Any) -> Any:
    """Have the function that calls this use vectors of 512 bits where the processor has them.

    LLVM takes half of that by default, as such processors once slowed down for the wide ones. For
    loops that compute more than they load, that is half the speed.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # llvmlite knows only attributes without a value and checks for them in its own `add`.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), build


@njit(fastmath={"contract", "nsz"}, cache=True)  # type: ignore[untyped-decorator]
def exp(x: Any) -> Any:
    """e^x for float32; x is clamped to [-87, 88]."""
    x = x if x > _LEAST else _LEAST
    x = x if x < _MOST else _MOST
    n = np.floor(x * _LOG2_E + _HALF)
    x = x - n * _LN2_HIGH - n * _LN2_LOW
    series = ((((_E0 * x + _E1) * x + _E2) * x + _E3) * x + _E4) * x + _E5
    power = _as_float(_i((_i(n) + _BIAS) << _SHIFT))
    return (series * x * x + x + _ONE) * power


@njit(fastmath={"contract", "nsz"}, cache=True)  # type: ignore[untyped-decorator]
def log(x: Any) -> Any:
    """Natural logarithm of a positive float32; that of 0 is about -87."""
    bits = _as_bits(x)
    exponent = _f(_i(bits >> _SHIFT) - _HALF_BIAS)
    x = _as_float(_i((bits & _MANTISSA) | _HALF_BITS))
    small = x < _ROOT_HALF
    exponent = exponent - _ONE if small else exponent
    x = x + x - _ONE if small else x - _ONE
    square = x * x
    high = ((_L0 * x + _L1) * x + _L2) * x + _L3
    series = ((((high * x + _L4) * x + _L5) * x + _L6) * x + _L7) * x + _L8
    series = series * x * square + exponent * _LN2_LOW - _HALF * square
    return x + series + exponent * _LN2_HIGH

"""Exponential, logarithm, error function, hyperbolic tangent and logistic function of float32 in whole vectors.

LLVM turns a vector of them into one call of the C library per lane, and a kernel spends most of its time there.
These are sums and products (and one division) instead, which every instruction set has in vectors. The coefficients
are minimax fits: of the exponential by linear programming, of the others by reweighted least squares.

Installed, they replace TVM's rules for the LLVM targets of the process, so that a kernel computes the
same whether a rule or the tuner scheduled it. Nothing of an integer graph goes through them but what it leaves in
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import tvm
from tvm import tirx

# TVM's own rules have level 10.
_ABOVE_TVM = 11
_LOG2_E = 1.4426950408889634
# log(2) in two parts: a multiple of the first, which ends in zeros, is exact.
_LOG_2 = (0.693359375, -2.12194440e-4)
# e^x for |x| <= log(2) / 2, constant term first; relative error 5.3e-8.
_EXP = (1.0, 0.9999993443489075, 0.4999889135360718, 0.1666819453239441, 0.04191873222589493, 0.008272635750472546)
# Beyond these the result is 0 or infinite in float32; below the first it would be denormal.
_EXP_RANGE = (-87.33654, 88.72283)
# Adding it rounds a float32 to an integer, which then stands in its low bits.
_ROUND = 12582912.0
_MANTISSA_BITS = 23
# log(1 + r) = r - r²/2 + r³·P(r) for 1 + r from √½ to √2, constant term first; relative error 5.9e-9.
_LOG = (
    0.3333333134651184,
    -0.2500081956386566,
    0.20001226663589478,
    -0.16623356938362122,
    0.14201757311820984,
    -0.13160182535648346,
    0.1276157796382904,
    -0.07634498178958893,
)
# The bits of √½, and below which a float32 is denormal.
_ROOT_OF_HALF_BITS = 0x3F3504F3
_LEAST_NORMAL = 1.17549435e-38
# erf(x) = x·P(x²) / Q(x²) for |x| up to the bound, where it is 1 but for 2.3e-8; absolute error below 8e-7. The last
# coefficient of P is 2e-6 above the fit, so that the quotient is not below 1 there.
_ERF_BOUND = 3.95
_ERF_P = (1.128376841545105, 0.34743383526802063, 0.07223129272460938, 0.01009764987975359, 0.0003596249360471265)
_ERF_Q = (
    1.0,
    0.6412118673324585,
    0.17784608900547028,
    0.027764080092310905,
    0.002567547606304288,
    2.06482127396157e-05,
)


def _let(value: tirx.PrimExpr, body: Callable[[tirx.Var], tirx.PrimExpr]) -> tirx.PrimExpr:
    """Return ``body`` of a value that it may read several times."""
    var = tirx.Var("t", value.ty)
    return tirx.Let(var, value, body(var))


def _like(x: tirx.PrimExpr, value: float, dtype: str = "float32") -> tirx.PrimExpr:
    """Return a constant of as many lanes as ``x``."""
    lanes = x.ty.dtype.lanes
    scalar = tirx.const(value, dtype)
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def _polynomial(coefficients: tuple[float, ...], x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return a polynomial of ``x``, its constant term first, by Horner's rule."""
    *rest, first = (_like(x, c) for c in coefficients)
    return reduce(lambda total, c: total * x + c, reversed(rest), first)


def exp(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return e^x within 2e-7 of it, as 2^n · e^r with n the integer nearest to x / log(2).

    What would be a denormal number is 0; infinities and NaN come out as they should.
    """
    lowest, highest = (_like(x, bound) for bound in _EXP_RANGE)
    integers = f"int32x{x.ty.dtype.lanes}" if x.ty.dtype.lanes > 1 else "int32"

    def power(bounded: tirx.Var, rounded: tirx.Var) -> tirx.PrimExpr:
        n = rounded - _like(x, _ROUND)
        rest = bounded - n * _like(x, _LOG_2[0]) - n * _like(x, _LOG_2[1])
        mantissa = tirx.reinterpret(integers, _let(rest, lambda r: _polynomial(_EXP, r)))
        exponent = tirx.shift_left(tirx.reinterpret(integers, rounded), _like(x, _MANTISSA_BITS, "int32"))
        return tirx.reinterpret(x.ty.dtype, mantissa + exponent)

    def whole(value: tirx.Var) -> tirx.PrimExpr:
        # With the bound as its first operand the minimum of it and NaN is NaN.
        bounded = tirx.max(lowest, tirx.min(highest, value))
        near = _let(
            bounded,
            lambda b: _let(b * _like(x, _LOG2_E) + _like(x, _ROUND), lambda rounded: power(b, rounded)),
        )
        near = tirx.Select(value < lowest, _like(x, 0.0), near)
        return tirx.Select(value > highest, _like(x, float("inf")), near)

    return _let(x, whole)


def log(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return the natural logarithm within 2e-7 of it, as n·log(2) + log(m) with m from √½ to √2.

    It is minus infinity of 0 and NaN of less; infinity and NaN come out as they should, denormal numbers as well.
    """
    lanes = x.ty.dtype.lanes
    integers = f"int32x{lanes}" if lanes > 1 else "int32"
    scale, bits = 2.0**_MANTISSA_BITS, _like(x, _MANTISSA_BITS, "int32")

    def series(n: tirx.Var, rest: tirx.Var) -> tirx.PrimExpr:
        square = rest * rest
        tail = rest * square * _polynomial(_LOG, rest) - _like(x, 0.5) * square + n * _like(x, _LOG_2[1])
        return n * _like(x, _LOG_2[0]) + (rest + tail)

    def near(value: tirx.Var) -> tirx.PrimExpr:
        tiny = value < _like(x, _LEAST_NORMAL)
        normal = tirx.reinterpret(integers, tirx.Select(tiny, value * _like(x, scale), value))

        def split(word: tirx.Var) -> tirx.PrimExpr:
            power = tirx.shift_right(word - _like(x, _ROOT_OF_HALF_BITS, "int32"), bits)

            def parts(exponent: tirx.Var) -> tirx.PrimExpr:
                mantissa = tirx.reinterpret(x.ty.dtype, word - tirx.shift_left(exponent, bits))
                less = tirx.Select(tiny, _like(x, float(_MANTISSA_BITS)), _like(x, 0.0))
                n = tirx.Cast(x.ty.dtype, exponent) - less
                return _let(n, lambda count: _let(mantissa - _like(x, 1.0), lambda rest: series(count, rest)))

            return _let(power, parts)

        infinite = _like(x, float("inf"))
        positive = tirx.Select(value < infinite, _let(normal, split), infinite)
        other = tirx.Select(tirx.EQ(value, _like(x, 0.0)), _like(x, -float("inf")), _like(x, float("nan")))
        return tirx.Select(value > _like(x, 0.0), positive, other)

    return _let(x, near)


def erf(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return the error function of x within 8e-7, exactly 1 and -1 where it is that in float32."""
    bound = _like(x, _ERF_BOUND)

    def quotient(bounded: tirx.Var) -> tirx.PrimExpr:
        return _let(bounded * bounded, lambda s: bounded * _polynomial(_ERF_P, s) / _polynomial(_ERF_Q, s))

    near = _let(tirx.max(_like(x, -_ERF_BOUND), tirx.min(bound, x)), quotient)
    return tirx.max(_like(x, -1.0), tirx.min(_like(x, 1.0), near))


def tanh(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return the hyperbolic tangent of x within 2e-7, as 1 - 2 / (e^(2x) + 1)."""
    one, two = _like(x, 1.0), _like(x, 2.0)
    return one - two / (exp(two * x) + one)


def sigmoid(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return 1 / (1 + e^-x) within 2e-7."""
    one = _like(x, 1.0)
    return one / (one + exp(_like(x, 0.0) - x))


def _register(function: Callable[[tirx.PrimExpr], tirx.PrimExpr]) -> None:
    """Make ``function`` the LLVM targets' rule for the operator of its name in float32; else TVM's remains."""
    name = f"tirx.{function.__name__}"
    keys = ("llvm.FLowerIntrinsic", "default.FLowerIntrinsic", "default.FLegalize")
    before = next(filter(None, map(tvm.ir.Op.get(name).get_attr, keys)))

    def lower(call: tvm.ir.Call) -> tirx.PrimExpr:
        (x,) = call.args
        kind, lanes = str(x.ty.dtype).split("x")[0], x.ty.dtype.lanes
        if kind == "float32":
            return function(x)
        if lanes == 1:
            return before(call)

        def lane(vector: tirx.Var, index: int) -> tirx.PrimExpr:
            return tirx.call_intrin(kind, name, tirx.Shuffle([vector], [index]))

        return _let(x, lambda vector: tirx.Shuffle([lane(vector, i) for i in range(lanes)], list(range(lanes))))

    tirx.register_intrin_lowering(name, target="llvm", f=lower, level=_ABOVE_TVM)
    # Without it a vectorized loop is taken apart before it gets here; of these TVM lets only erf's stay scalar.
    tvm.ir.register_op_attr(name, "TVectorizable", True, level=_ABOVE_TVM)


def install() -> None:
    """Register the rules with TVM."""
    for function in (exp, log, erf, tanh, sigmoid):
        _register(function)

"""Functions of every entry by itself: which scales and signs they let through, and sums and products."""

from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch

from learned_opt.symmetry.infer.engine import Engine, Parity, UnknownOperator, Value
from learned_opt.symmetry.infer.operators.registry import RULES, register_rule
from learned_opt.symmetry.infer.trees import ONE, normal, size_of

# (degree, parity): f(d x) = d^degree f(x) for d > 0, None if for d = 1 only; f(-x) = -f(x), f(x) or neither
_NEITHER = """gelu silu sigmoid exp exp2 log log2 log10 log1p expm1 elu selu celu softplus mish hardswish hardsigmoid
log_sigmoid relu6 erfc ceil floor logit alpha_dropout digamma lgamma log_ndtr special_log_ndtr special_ndtr
special_entr special_xlog1py special_expit i0e"""
_ODD = """tanh sin erf atan asinh tan sinh asin atanh softsign hardshrink softshrink round trunc
frac fix erfinv special_erfinv arctan arcsin arctanh arcsinh"""
UNARY: dict[str, tuple[int | Fraction | None, Parity]] = {
    **dict.fromkeys(("relu", "leaky_relu"), (1, None)),
    **dict.fromkeys(_NEITHER.split(), (None, None)),
    **dict.fromkeys(_ODD.split(), (None, "odd")),
    **dict.fromkeys(("cos", "cosh", "sinc", "special_sinc", "i0", "special_i0"), (None, "even")),
    **dict.fromkeys(("isnan", "isinf", "isfinite", "logical_not"), (0, "even")),
    **dict.fromkeys(("nan_to_num", "absolute"), (None, "odd")),
    "abs": (1, "even"),
    "neg": (1, "odd"),
    "sign": (0, "odd"),
    "sgn": (0, "odd"),
    "square": (2, "even"),
    "sqrt": (Fraction(1, 2), None),
    "rsqrt": (Fraction(-1, 2), None),
    "reciprocal": (-1, "odd"),
}
_COPIES = ("clone", "contiguous", "detach", "alias", "lift_fresh", "lift_fresh_copy", "positive")
_CASTS = ("to", "_to_copy", "type_as", "float", "double", "half", "bfloat16")
SAME = (*_COPIES, *_CASTS, "dropout", "feature_dropout")
for _name, (_degree, _parity) in UNARY.items():
    RULES[_name] = partial(
        lambda t, x, *a, degree, parity, **k: t.unary(x, degree, parity), degree=_degree, parity=_parity
    )


@register_rule(*SAME)
def same(t: Engine, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Identity (dropout: in distribution). A cast to integers or truth values lets no scale through."""
    to: torch.dtype = getattr(t.meta, "dtype", torch.float32)
    return x if to.is_floating_point or to.is_complex else replace(t.unary(x, None, None), zero=x.zero)


@register_rule("copy")
def copy(t: Engine, x: Value, source: Any, *args: Any) -> Value:
    """What is copied, spread to the shape of what it takes the place of."""
    if not isinstance(source, Value):
        raise UnknownOperator("a copy of a number")
    old = [*[ONE] * (len(x.axes) - len(source.axes)), *source.axes]
    axes = [normal(a) if size_of(a) == n else t.atom(n) for a, n in zip(old, x.shape, strict=True)]
    return same(t, Value(tuple(axes), source.zero))


@register_rule("fill", "zero")
def fill(t: Engine, x: Value, value: Any = 0) -> Value:
    """The same number everywhere."""
    if isinstance(value, Value):
        raise UnknownOperator("fill with a tensor")
    return Value(tuple(t.atom(n) for n in x.shape), value == 0)


@register_rule("native_dropout")
def native_dropout(t: Engine, x: Value, *args: Any) -> list[Any]:
    """Dropout that also returns its mask."""
    return [x, t.given(x.shape, "a mask")]


@register_rule("add", "sub", "rsub")
def add(t: Engine, a: Any, b: Any, alpha: float = 1) -> Value:
    """A sum."""
    return t.add(a, b)


@register_rule("mul", "multiply")
def mul(t: Engine, a: Any, b: Any) -> Value:
    """A product."""
    if isinstance(a, Value) and isinstance(b, Value):
        return t.mul(a, b)
    x, number = (a, b) if isinstance(a, Value) else (b, a)
    return replace(x, zero=x.zero or number == 0)


@register_rule("div", "true_divide")
def div(t: Engine, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    """A quotient."""
    if rounding_mode is not None:
        return t.unary(div(t, a, b), None, "odd" if rounding_mode == "trunc" else None)
    if not isinstance(b, Value):
        return a
    if not isinstance(a, Value):
        return t.unary(b, -1, "odd")
    return t.mul(a, b, inverse=True)


@register_rule("floor_divide")
def floor_divide(t: Engine, a: Any, b: Any) -> Value:
    """Nothing scales."""
    return div(t, a, b, "floor")


@register_rule("pow")
def power(t: Engine, x: Any, exponent: Any) -> Value:
    """Powers: homogeneous if the exponent is a number."""
    if isinstance(exponent, Value) or not isinstance(x, Value):
        return t.unary(t.add(x, exponent), None, None)
    e = Fraction(exponent).limit_denominator(64)
    if float(e) != float(exponent):
        raise UnknownOperator(f"pow({exponent})")
    parity: Parity = ("even", "odd")[int(e) % 2] if e.denominator == 1 else None
    return t.unary(x, e, parity)


@register_rule("hardtanh")
def hardtanh(t: Engine, x: Value, low: float = -1.0, high: float = 1.0) -> Value:
    """A clamp with bounds by default."""
    return clamp(t, x, low, high)


@register_rule("clamp", "clip")
def clamp(t: Engine, x: Value, low: Any = None, high: Any = None, **kwargs: Any) -> Value:
    """A clamp is odd if its bounds are; from 0 up it is a ReLU."""
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    if isinstance(low, Value) or isinstance(high, Value):
        raise UnknownOperator("clamp with tensors")
    if low == 0 and high is None:
        return t.unary(x, 1, None)
    return t.unary(x, None, "odd" if low is not None and high is not None and low == -high else None)


@register_rule("clamp_min", "threshold")
def clamp_min(t: Engine, x: Value, low: Any, value: Any = 0) -> Value:
    """``max(x, 0)`` is a ReLU."""
    return t.unary(x, 1 if low == 0 and value == 0 else None, None)


@register_rule("gt", "ge", "lt", "le", "eq", "ne")
def compare(t: Engine, x: Any, y: Any) -> Value:
    """A comparison with zero does not see positive scale."""
    if isinstance(x, Value) and not isinstance(y, Value):
        return t.unary(x, 0 if y == 0 else None, None)
    return t.unary(t.add(x, y), 0, None)


@register_rule("maximum", "minimum", "max", "min", "fmax", "fmin")
def maximum(t: Engine, a: Value, b: Any = None, *args: Any, **kwargs: Any) -> Any:
    """The larger of two: they scale alike and positively. (Over a dimension: with its index, which does not scale.)"""
    if isinstance(b, Value):
        return t.unary(t.add(a, b), 1, None)
    if b is None:
        return t.reduce(a, None, False, 1, None)
    largest = t.reduce(a, b, bool(args[0]) if args else bool(kwargs.get("keepdim")), 1, None)
    if 1 in t.results:
        t.restrict(a.axes[b], "positions of maxima")
    return [largest, t.unary(largest, 0, None)]


@register_rule("logical_and", "logical_or", "logical_xor")
def logical(t: Engine, a: Value, b: Value) -> Value:
    """Of two truth values, or of whether two numbers are zero."""
    return t.add(t.unary(a, 0, "even"), t.unary(b, 0, "even"))


@register_rule("hypot")
def hypotenuse(t: Engine, a: Value, b: Value) -> Value:
    """Homogeneous."""
    return t.unary(t.add(a, b), 1, "even")


@register_rule("atan2", "arctan2", "logaddexp", "logaddexp2", "fmod", "remainder", "xlogy", "special_xlogy")
def of_both(t: Engine, a: Any, b: Any, *args: Any, **kwargs: Any) -> Value:
    """A function of two entries: nothing scales."""
    return t.unary(t.add(a, b), None, None)


@register_rule("prelu")
def prelu(t: Engine, x: Value, w: Value) -> Value:
    """Slopes per channel, which do not scale."""
    y = t.unary(x, 1, None)
    slopes = Value((w.axes[0], *[ONE] * (len(x.axes) - 2)), weight=w.weight) if len(x.axes) > 1 else w
    t.unscaled(w.axes[0])
    return t.mul(y, slopes)


@register_rule("glu")
def glu(t: Engine, x: Value, dim: int = -1) -> Value:
    """``a sigmoid(b)``."""
    n = size_of(x.axes[dim]) // 2
    a, b = t.segments(x, dim, [n, n])
    return t.mul(a, t.unary(b, None, None))


@register_rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "softmin")
def softmax(t: Engine, x: Value, dim: int = -1, *args: Any, **kwargs: Any) -> Value:
    """No scale; its normaliser is a value without the axis."""
    x = t.unary(x, None, None)
    t.note(Value(tuple(a for d, a in enumerate(x.axes) if d != dim % len(x.axes))))
    return x


@register_rule("where")
def where(t: Engine, condition: Value, a: Any, b: Any) -> Value:
    """A choice between two by a mask."""
    if not isinstance(a, Value) and not isinstance(b, Value):
        return replace(t.unary(condition, None, None), zero=False)
    return masked(t, t.add(a, b), condition)


@register_rule("masked_fill")
def masked_fill(t: Engine, x: Value, mask: Value, value: Any) -> Value:
    """Entries replaced by a constant."""
    return masked(t, t.add(x, value), mask)


def masked(t: Engine, x: Value, mask: Value) -> Value:
    """The mask shares the labels of what it masks; along an axis of its own nothing scales."""
    axes = [*[ONE] * (len(mask.axes) - len(x.axes)), *x.axes]
    for d in range(-len(mask.axes), 0):
        mine = mask.axes[d]
        if size_of(mine) > 1:
            if size_of(axes[d]) > 1:
                t.unify(axes[d], mine, "a mask")
            else:
                axes[d] = t.unscaled(mine)
    return Value(tuple(map(normal, axes)))


@register_rule("_weight_norm")
def weight_norm(t: Engine, v: Value, g: Value, dim: int = 0) -> Value:
    """``g v / |v|``, the norm over all dimensions but one."""
    norm = t.reduce(v, [d for d in range(len(v.axes)) if d != dim], True, 1, "even")
    return t.mul(t.mul(v, g), norm, inverse=True)


@register_rule("linalg_vector_norm", "norm")
def vector_norm(t: Engine, x: Value, order: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
    """A norm: homogeneous and even. (That of order 0 counts.)"""
    if not isinstance(order, str) and order == 0:
        return t.reduce(x, dim, keepdim, 0, "even")
    return t.reduce(x, dim, keepdim, 1, "even")


@register_rule("mean", "sum")
def mean(t: Engine, x: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
    """A mean or a sum."""
    return t.reduce(x, dim, keepdim)


@register_rule("amax", "amin")
def amax(t: Engine, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    """A maximum."""
    return t.reduce(x, dim, keepdim, 1, None)


@register_rule("var")
def variance(t: Engine, x: Value, dim: Any = None, *args: Any, keepdim: bool = False, **kwargs: Any) -> Value:
    """Variance: even in all entries together, not in each by itself."""
    return _spread(t, x, dim, 2, keepdim, args)


@register_rule("std")
def deviation(t: Engine, x: Value, dim: Any = None, *args: Any, keepdim: bool = False, **kwargs: Any) -> Value:
    """Standard deviation: as the variance, but of degree 1."""
    return _spread(t, x, dim, 1, keepdim, args)


@register_rule("var_mean")
def variance_and_mean(t: Engine, x: Value, dim: Any = None, *args: Any, **kwargs: Any) -> list[Value]:
    """Both."""
    keep = bool(kwargs.get("keepdim")) or (len(args) > 1 and bool(args[1]))
    return [variance(t, x, dim, *args, **kwargs), t.reduce(x, dim, keep)]


@register_rule("std_mean")
def deviation_and_mean(t: Engine, x: Value, dim: Any = None, *args: Any, **kwargs: Any) -> list[Value]:
    """Both."""
    keep = bool(kwargs.get("keepdim")) or (len(args) > 1 and bool(args[1]))
    return [deviation(t, x, dim, *args, **kwargs), t.reduce(x, dim, keep)]


def _spread(t: Engine, x: Value, dim: Any, degree: int, keepdim: bool, args: Any) -> Value:
    if isinstance(dim, bool):
        raise UnknownOperator("a variance over everything")
    n = len(x.axes)
    for d in range(n) if dim is None or dim == [] else dim if isinstance(dim, (list, tuple)) else [dim]:
        t.unscaled(x.axes[d])
    return t.reduce(x, dim, keepdim or (len(args) > 1 and bool(args[1])), degree, "even")


@register_rule("logsumexp")
def logsumexp(t: Engine, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    """Nothing scales."""
    return t.reduce(x, dim, keepdim, None, None)

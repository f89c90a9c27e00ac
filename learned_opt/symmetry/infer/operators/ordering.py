"""Operators that look at the order of positions or of values: sorting, choosing, counting, running sums."""

from typing import Any

from learned_opt.symmetry.infer.engine import Engine, UnknownOperator, Value
from learned_opt.symmetry.infer.operators.registry import register_rule
from learned_opt.symmetry.infer.operators.shape import spatial
from learned_opt.symmetry.infer.trees import Tree, size_of


def _with(x: Value, dim: int, axis: Tree) -> Value:
    return Value((*x.axes[:dim], axis, *x.axes[dim + 1 :]), x.zero)


def _values_and_places(t: Engine, x: Value, dim: int, keep: bool = True) -> list[Value]:
    """Chosen values scale as they did, by positive factors alike for all that are compared; places do not scale."""
    dim %= max(1, len(x.axes))
    axis = spatial(t, x.axes[dim], t.meta[0].shape[dim] if keep else 1, "an order of values")
    y = t.unary(_with(x, dim, axis), 1, None)
    if not keep:
        y = Value(tuple(a for d, a in enumerate(y.axes) if d != dim), y.zero)
    return [y, t.unary(y, 0, None)]


@register_rule("topk")
def topk(t: Engine, x: Value, k: int, dim: int = -1, *args: Any, **kwargs: Any) -> list[Value]:
    """The largest along an axis, which is fixed."""
    return _values_and_places(t, x, dim)


@register_rule("sort", "msort")
def sort(t: Engine, x: Value, *args: Any, **kwargs: Any) -> list[Value]:
    """All in order. (With ``stable`` given, as a keyword.)"""
    plain = [a for a in args if not isinstance(a, bool) and a is not None]
    return _values_and_places(t, x, kwargs.get("dim", plain[0] if plain else -1))


@register_rule("kthvalue")
def kthvalue(t: Engine, x: Value, k: int, dim: int = -1, keepdim: bool = False) -> list[Value]:
    """One of them."""
    return _values_and_places(t, x, dim, keepdim)


@register_rule("median", "nanmedian", "mode")
def median(t: Engine, x: Value, dim: Any = None, keepdim: bool = False) -> Any:
    """The one in the middle."""
    if dim is None:
        return t.reduce(x, None, False, 1, None)
    return _values_and_places(t, x, dim, keepdim)


@register_rule("cummax", "cummin")
def cummax(t: Engine, x: Value, dim: int) -> list[Value]:
    """The largest so far."""
    return _values_and_places(t, x, dim)


@register_rule("argmax", "argmin")
def argmax(t: Engine, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    """A place: the axis is fixed, and nothing scales but positively."""
    for d in range(len(x.axes)) if dim is None else [dim]:
        t.restrict(x.axes[d], "positions of maxima")
    return t.reduce(x, dim, keepdim, 0, None)


@register_rule("argsort")
def argsort(t: Engine, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Places in order."""
    plain = [a for a in args if not isinstance(a, bool)]
    dim = kwargs.get("dim", plain[0] if plain else -1) % len(x.axes)
    return t.unary(_with(x, dim, spatial(t, x.axes[dim], size_of(x.axes[dim]), "an order of values")), 0, None)


@register_rule("histc", "bincount", "one_hot", "bucketize", "searchsorted")
def counted(t: Engine, x: Any, *args: Any, **kwargs: Any) -> Value:
    """Of whole numbers, as a rule, which have no labels that move."""
    for z in (x, *args):
        if isinstance(z, Value):
            for a in z.axes:
                t.unscaled(a)
            t.kill(z, "a count")
    return t.given([int(n) for n in t.meta.shape], "a count")


@register_rule("cumsum")
def cumulative(t: Engine, x: Value, dim: int, **kwargs: Any) -> Value:
    """Along an axis with an order, which is fixed; along the others linear."""
    dim %= len(x.axes)
    t.unscaled(x.axes[dim])
    t.restrict(x.axes[dim], "a cumulative sum")
    return x


@register_rule("cumprod", "logcumsumexp")
def cumulative_product(t: Engine, x: Value, dim: int, **kwargs: Any) -> Value:
    """As a cumulative sum; nothing scales."""
    dim %= len(x.axes)
    return t.unary(_with(x, dim, spatial(t, x.axes[dim], size_of(x.axes[dim]), "a cumulative product")), None, None)


@register_rule("diff")
def difference(t: Engine, x: Value, n: int = 1, dim: int = -1, *args: Any, **kwargs: Any) -> Value:
    """Of neighbours along an axis, which is fixed."""
    if args or kwargs:
        raise UnknownOperator("diff with what is before or behind")
    dim %= len(x.axes)
    return _with(x, dim, spatial(t, x.axes[dim], t.meta.shape[dim], "differences"))


@register_rule("prod")
def product_of(t: Engine, x: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
    """Symmetric; nothing scales."""
    return t.reduce(x, dim, keepdim, None, None)


@register_rule("any", "all", "count_nonzero")
def any_of(t: Engine, x: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
    """Whether entries are zero: no scale and no sign matters."""
    return t.reduce(x, dim, keepdim, 0, "even")


@register_rule("aminmax")
def aminmax(t: Engine, x: Value, *, dim: Any = None, keepdim: bool = False) -> list[Value]:
    """The smallest and the largest."""
    y = t.reduce(x, dim, keepdim, 1, None)
    return [y, y]

"""Positions picked, and written to, by tensors of indices: the axis that is indexed is fixed, the others go along."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from learned_opt.symmetry.infer.engine import Engine, UnknownOperator, Value
from learned_opt.symmetry.infer.operators.elementwise import masked
from learned_opt.symmetry.infer.operators.registry import register_rule
from learned_opt.symmetry.infer.operators.shape import spatial, unsqueeze
from learned_opt.symmetry.infer.trees import Tree, normal, size_of

_WHY = "positions picked by an index"


@register_rule("index")
def index(t: Engine, x: Value, indices: Sequence[Any]) -> Value:
    """Axes gathered by tensors of positions: those axes are fixed."""
    at = _indexed(t, indices)
    for d in at:
        t.unscaled(x.axes[d])
        t.restrict(x.axes[d], _WHY)
    t.kill([indices[d] for d in at], "an index")
    t.role(x, dict.fromkeys(at, "lookup"))
    rest = [a for d, a in enumerate(x.axes) if d not in at]
    picked = [t.opaque(k, _WHY) for k in _picked(t.meta.shape, at, len(rest))]
    first = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    return replace(x, axes=(*rest[:first], *picked, *rest[first:]))


def _indexed(t: Engine, indices: Sequence[Any]) -> list[int]:
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in t.given_as[1]):
        raise UnknownOperator("an index by a mask")
    if any(i is not None and not isinstance(i, Value) for i in indices):
        raise UnknownOperator("an index that is no tensor")
    return [d for d, i in enumerate(indices) if i is not None]


def is_scalar(x: Value) -> bool:
    """Whether a tensor has one entry."""
    return all(size_of(a) == 1 for a in x.axes)


def _picked(shape: Sequence[int], at: Sequence[int], rest: int) -> list[int]:
    first = at[0] if list(at) == list(range(at[0], at[-1] + 1)) else 0
    return list(shape)[first : first + len(shape) - rest]


@register_rule("index_put", "_unsafe_index_put")
def index_put(t: Engine, x: Value, indices: Sequence[Any], values: Value, accumulate: bool = False) -> Value:
    """Entries replaced, or added to, at tensors of positions."""
    masks = t.given_as[1]
    if len(masks) == 1 and masks[0].dtype == torch.bool and list(masks[0].shape) == x.shape and is_scalar(values):
        return masked(t, t.add(x, values), indices[0])
    at = _indexed(t, indices)
    if at != list(range(len(at))):
        raise UnknownOperator("index_put of later axes")
    t.kill([indices[d] for d in at], "an index")
    x = _fixed_at(t, x, at)
    rest = len(x.axes) - len(at)
    for a in values.axes[: max(0, len(values.axes) - rest)]:
        t.unscaled(a)
        t.restrict(a, _WHY)
    last = replace(values, axes=values.axes[max(0, len(values.axes) - rest) :])
    tail = t.add(replace(x, axes=x.axes[len(at) :]), last) if rest else x
    return Value((*x.axes[: len(at)], *(tail.axes if rest else ())), x.zero and values.zero)


@register_rule("index_select")
def index_select(t: Engine, x: Value, dim: int, indices: Value) -> Value:
    """One axis gathered."""
    dim %= len(x.axes)
    t.role(x, {dim: "lookup"})
    t.kill(indices, "an index")
    return _with(x, dim, spatial(t, x.axes[dim], t.meta.shape[dim], _WHY))


@register_rule("embedding")
def embedding(t: Engine, w: Value, indices: Value, *args: Any, **kwargs: Any) -> Value:
    """Rows of a table."""
    t.role(w, {0: "lookup", 1: "out"})
    t.unscaled(w.axes[0])
    t.restrict(w.axes[0], "rows of a table")
    return Value((*(t.unscaled(a) for a in indices.axes), w.axes[1]), weight=False)


@register_rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(
    t: Engine, w: Value, indices: Value, offsets: Value, scale: bool = False, mode: int = 0, sparse: bool = False,
    weights: Value | None = None, *args: Any, **kwargs: Any,
) -> list[Any]:  # fmt: skip
    """Sums (0), means (1) or maxima (2) of rows of a table."""
    t.role(w, {0: "lookup", 1: "out"})
    t.unscaled(w.axes[0])
    t.restrict(w.axes[0], "rows of a table")
    for z in (indices, offsets, weights):
        if z is not None:
            for a in z.axes:
                t.unscaled(a)
            t.kill(z, "an index")
    bags = t.meta[0].shape[0]
    y = Value((t.opaque(bags, "bags") if bags > 1 else t.atom(1), normal(w.axes[1])))
    others = [t.given([int(n) for n in m.shape], "bags") for m in t.meta[1:]]
    if mode == 2 and 3 in t.results:
        t.kill(y, "places of maxima")
    return [y if mode != 2 else t.unary(y, 1, None), *others]


# ------------------------------------------------------------------------------- one index for every entry
def _along(t: Engine, x: Value, dim: int, index: Value) -> list[Tree]:
    """The axes but ``dim`` of what an index of its own for every entry picks of ``x``: those that both share."""
    axes: list[Tree] = []
    for d, (a, i) in enumerate(zip(x.axes, index.axes, strict=True)):
        if d == dim:
            t.unscaled(a)
            t.restrict(a, _WHY)
            t.restrict(i, _WHY)
        elif size_of(a) == size_of(i):
            if size_of(a) > 1:
                t.unify(a, i, "an index for every entry")
        else:
            t.unscaled(a)
            t.restrict(a, _WHY)
            t.restrict(i, _WHY)
        t.unscaled(i)
        axes.append(normal(a) if size_of(a) == size_of(i) and d != dim else t.opaque(size_of(i), _WHY))
    return axes


@register_rule("gather")
def gather(t: Engine, x: Value, dim: int, index: Value, **kwargs: Any) -> Value:
    """``out[i, j] = x[index[i, j], j]``."""
    return replace(x, axes=tuple(_along(t, x, dim % len(x.axes), index)))


@register_rule("take_along_dim")
def take_along_dim(t: Engine, x: Value, index: Value, dim: int | None = None) -> Value:
    """A gather with axes of size 1 spread."""
    if dim is None or len(index.axes) != len(x.axes):
        raise UnknownOperator("take_along_dim of a flat tensor")
    dim %= len(x.axes)
    if any(size_of(a) != size_of(i) for d, (a, i) in enumerate(zip(x.axes, index.axes, strict=True)) if d != dim):
        raise UnknownOperator("take_along_dim that broadcasts")
    return gather(t, x, dim, index)


_LINEAR, _EXTREME = ("sum", "add", "mean"), ("amax", "amin", "max", "min")


def _combined(t: Engine, x: Value, source: Value, how: str | None) -> Value:
    """What was there and what is written there: replaced, summed, the larger of both."""
    y = t.add(x, source)
    if how is None or how in _LINEAR:
        return y
    return t.unary(y, 1 if how in _EXTREME else None, None)


@register_rule("scatter_add", "scatter_reduce", "scatter")
def scatter(
    t: Engine, x: Value, dim: int, index: Value, source: Any = None, reduce: str | None = None, **kwargs: Any
) -> Value:
    """``x[index[i, j], j] = (or +=) source[i, j]``."""
    dim, source = dim % len(x.axes), kwargs.get("value", kwargs.get("src", source))
    reduce = kwargs.get("reduce", reduce)
    shape = [t.opaque(size_of(a), _WHY) if d == dim else a for d, a in enumerate(x.axes)]
    _along(t, x, dim, index)
    if not isinstance(source, Value):
        y = t.add(x, source)
        return replace(t.unary(y, None, None) if reduce else y, axes=tuple(map(normal, y.axes)))
    if any(size_of(s) != size_of(i) for s, i in zip(source.axes, index.axes, strict=True)):
        raise UnknownOperator("scatter of a part of its source")
    _along(t, source, dim, index)
    for d, (a, s) in enumerate(zip(x.axes, source.axes, strict=True)):
        if d != dim and size_of(a) != size_of(s):
            raise UnknownOperator("scatter to a part")
    at = replace(source, axes=tuple(shape[d] if d == dim else normal(a) for d, a in enumerate(source.axes)))
    there = replace(x, axes=tuple(shape[d] if d == dim else normal(a) for d, a in enumerate(x.axes)))
    return replace(_combined(t, there, at, reduce), weight=False)


@register_rule("index_add", "index_copy", "index_reduce")
def index_add(t: Engine, x: Value, dim: int, indices: Value, source: Value, *args: Any, **kwargs: Any) -> Value:
    """Slices added to, or put in the place of, those at the positions."""
    dim %= len(x.axes)
    t.kill(indices, "an index")
    how = next((a for a in args if isinstance(a, str)), None)
    there, written = _fixed_at(t, x, [dim]), _fixed_at(t, source, [dim])
    written = _with(written, dim, there.axes[dim])
    return replace(_combined(t, there, written, {"prod": "prod"}.get(how or "", how)), weight=False)


@register_rule("index_fill")
def index_fill(t: Engine, x: Value, dim: int, indices: Value, value: Any) -> Value:
    """Slices filled with a number."""
    t.kill(indices, "an index")
    return t.add(_fixed_at(t, x, [dim % len(x.axes)]), 0 if isinstance(value, Value) and value.zero else value)


@register_rule("segment_reduce")
def segment_reduce(t: Engine, x: Value, reduce: str, *, axis: int = 0, **kwargs: Any) -> Value:
    """Sums, means or maxima of runs along an axis."""
    t.kill([v for v in kwargs.values() if isinstance(v, Value)], "segments")
    y = _with(x, axis, spatial(t, x.axes[axis], t.meta.shape[axis], "segments"))
    initial = kwargs.get("initial")
    shifted = initial is not None and initial != 0
    return t.unary(y, None if shifted or reduce == "prod" else 1, "odd" if reduce in _LINEAR and not shifted else None)


@register_rule("slice_scatter")
def slice_scatter(
    t: Engine, x: Value, source: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    """A range of positions replaced."""
    dim %= len(x.axes)
    n = size_of(x.axes[dim])
    start, end, step = slice(start, end, step).indices(n)
    if step != 1 or end <= start:
        raise UnknownOperator("slice_scatter with steps")
    if (start, end) == (0, n):
        return source
    parts = t.segments(x, dim, [k for k in (start, end - start, n - end) if k])
    parts[1 if start else 0] = source
    return t.join(parts, dim)


@register_rule("select_scatter")
def select_scatter(t: Engine, x: Value, source: Value, dim: int, index: int) -> Value:
    """One position replaced."""
    dim %= len(x.axes)
    n = size_of(x.axes[dim])
    return slice_scatter(t, x, unsqueeze(t, source, dim), dim, index % n, index % n + 1)


def _fixed_at(t: Engine, x: Value, dims: Sequence[int]) -> Value:
    for d in dims:
        x = _with(x, d, spatial(t, x.axes[d], size_of(x.axes[d]), _WHY))
    return x


def _with(x: Value, dim: int, axis: Tree) -> Value:
    return replace(x, axes=(*x.axes[:dim], axis, *x.axes[dim + 1 :]))

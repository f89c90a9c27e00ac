"""Views, selections, concatenations: which positions of which axis go where."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from learned_opt.symmetry.infer.engine import Engine, Stack, UnknownOperator, Value
from learned_opt.symmetry.infer.operators.registry import register_rule
from learned_opt.symmetry.infer.trees import ONE, Concatenation, Tree, normal, product, size_of


@register_rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "ravel")
def view(t: Engine, x: Value, *args: Any, **kwargs: Any) -> Any:
    """Any row-major reshape: the result's shape says it all."""
    return t.view(x, t.meta.shape)


@register_rule("permute")
def permute(t: Engine, x: Value, dims: Sequence[int]) -> Value:
    """Axes in another order."""
    return replace(x, axes=tuple(x.axes[d] for d in dims))


@register_rule("transpose", "swapaxes", "swapdims")
def transpose(t: Engine, x: Value, a: int, b: int) -> Value:
    """Two axes swapped."""
    order = list(range(len(x.axes)))
    order[a], order[b] = order[b], order[a]
    return permute(t, x, order)


@register_rule("movedim", "moveaxis")
def movedim(t: Engine, x: Value, source: Any, target: Any) -> Value:
    """Axes moved."""
    return permute(t, x, moved_order(len(x.axes), source, target))


def moved_order(n: int, source: Any, target: Any) -> list[int]:
    """The permutation of ``n`` axes that ``movedim`` is."""
    src = [d % n for d in (source if isinstance(source, (list, tuple)) else [source])]
    dst = [d % n for d in (target if isinstance(target, (list, tuple)) else [target])]
    rest = iter(d for d in range(n) if d not in src)
    return [src[dst.index(d)] if d in dst else next(rest) for d in range(n)]


@register_rule("t", "numpy_T", "mT", "matrix_H", "adjoint")
def matrix_transpose(t: Engine, x: Value) -> Value:
    """The last two axes swapped."""
    return transpose(t, x, -2, -1) if len(x.axes) > 1 else x


@register_rule("unsqueeze")
def unsqueeze(t: Engine, x: Value, dim: int) -> Value:
    """A new axis of size 1."""
    dim %= len(x.axes) + 1
    return replace(x, axes=(*x.axes[:dim], ONE, *x.axes[dim:]))


@register_rule("squeeze")
def squeeze(t: Engine, x: Value, dim: Any = None) -> Value:
    """Axes of size 1 removed."""
    n = len(x.axes)
    dims = range(n) if dim is None else [d % n for d in (dim if isinstance(dim, (list, tuple)) else [dim])]
    return replace(x, axes=tuple(a for d, a in enumerate(x.axes) if d not in dims or size_of(a) != 1))


@register_rule("expand", "expand_as", "broadcast_to")
def expand(t: Engine, x: Value, *args: Any, **kwargs: Any) -> Value:
    """New positions are copies: any permutation of them is the identity, but they do not scale."""
    shape = list(t.meta.shape)
    old = [*[ONE] * (len(shape) - len(x.axes)), *x.axes]
    return replace(x, axes=tuple(a if size_of(a) == n else t.atom(n) for a, n in zip(old, shape, strict=True)))


@register_rule("repeat", "tile")
def repeat(t: Engine, x: Value, counts: Sequence[int]) -> Value:
    """Copies one after the other: a new outer factor of the axis."""
    old = [*[ONE] * (len(counts) - len(x.axes)), *x.axes]
    counts = [*[1] * (len(old) - len(counts)), *counts]  # of tile
    axes = []
    for a, k in zip(old, counts, strict=True):
        copies = [a] * k
        if k == 0 or (k > 1 and size_of(a) == 1):
            axes.append(t.atom(size_of(a) * k))
        else:
            axes.append(normal(Concatenation(tuple(copies))) if k > 1 else a)
    return replace(x, axes=tuple(axes))


@register_rule("repeat_interleave")
def repeat_interleave(t: Engine, x: Value, repeats: Any, dim: int | None = None, **kwargs: Any) -> Any:
    """Every position ``repeats`` times: a new inner factor (grouped-query attention)."""
    if not isinstance(repeats, int) or dim is None:
        raise UnknownOperator("repeat_interleave with a tensor")
    dim %= len(x.axes)
    axis = product([normal(x.axes[dim]), t.atom(repeats)])
    return replace(x, axes=(*x.axes[:dim], axis, *x.axes[dim + 1 :]))


@register_rule("select")
def select(t: Engine, x: Value, dim: int, index: int) -> Value:
    """One position."""
    dim %= len(x.axes)
    n = size_of(x.axes[dim])
    if n > 1:
        index %= n
        sizes = [k for k in (index, 1, n - index - 1) if k]
        t.mark_stack(x.axes[dim], sizes)
        t.single(t.cut(x.axes[dim], sizes, "one position")[1 if index else 0])
    return replace(x, axes=(*x.axes[:dim], *x.axes[dim + 1 :]))


@register_rule("slice", "narrow")
def slice_(t: Engine, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    """A range of positions."""
    dim %= len(x.axes)
    n = size_of(x.axes[dim])
    start, end, step = slice(start, end, step).indices(n)
    if (start, end, step) == (0, n, 1):
        return x
    if end <= start:
        return _replaced(x, dim, Concatenation(()))
    if step != 1:
        t.unscaled(x.axes[dim])
        t.restrict(x.axes[dim], "a strided slice")
        return _replaced(x, dim, t.opaque(t.meta.shape[dim], "a strided slice"))
    sizes = [k for k in (start, end - start, n - end) if k]
    return t.segments(x, dim, sizes)[1 if start else 0]


def _replaced(x: Value, dim: int, axis: Tree) -> Value:
    return replace(x, axes=(*x.axes[:dim], axis, *x.axes[dim + 1 :]))


@register_rule("split", "split_with_sizes", "chunk", "tensor_split")
def split(t: Engine, x: Value, sizes: Any, dim: int = 0) -> list[Value]:
    """Consecutive segments."""
    return t.segments(x, dim, [m.shape[dim] for m in t.meta])


@register_rule("unbind")
def unbind(t: Engine, x: Value, dim: int = 0) -> list[Value]:
    """All positions of an axis."""
    return [select(t, x, dim, i) for i in range(x.shape[dim])]


@register_rule("cat", "concat", "concatenate")
def cat(t: Engine, xs: Sequence[Value], dim: int = 0) -> Value:
    """Axes one after the other."""
    xs = [x for x in xs if x.shape != [0]]
    return t.join(xs, dim)


@register_rule("stack")
def stack(t: Engine, xs: Sequence[Value], dim: int = 0) -> Any:
    """A new axis along which different tensors stand."""
    return Stack(dim % (len(xs[0].axes) + 1), tuple(xs))


@register_rule("roll")
def roll(t: Engine, x: Value, shifts: Any, dims: Any = ()) -> Value:
    """Positions moved along axes, which are fixed."""
    if isinstance(dims, (list, tuple)) and not dims:
        raise UnknownOperator("roll of a flat tensor")
    return flip(t, x, dims)


@register_rule("flip")
def flip(t: Engine, x: Value, dims: Any) -> Value:
    """As a roll."""
    for d in dims if isinstance(dims, (list, tuple)) else [dims]:
        x = _replaced(x, d % len(x.axes), spatial(t, x.axes[d], size_of(x.axes[d]), "positions moved"))
    return x


def spatial(t: Engine, axis: Tree, size: int, why: str) -> Tree:
    """An axis with a geometry: fixed, without scale, and another one after the operator."""
    t.unscaled(axis)
    t.restrict(axis, why)
    return t.opaque(size, why)


@register_rule("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "replication_pad2d")
def pad(t: Engine, x: Value, padding: Sequence[int], mode: Any = "constant", value: Any = None) -> Value:
    """Padding of the last axes, which are fixed."""
    value = mode if not isinstance(mode, str) else value
    n = len(x.axes)
    for i in range(len(padding) // 2):
        d = n - 1 - i
        if padding[2 * i] or padding[2 * i + 1]:
            x = _replaced(x, d, spatial(t, x.axes[d], t.meta.shape[d], "padding"))
    return t.unary(x, None, None) if value else x


@register_rule("tril", "triu")
def triangle(t: Engine, x: Value, diagonal: int = 0) -> Value:
    """A mask of the last two axes by their order."""
    axes = [spatial(t, a, size_of(a), "a triangular mask") for a in x.axes[-2:]]
    return replace(x, axes=(*x.axes[:-2], *axes))


@register_rule("unfold")
def unfold(t: Engine, x: Value, dim: int, size: int, step: int) -> Value:
    """Sliding windows along an axis, which is fixed."""
    dim %= len(x.axes)
    count, window = t.meta.shape[dim], t.meta.shape[-1]
    windows = spatial(t, x.axes[dim], count, "sliding windows")
    return Value((*x.axes[:dim], windows, *x.axes[dim + 1 :], t.opaque(window, "sliding windows")), x.zero)


@register_rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(t: Engine, x: Value, factor: int) -> Value:
    """Channels to space: (c, r, r) channels become c, the rest positions."""
    channels, *_ = t.meta.shape[-3:]
    if channels > x.shape[-3]:
        raise UnknownOperator("pixel_unshuffle")
    c, r = t.factor(x.axes[-3], [channels, x.shape[-3] // channels], "pixels")
    spatial(t, r, 1, "pixels")
    space = [spatial(t, a, n, "pixels") for a, n in zip(x.axes[-2:], t.meta.shape[-2:], strict=True)]
    return replace(x, axes=(*x.axes[:-3], c, *space))

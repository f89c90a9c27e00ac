"""Operators on a stack: a tensor that is different tensors along one dimension, each with labels of its own."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from learned_opt.symmetry.infer.engine import Engine, Stack, Value
from learned_opt.symmetry.infer.operators.elementwise import SAME, UNARY
from learned_opt.symmetry.infer.operators.registry import RULES
from learned_opt.symmetry.infer.operators.shape import moved_order, unsqueeze

_PIECEWISE = {*SAME, *UNARY}


def on_stack(t: Engine, name: str, x: Stack, args: Sequence[Any], kwargs: Any) -> Any:
    """The operator's result, or None where the stack must first become one tensor."""
    if name in _PIECEWISE:
        return Stack(x.dim, tuple(RULES[name](t, p, *args, **kwargs) for p in x.pieces))
    if name in _STACKED:
        return _STACKED[name](t, x, *args, **kwargs)
    return None


def _inner(x: Stack, dim: int) -> int | None:
    """Dimension of the pieces; None for that of the stack."""
    dim %= len(x.shape)
    return None if dim == x.dim else dim - (dim > x.dim)


def _select(t: Engine, x: Stack, dim: int, index: int) -> Any:
    inner = _inner(x, dim)
    if inner is None:
        return x.pieces[index]
    pieces = tuple(RULES["select"](t, p, inner, index) for p in x.pieces)
    return Stack(x.dim - (inner < x.dim), pieces)


def _unbind(t: Engine, x: Stack, dim: int = 0) -> Any:
    return list(x.pieces) if _inner(x, dim) is None else None


def _permute(t: Engine, x: Stack, dims: Sequence[int]) -> Any:
    order = [d % len(x.shape) for d in dims]
    inner = [d - (d > x.dim) for d in order if d != x.dim]
    return Stack(order.index(x.dim), tuple(RULES["permute"](t, p, inner) for p in x.pieces))


def _transpose(t: Engine, x: Stack, a: int, b: int) -> Any:
    order = list(range(len(x.shape)))
    order[a], order[b] = order[b], order[a]
    return _permute(t, x, order)


def _movedim(t: Engine, x: Stack, source: Any, target: Any) -> Any:
    return _permute(t, x, moved_order(len(x.shape), source, target))


def _unsqueeze(t: Engine, x: Stack, dim: int) -> Any:
    dim %= len(x.shape) + 1
    before = dim <= x.dim
    return Stack(x.dim + before, tuple(unsqueeze(t, p, dim if before else dim - 1) for p in x.pieces))


def _squeeze(t: Engine, x: Stack, dim: Any = None) -> Any:
    n = len(x.shape)
    dims = set(range(n)) if dim is None else {d % n for d in (dim if isinstance(dim, (list, tuple)) else [dim])}
    gone = {d for d in dims if d != x.dim and x.shape[d] == 1}
    if x.dim in dims and len(x.pieces) == 1:
        return None
    keep = [i for i, d in enumerate(d for d in range(n) if d != x.dim) if d not in gone]
    pieces = tuple(replace(p, axes=tuple(p.axes[i] for i in keep)) for p in x.pieces)
    return Stack(x.dim - sum(d < x.dim for d in gone), pieces)


def _segments(t: Engine, x: Stack, dim: int, counts: Sequence[int]) -> Any:
    if _inner(x, dim) is not None:
        return None
    result: list[Value | Stack] = []
    start = 0
    for n in counts:
        pieces = x.pieces[start : start + n]
        start += n
        result.append(unsqueeze(t, pieces[0], x.dim) if n == 1 else Stack(x.dim, pieces))
    return result


def _split(t: Engine, x: Stack, sizes: Any, dim: int = 0) -> Any:
    return _segments(t, x, dim, [m.shape[dim] for m in t.meta])


def _slice(t: Engine, x: Stack, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if _inner(x, dim) is not None:
        return None
    chosen = x.pieces[slice(start, end, step)]
    return (unsqueeze(t, chosen[0], x.dim) if len(chosen) == 1 else Stack(x.dim, chosen)) if chosen else None


def _view(t: Engine, x: Stack, *args: Any) -> Any:
    """A view that leaves the dimension of the stack alone."""
    old, new, d = x.shape, list(t.meta.shape), x.dim
    if old[: d + 1] == new[: d + 1]:
        at = d
    elif len(old) - d <= len(new) and old[d:] == new[len(new) - (len(old) - d) :]:
        at = len(new) - (len(old) - d)
    else:
        return None
    views = [t.view(p, [*new[:at], *new[at + 1 :]]) for p in x.pieces]
    pieces = tuple(v for v in views if isinstance(v, Value))
    return Stack(at, pieces) if len(pieces) == len(views) else None


_STACKED: dict[str, Callable[..., Any]] = {
    "select": _select,
    "unbind": _unbind,
    "permute": _permute,
    "transpose": _transpose,
    **dict.fromkeys(("movedim", "moveaxis"), _movedim),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _split,
    "slice": _slice,
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "_unsafe_view"), _view),
}

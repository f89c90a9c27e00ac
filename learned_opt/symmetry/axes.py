"""Axes as data: what the indices of one dimension of a weight are, and tensors cut along them into pieces.

* a **leaf** is one index: its size, its *permutation label* (leaves with one label are permuted by one permutation;
  ``None`` is fixed) and its *scale labels* with exponents (+1 written, -1 read);
* an **axis** is a leaf, a product of axes (row-major: ``heads x head_dim``, ``channel x height x width``) or a sum of
  axes (concatenation: ``q | k | v``).

These are finished axes; while labels are being inferred, axes are the trees of :mod:`learned_opt.symmetry.infer.trees`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Leaf:
    """One index: ``size`` positions, permuted by ``label`` (None: fixed), scaled by each of ``scale``."""

    size: int
    label: str | None = None
    scale: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Prod:
    """A row-major composite axis, such as ``heads x head_dim``."""

    factors: tuple["Axis", ...]


@dataclass(frozen=True)
class Sum:
    """A concatenated axis, such as ``q | k | v``."""

    parts: tuple["Axis", ...]


Axis = Leaf | Prod | Sum


def size_of(axis: Axis) -> int:
    """Number of positions of an axis."""
    if isinstance(axis, Leaf):
        return axis.size
    if isinstance(axis, Prod):
        return math.prod(size_of(a) for a in axis.factors)
    return sum(size_of(a) for a in axis.parts)


def leaves_of(axis: Axis) -> Iterator[Leaf]:
    """The leaves of an axis, from left to right."""
    if isinstance(axis, Leaf):
        yield axis
    else:
        for part in axis.factors if isinstance(axis, Prod) else axis.parts:
            yield from leaves_of(part)


def map_leaves(function: Callable[[Leaf], Leaf], axis: Axis) -> Axis:
    """The same axis with other leaves."""
    if isinstance(axis, Leaf):
        return function(axis)
    if isinstance(axis, Prod):
        return Prod(tuple(map_leaves(function, a) for a in axis.factors))
    return Sum(tuple(map_leaves(function, a) for a in axis.parts))


def alternatives(axis: Axis) -> list[tuple[Leaf, ...]]:
    """An axis as a list of pieces, each a row-major product of leaves (Sum distributes over Prod)."""
    if isinstance(axis, Leaf):
        return [(axis,)]
    if isinstance(axis, Sum):
        return [piece for part in axis.parts for piece in alternatives(part)]
    return [sum(choice, ()) for choice in choices(axis.factors)]


def choices(axes: Sequence[Axis]) -> Iterator[tuple[tuple[Leaf, ...], ...]]:
    """One alternative of every axis, in all combinations, the last axis varying fastest."""
    return product(*(alternatives(a) for a in axes))


# ------------------------------------------------------------------------------------ tensors as pieces
def pieces_of(tensor: Tensor, axes: Sequence[Axis], first: int = 0) -> list[Tensor]:
    """Views of a tensor, one for each of :func:`choices`, with one dimension per leaf.

    Args:
        tensor: to be cut.
        axes: of its dimensions from ``first`` on.
        first: how many dimensions before them are left as they are.
    """
    views = [tensor]
    for dim, axis in reversed(list(enumerate(axes, first))):
        views = [piece for v in views for piece in _split(v, dim, axis)]
    if len(views) == 1:
        return views
    # splitting from the last axis leaves the last axis varying slowest: bring into product order
    index = torch.arange(len(views)).reshape([len(alternatives(a)) for a in reversed(axes)] or [1])
    order = index.permute(*reversed(range(index.ndim))).flatten().tolist()
    return [views[i] for i in order]


def _split(tensor: Tensor, dim: int, axis: Axis) -> list[Tensor]:
    if isinstance(axis, Leaf):
        return [tensor]
    if isinstance(axis, Sum):
        parts = tensor.split([size_of(a) for a in axis.parts], dim)
        return [v for part, a in zip(parts, axis.parts, strict=True) for v in _split(part, dim, a)]
    return pieces_of(tensor.unflatten(dim, [size_of(a) for a in axis.factors]), axis.factors, dim)


def assembled(pieces: list[Tensor], axes: Sequence[Axis], first: int = 0) -> Tensor:
    """Inverse of :func:`pieces_of`."""
    counts = [len(alternatives(a)) for a in axes]
    for i, axis in enumerate(axes):
        rest = math.prod(counts[i + 1 :])
        pieces = [_join(pieces[k::rest], first + i, axis) for k in range(rest)]
    return pieces[0]


def _join(pieces: list[Tensor], dim: int, axis: Axis) -> Tensor:
    if isinstance(axis, Leaf):
        return pieces[0]
    if isinstance(axis, Sum):
        joined, start = [], 0
        for a in axis.parts:
            count = len(alternatives(a))
            joined.append(_join(pieces[start : start + count], dim, a))
            start += count
        return torch.cat(joined, dim)
    return assembled(pieces, axis.factors, dim).flatten(dim, dim + len(axis.factors) - 1)


def lay(table: Tensor, dims: list[int], ndim: int) -> Tensor:
    """View a table so that its i-th dimension stands at ``dims[i]`` of an ``ndim``-dimensional tensor."""
    order = sorted(range(len(dims)), key=dims.__getitem__)
    shape = [1] * ndim
    for i in order:
        shape[dims[i]] = table.shape[i]
    return table.permute(order).reshape(shape)


# ------------------------------------------------------------------------------------ as plain data
def axis_to_data(axis: Axis) -> Any:
    """Plain data (JSON) that :func:`axis_from_data` reads."""
    if isinstance(axis, Leaf):
        return [axis.size, axis.label, [list(s) for s in axis.scale]]
    key, parts = ("prod", axis.factors) if isinstance(axis, Prod) else ("sum", axis.parts)
    return {key: [axis_to_data(a) for a in parts]}


def axis_from_data(data: Any) -> Axis:
    """Inverse of :func:`axis_to_data`."""
    if isinstance(data, Mapping):
        ((key, parts),) = data.items()
        axes = tuple(axis_from_data(a) for a in parts)
        return Prod(axes) if key == "prod" else Sum(axes)
    size, label, scale = data
    return Leaf(size, label, tuple((name, exponent) for name, exponent in scale))


# ------------------------------------------------------------------------------------ pieces as matrices
@dataclass(frozen=True)
class Block:
    """One piece of a parameter (a whole one, or q of ``q|k|v``) seen as a batch of matrices ``[B, R, C]``.

    Rows are what the block writes, columns what it reads (kernel positions and lookups included). The batch is 1,
    or the groups of a grouped convolution, whose columns are different units in every group.
    """

    param: str
    batch: tuple[Leaf, ...]
    rows: tuple[Leaf, ...]
    cols: tuple[Leaf, ...]
    order: tuple[int, ...]  # leaf dims in the order batch, rows, cols
    kind: Literal["matrix", "embedding", "vector", "gain"]

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """All leaves, batch first, then rows, then columns."""
        return self.batch + self.rows + self.cols

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """``(B, R, C)``."""
        b, r, c = (math.prod(x.size for x in leaves) for leaves in (self.batch, self.rows, self.cols))
        return b, r, c

    @cached_property
    def _forth(self) -> tuple[int, ...] | None:
        """How leaf-shaped pieces ``[M, ...]`` are permuted; None: not at all."""
        order = (0, *(i + 1 for i in self.order))
        return None if list(order) == sorted(order) else order

    @cached_property
    def _back(self) -> tuple[int, ...]:
        return tuple(sorted(range(len(self.order) + 1), key=(0, *(i + 1 for i in self.order)).__getitem__))

    def fold(self, pieces: Tensor) -> Tensor:
        """Leaf-shaped pieces of M parameters, ``[M, ...]`` -> ``[M B, R, C]``."""
        pieces = pieces if self._forth is None else pieces.permute(self._forth)
        b, r, c = self.shape
        return pieces.reshape(len(pieces) * b, r, c)

    def unfold(self, matrices: Tensor) -> Tensor:
        """``[M B, R, C]`` -> leaf-shaped pieces of M parameters, ``[M, ...]``."""
        pieces = matrices.reshape(len(matrices) // self.shape[0], *(x.size for x in self.leaves))
        return pieces if self._forth is None else pieces.permute(self._back)

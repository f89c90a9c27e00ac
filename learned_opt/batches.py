"""The tensors of a network in a few batches, so that a rule does its arithmetic once per batch, not once per tensor.

Words used here and in the rules:

* *form*: shape, order of axes, cut into matrices, kind. Tensors of one form are one :class:`TensorBatch` ``[N, R, K]``.
  Rows are what a tensor writes; columns are kernel positions times what it reads, and last its bias, if one is added
  to what it writes.
* *block*: a piece of a tensor that is a batch of matrices, such as q of ``q | k | v``.
* *part*: one of the matrices that lie one below the other in a tensor.
* *pack* (:class:`learned_opt.blocks.Pack`): cuts tensors whose matrices do not lie one below the other.
* *thin*: a matrix of at most ``THIN`` rows or columns. Every entry has a second moment, as in Adam.
* *factored*: an embedding. Its second moment is a product of one factor per axis, as in Adafactor.
* *hidden axis*: an axis that a permutation label permutes. Up to ``BOUND`` units it is whitened.
* *fibre*: an axis that each index of another axis permutes in its own way.

Vectors, and thin tensors that are not matrices, are one :class:`FlatBatch` ``[Z]``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from learned_opt.blocks import Pack
from learned_opt.symmetry import Symmetry

THIN = 4  # a matrix of at most so many rows or columns takes Adam's steps, not polar ones
BOUND = 544  # units up to which an axis has a matrix of second moments
BFLOAT16_ABOVE = 128  # rows and columns: products of smaller matrices are as fast in float32
ALIGNED = 16  # columns that matrices of over 256 columns are padded to a multiple of: odd rows are slow to multiply

Shape = tuple[int, ...]


def is_thin(shape: Shape) -> bool:
    """Whether a tensor has second moments of every entry: vectors, and matrices of at most ``THIN`` rows or columns."""
    return len(shape) < 2 or min(shape[0], math.prod(shape[1:])) <= THIN


def moment_axes(shape: Shape) -> list[int]:
    """Axes of a tensor that have second moments of their own. This depends on the shape alone (see ``state_dict``)."""
    return [i for i, d in enumerate(shape) if d > THIN] if len(shape) > 1 else []


Units = tuple[Tensor, Tensor]  # of rows or columns: index of log-scales [.., L, k] and exponents


def has_matrix(d: int) -> bool:
    """Whether an axis of d units has a matrix of second moments, or only their diagonal."""
    return d <= BOUND


def root_dtype(d: int, dtype: torch.dtype) -> torch.dtype:
    """In which roots are kept: that of the products that they are for."""
    return torch.bfloat16 if dtype == torch.float32 and d > BFLOAT16_ABOVE else dtype


@dataclass(frozen=True, eq=False)
class Scaling:
    """Where the scales of a batch's entries come from: sums of a network's log-scales.

    Attributes:
        parts: rows ``[N P, R / P, k]`` and columns ``[N P, K, k]`` of its matrices, one pair for each kind of part.
        join: makes ``[N, R, K]`` of matrices, where there is more than one kind; None: they lie one below the other.
    """

    parts: tuple[tuple[Units, Units], ...]
    join: Callable[[list[Tensor]], Tensor] | None

    def __call__(self, log_scale: Tensor, read: Tensor | None = None) -> dict[str, Tensor]:
        """Factors of the scale: ``row_scale`` [N P, R / P, 1] and ``col_scale`` [N P, 1, K], or ``scale`` [N, R, K].

        A side whose units have no scale has no factor. ``read``: the log-scales of columns, where they are others.
        """
        read = log_scale if read is None else read
        found = [
            (_exp_sum(log_scale, rows).unsqueeze(2), _exp_sum(read, cols).unsqueeze(1)) for rows, cols in self.parts
        ]
        if self.join is not None:
            return {"scale": self.join([r * c for r, c in found])}
        return {
            k: x
            for k, x, (index, _) in zip(("row_scale", "col_scale"), found[0], self.parts[0], strict=True)
            if index.shape[-1]
        }


def _exp_sum(log_scale: Tensor, units: Units) -> Tensor:
    index, exponent = units
    return log_scale[index].mul(exponent.to(log_scale.dtype)).sum(-1).exp()


@dataclass(frozen=True, eq=False)
class TensorBatch:
    """Tensors of one form as matrices ``[N, R, K]``.

    Attributes:
        key: of its state.
        names: the N tensors.
        biases: the vectors in their last columns; empty: none.
        shape: of every tensor.
        order: its axes in the order rows, kernel positions, what is read.
        rows: sizes of the axes of the rows.
        kernel: kernel positions.
        reads: sizes of the axes of what is read.
        parts: rows of the matrices that a tensor holds; empty: ``pack`` cuts it.
        pack: cuts a tensor whose matrices are no blocks of rows.
        thin: whether it is a thin matrix: every entry has a second moment.
        factored: whether it is no matrix (an embedding): second moments of rows and columns scale its entries.
        hidden: axes (of the tensor) that a label permutes: they are whitened.
        fibres: axes that every index of another permutes in its own way: they have no second moments.
        scaling: of its entries; None: no unit has a scale.
    """

    key: str
    names: tuple[str, ...]
    biases: tuple[str, ...]
    shape: Shape
    order: tuple[int, ...]
    rows: Shape
    kernel: int
    reads: Shape
    parts: Shape
    pack: Pack | None
    factored: bool
    thin: bool
    hidden: frozenset[int]
    fibres: frozenset[int]
    scaling: Scaling | None

    @property
    def is_matrix(self) -> bool:
        """Whether it takes polar steps."""
        return not self.factored and not self.thin

    @cached_property
    def R(self) -> int:  # noqa: N802
        """Rows of a tensor."""
        return math.prod(self.rows)

    @cached_property
    def C(self) -> int:  # noqa: N802
        """Columns of a tensor, without its bias."""
        return self.kernel * math.prod(self.reads)

    @property
    def K(self) -> int:  # noqa: N802
        """Columns with the bias."""
        return self.C + bool(self.biases)

    @property
    def padded(self) -> int:
        """Columns while matrices are multiplied: a bias makes them odd, so zeros are added to large ones."""
        return -(-self.K // ALIGNED) * ALIGNED if self.biases and self.K > 256 else self.K

    @cached_property
    def axes(self) -> tuple[int, ...]:
        """Axes of the tensors that have second moments."""
        kernel = self.order[len(self.rows) : len(self.order) - len(self.reads)]
        return tuple(i for i in self.order if i in moment_axes(self.shape) and i not in (*kernel, *self.fibres))

    def is_row(self, axis: int) -> bool:
        """Whether an axis of the tensors is one of the rows."""
        return self.order.index(axis) < len(self.rows)

    @cached_property
    def is_plain(self) -> bool:
        """Whether its rows are one axis and what it reads is another: then both sides are products of matrices."""
        return sum(d > 1 for d in self.rows) <= 1 and sum(d > 1 for d in self.reads) <= 1

    # -- between tensors and matrices
    def matrices(self, x: Tensor) -> Tensor:
        """``[N, *shape] -> [N, R, C]``."""
        if self.order != tuple(range(len(self.shape))):
            x = x.permute(0, *(i + 1 for i in self.order))
        return x.reshape(len(x), self.R, self.C)

    def tensors(self, x: Tensor) -> Tensor:
        """``[N, R, C] -> [N, *shape]``: a view."""
        x = x.unflatten(-1, [self.shape[i] for i in self.order[len(self.rows) :]])
        if not self.rows:  # all of its axes are read
            x = x.squeeze(1)
        elif len(self.rows) > 1:
            x = x.unflatten(1, self.rows)
        if self.order == tuple(range(len(self.shape))):
            return x
        return x.permute(0, *(self.order.index(i) + 1 for i in range(len(self.shape))))

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """``{name: tensor} -> [N, R, K]``."""
        x = self.matrices(_stacked([tensors[n] for n in self.names]))
        if not self.biases:
            return x
        return torch.cat([x, _stacked([tensors[n] for n in self.biases])[..., None]], -1)

    def copied(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As :meth:`gather`, in one copy, without a graph."""
        some = tensors[self.names[0]]
        x = some.new_empty(len(self.names), self.R, self.K)
        views = self.scatter(x)
        torch._foreach_copy_(list(views.values()), [tensors[n] for n in views])
        return x

    def scatter(self, x: Tensor) -> dict[str, Tensor]:
        """Inverse of :meth:`gather`: views."""
        found = dict(zip(self.names, self.tensors(x[..., : self.C]).unbind(), strict=True))
        return found | dict(zip(self.biases, x[..., -1].unbind(), strict=False)) if self.biases else found

    # -- between tensors and the matrices that they hold
    def split(self, x: Tensor) -> list[Tensor]:
        """``[N, R, K]`` -> the matrices ``[N', R', K']`` of its parts."""
        if self.pack is not None:
            return self.pack.cut(self.tensors(x))
        if len(self.parts) == 1:
            return [x]
        if len(set(self.parts)) == 1:
            return [x.reshape(-1, self.parts[0], x.shape[-1])]
        return list(x.split(self.parts, 1))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Inverse of :meth:`split`."""
        if self.pack is not None:
            return self.matrices(self.pack.joined(parts))
        if len(parts) == 1:
            return parts[0] if len(self.parts) == 1 else parts[0].reshape(-1, self.R, parts[0].shape[-1])
        return torch.cat(list(parts), 1)

    def scaled(self, x: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        """``[N, R, K]`` times the factors of a :class:`Scaling`, in the precision of ``x``."""
        y = x
        for factor in factors.values():
            y = y.reshape(len(factor), -1, x.shape[-1]) * factor
        return y.reshape(x.shape).to(x.dtype)


@dataclass(frozen=True, eq=False)
class FlatBatch:
    """Gains and other vectors, one after the other: ``[Z]``.

    Attributes:
        names: the tensors.
        shapes: of each.
        scaling: index and exponent ``[Z, k]`` of the scale of every entry; None: no unit has one.
        segment: of every entry, its tensor [Z].
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    scaling: tuple[Tensor, Tensor] | None
    segment: Tensor
    key: str = "flat"

    @cached_property
    def sizes(self) -> list[int]:
        """Entries of each tensor."""
        return [math.prod(s) for s in self.shapes]

    def scale(self, log_scale: Tensor) -> Tensor:
        """Of every entry: ``[Z]``."""
        assert self.scaling is not None
        index, exponent = self.scaling
        return log_scale[index].mul(exponent.to(log_scale.dtype)).sum(-1).exp()

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """``{name: tensor} -> [Z]``."""
        return torch.cat([tensors[n].reshape(-1) for n in self.names])

    def scatter(self, x: Tensor) -> dict[str, Tensor]:
        """Inverse of :meth:`gather`: views."""
        parts = zip(self.names, self.shapes, x.split(self.sizes), strict=True)
        return {n: part.view(shape) for n, shape, part in parts}

    def sums(self, x: Tensor) -> Tensor:
        """Over the entries of each tensor: ``[Z] -> [number of tensors]``."""
        return x.new_zeros(len(self.names)).index_add(0, self.segment, x)


def scales(b: TensorBatch | FlatBatch, log_scale: Tensor) -> dict[str, Tensor]:
    """What a batch keeps of the frame: ``row_scale`` and ``col_scale``, or the ``scale`` of every entry."""
    if b.scaling is None:
        return {}
    return {"scale": b.scale(log_scale)} if isinstance(b, FlatBatch) else b.scaling(log_scale)


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """The batches of some tensors of a symmetry."""

    symmetry: Symmetry
    names: tuple[str, ...]
    batches: tuple[TensorBatch, ...]
    flat: FlatBatch | None
    n_scales: int
    device: torch.device

    @cached_property
    def members(self) -> tuple[str, ...]:
        """Tensors by their position in vectors with a number for each: a bias in its matrix has none of its own."""
        return tuple(n for b in self.all for n in b.names)

    @property
    def all(self) -> tuple[TensorBatch | FlatBatch, ...]:
        """The batches, the flat one last."""
        return (*self.batches, self.flat) if self.flat else self.batches

    @cached_property
    def counts(self) -> list[int]:
        """Tensors of every batch."""
        return [len(b.names) for b in self.all]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """``[N, ...]``; a view if there is one."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]

"""A network's tensors as a few stacks of matrices, and its units as positions in one vector.

Blocks of one shape and kind are stacked to ``[N, R, C]``, so a rule does its arithmetic once per shape and not once
per tensor. Every unit of every label has one position in a flat vector; rows and columns know the positions of the
units that they write and read, so pooling over units is one ``index_add`` and broadcasting one ``index_select`` for
the whole network, whatever its architecture.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from learned_opt.symmetry import Symmetry
from learned_opt.symmetry.axes import Axis, Block, Leaf, assembled, lay, leaves_of, map_leaves, pieces_of
from learned_opt.symmetry.labels import base_dim


@dataclass(frozen=True, eq=False)
class Units:
    """Which flat units the rows (or columns) of a stack belong to.

    ``index``: ``[N, L, K]`` positions in the flat vector (the last position is a dummy for "none");
    ``exponent``: ``[N, L, K]``, 0 for the dummy.
    """

    index: Tensor
    exponent: Tensor


@dataclass(frozen=True, eq=False)
class MatrixBatch:
    """Blocks of one kind and shape: matrices ``[N, R, C]``."""

    kind: str
    shape: tuple[int, int, int]
    runs: tuple[tuple[int, int], ...]  # (pack, block of its tensors), one after the other
    lengths: tuple[int, ...]  # of the runs
    members: tuple[tuple[str, int, int], ...]  # (parameter, block of the parameter, batch)
    fixed: Tensor  # [N, 2]: 1 where no row (column) belongs to a label: the network's outputs (inputs)
    rows: Units  # permutation units
    cols: Units
    row_scales: Units  # scale units
    col_scales: Units

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """``[N, R, C]`` -> what belongs to each run."""
        return x.split(self.lengths) if len(self.lengths) > 1 else (x,)


@dataclass(frozen=True, eq=False)
class Pack:
    """Tensors that are cut alike, so it is done once for all: one shape, one form of axes, the same axes hidden."""

    names: tuple[str, ...]
    axes: tuple[Axis, ...]  # of the first of them
    blocks: tuple[Block, ...]  # of the first of them
    places: tuple[tuple[int, int], ...]  # of every block: the stack, and which of its runs

    def cut(self, x: Tensor) -> list[Tensor]:
        """The tensors ``[M, ...]`` -> of every block ``[M B, R, C]``."""
        return [block.fold(piece) for block, piece in zip(self.blocks, pieces_of(x, self.axes, 1), strict=True)]

    def joined(self, blocks: Sequence[Tensor]) -> Tensor:
        """Inverse of :meth:`cut`."""
        return assembled([b.unfold(x) for b, x in zip(self.blocks, blocks, strict=True)], self.axes, 1)


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The stacks of the named tensors of a symmetry."""

    symmetry: Symmetry
    names: tuple[str, ...]
    packs: tuple[Pack, ...]
    stacks: tuple[MatrixBatch, ...]
    n_units: int  # permutation units; the dummy's position
    n_scales: int  # scale units; the dummy's position

    @cached_property
    def counts(self) -> list[int]:
        """Matrices of every stack."""
        return [stack.shape[0] for stack in self.stacks]

    @cached_property
    def owners(self) -> Tensor:
        """Positions among the names of the tensors that all matrices belong to: ``[sum of counts]``."""
        number = {n: i for i, n in enumerate(self.names)}
        owners = [number[n] for stack in self.stacks for n, _, batch in stack.members for _ in range(batch)]
        return torch.tensor(owners, dtype=torch.long, device=self.stacks[0].fixed.device)

    def gather(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """``{name: tensor}`` -> one ``[N, R, C]`` per stack."""
        blocks = [pack.cut(stacked([tensors[n] for n in pack.names])) for pack in self.packs]
        return [concatenated([blocks[i][k] for i, k in stack.runs]) for stack in self.stacks]

    def scatter(self, stacks: Sequence[Tensor]) -> dict[str, Tensor]:
        """Inverse of :meth:`gather`."""
        packs = zip(self.packs, self.packed(stacks, range(len(self.packs))), strict=True)
        tensors = {n: x for pack, xs in packs for n, x in zip(pack.names, xs.unbind(), strict=True)}
        return {n: tensors[n] for n in self.names}

    def packed(self, stacks: Sequence[Tensor], packs: Iterable[int]) -> list[Tensor]:
        """The tensors of some packs, ``[M, ...]`` each."""
        chosen = [self.packs[i] for i in packs]
        parts = {i: self.stacks[i].split(stacks[i]) for i in {i for pack in chosen for i, _ in pack.places}}
        return [pack.joined([parts[i][k] for i, k in pack.places]) for pack in chosen]

    def replaced(self, stacks: Sequence[Tensor], packs: Mapping[int, Tensor]) -> list[Tensor]:
        """The stacks with the tensors of some packs, ``[M, ...]`` each, in the place of what they held of them."""
        blocks = {i: self.packs[i].cut(x) for i, x in packs.items()}
        new = list(stacks)
        for at in {at for i in packs for at, _ in self.packs[i].places}:
            runs = zip(self.stacks[at].runs, self.stacks[at].split(stacks[at]), strict=True)
            new[at] = concatenated([blocks[i][k] if i in blocks else part for (i, k), part in runs])
        return new


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """``[M, ...]``; a view if there is one."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]


def concatenated(parts: Sequence[Tensor]) -> Tensor:
    """One after the other; the part itself if there is one."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def layout_of(symmetry: Symmetry, names: tuple[str, ...], device: torch.device) -> BlockLayout:
    """The layout of some of a symmetry's tensors (cached: it depends on shapes only)."""
    return _layout(ByIdentity(symmetry), names, str(device))


class ByIdentity:
    """A symmetry as a cache key by identity: comparing two by value would cost more than a step."""

    def __init__(self, symmetry: Symmetry) -> None:
        self.symmetry = symmetry

    def __hash__(self) -> int:
        return id(self.symmetry)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and other.symmetry is self.symmetry


@lru_cache(maxsize=256)
def _layout(key: ByIdentity, names: tuple[str, ...], device: str) -> BlockLayout:
    symmetry = key.symmetry
    label_start, n_units = unit_tables(symmetry, "label")
    scale_start, n_scales = unit_tables(symmetry, "scale")

    def perm_units(leaf: Leaf) -> list[tuple[Tensor, int]]:
        return [] if leaf.label is None or symmetry.labels[leaf.label].fixed else [(label_start[leaf.label], 1)]

    def scale_units(leaf: Leaf) -> list[tuple[Tensor, int]]:
        return [(scale_start[name], e) for name, e in leaf.scale]

    def stack(kind: str, r: int, c: int, runs: list[tuple[int, int]]) -> MatrixBatch:
        members = tuple((n, k, symmetry.blocks[n][k]) for i, k in runs for n in packs[i])
        blocks = [b for _, _, b in members for _ in range(b.shape[0])]

        def units(side: str, of: Callable[[Leaf], list[tuple[Tensor, int]]], dummy: int) -> Units:
            return _cat([block_units(b, side, of, dummy, symmetry) for _, _, b in members], dummy, device)

        fixed = [[all(x.label is None for x in b.batch + side) for side in (b.rows, b.cols)] for b in blocks]
        return MatrixBatch(
            kind,
            (len(blocks), r, c),
            tuple(runs),
            tuple(len(packs[i]) * symmetry.blocks[packs[i][0]][k].shape[0] for i, k in runs),
            tuple((n, k, b.shape[0]) for n, k, b in members),
            torch.tensor(fixed, dtype=torch.float32, device=device),
            units("rows", perm_units, n_units),
            units("cols", perm_units, n_units),
            units("rows", scale_units, n_scales),
            units("cols", scale_units, n_scales),
        )

    def pack(i: int) -> Pack:
        axes, blocks = symmetry.specs[packs[i][0]].axes, symmetry.blocks[packs[i][0]]
        return Pack(packs[i], axes, blocks, tuple(places[i, k] for k in range(len(blocks))))

    packs = _alike(symmetry, names)
    runs: dict[tuple[str, int, int], list[tuple[int, int]]] = {}
    for i, alike in enumerate(packs):
        for k, block in enumerate(symmetry.blocks[alike[0]]):
            runs.setdefault((block.kind, *block.shape[1:]), []).append((i, k))
    places = {run: (at, k) for at, own in enumerate(runs.values()) for k, run in enumerate(own)}
    return BlockLayout(
        symmetry,
        names,
        tuple(map(pack, range(len(packs)))),
        tuple(stack(*key, own) for key, own in runs.items()),
        n_units,
        n_scales,
    )


def _alike(symmetry: Symmetry, names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The tensors of every pack."""
    packs: dict[Any, list[str]] = {}
    for name in names:
        spec = symmetry.specs[name]
        hidden = [[leaf.label is not None for leaf in leaves_of(axis)] for axis in spec.axes]
        sizes = tuple(map_leaves(lambda leaf: Leaf(leaf.size), axis) for axis in spec.axes)
        cut = tuple((b.kind, b.shape, b.order) for b in symmetry.blocks[name])
        packs.setdefault((str(hidden), sizes, cut), []).append(name)
    return [tuple(own) for own in packs.values()]


def unit_tables(symmetry: Symmetry, of: Literal["label", "scale"]) -> tuple[dict[str, Tensor], int]:
    """A table of flat positions of every label's (or scale's) units, and their number."""
    if of == "label":
        shapes = {n: symmetry.table_shape(n, g.size) for n, g in symmetry.labels.items()}
    else:
        shapes = {n: symmetry.table_shape(s.label, s.size) for n, s in symmetry.scales.items()}
    tables, start = {}, 0
    for name, shape in shapes.items():
        count = int(torch.Size(shape).numel())
        tables[name] = torch.arange(start, start + count).reshape(shape)
        start += count
    return tables, start


def block_units(
    block: Block,
    side: str,
    of: Callable[[Leaf], list[tuple[Tensor, int]]],
    dummy: int,
    symmetry: Symmetry,
) -> tuple[Tensor, Tensor]:
    """``[B, L, K]`` positions and exponents of one side of a block; batch leaves count as rows."""
    leaves = block.leaves
    labels = [leaf.label for leaf in leaves]
    n_batch, n_rows = len(block.batch), len(block.rows)
    own = range(n_batch + n_rows) if side == "rows" else range(n_batch + n_rows, len(leaves))
    keep = [*range(n_batch), *own] if side == "cols" else list(own)
    b, r, c = block.shape
    length = r if side == "rows" else c
    sizes = [leaf.size if i in keep else 1 for i, leaf in enumerate(leaves)]
    index, exponent = [], []
    for dim in own:
        for table, e in of(leaves[dim]):
            at = [base_dim(labels, base, dim) for base in symmetry.over(leaves[dim])]
            index.append(lay(table, [*at, dim], len(leaves)).expand(sizes).reshape(b, length))
            exponent.append(torch.full((b, length), float(e)))
    if not index:
        return torch.full((b, length, 0), dummy), torch.zeros(b, length, 0)
    return torch.stack(index, -1), torch.stack(exponent, -1)


def _cat(parts: list[tuple[Tensor, Tensor]], dummy: int, device: str) -> Units:
    k = max(index.shape[-1] for index, _ in parts)

    def padded(x: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(x, (0, k - x.shape[-1]), value=value)

    index = torch.cat([padded(i, dummy) for i, _ in parts])
    exponent = torch.cat([padded(e, 0.0) for _, e in parts])
    return Units(index.to(device), exponent.to(device))

"""A network's tensors as a few stacks of matrices, and its units as positions in one vector.

Blocks of one shape and kind are stacked to ``[N, R, C]``, so a rule does its arithmetic once per shape and not once
per tensor. Every unit of every label has one position in a flat vector; rows and columns know the positions of the
units that they write and read, so pooling over units is one ``index_add`` and broadcasting one ``index_select`` for
the whole network, whatever its architecture.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from learned_opt.axes import Leaf, lay
from learned_opt.symmetry import Block, Symmetry, base_dim


@dataclass(frozen=True, eq=False)
class Units:
    """Which flat units the rows (or columns) of a stack belong to.

    ``index``: ``[N, L, K]`` positions in the flat vector (the last position is a dummy for "none");
    ``exponent``: ``[N, L, K]``, 0 for the dummy.
    """

    index: Tensor
    exponent: Tensor


@dataclass(frozen=True, eq=False)
class Stack:
    """Blocks of one kind and shape: matrices ``[N, R, C]``."""

    kind: str
    members: tuple[tuple[str, int, int], ...]  # (parameter, block of the parameter, batch)
    shape: tuple[int, int, int]
    fixed: Tensor  # [N, 2]: 1 where no row (column) belongs to a label: the network's outputs (inputs)
    rows: Units  # permutation units
    cols: Units
    row_scales: Units  # scale units
    col_scales: Units
    plain: tuple[int, ...] | None  # shape of its tensors if each is one block as it lies in memory, and all are alike

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        """``[N, R, C]`` -> what belongs to each member."""
        return x.split([batch for _, _, batch in self.members])


@dataclass(frozen=True, eq=False)
class Layout:
    """The stacks of the named tensors of a symmetry."""

    symmetry: Symmetry
    names: tuple[str, ...]
    stacks: tuple[Stack, ...]
    n_units: int  # permutation units; the dummy's position
    n_scales: int  # scale units; the dummy's position

    @cached_property
    def cut(self) -> tuple[str, ...]:
        """The tensors of stacks that are not plain."""
        return tuple(dict.fromkeys(n for s in self.stacks if s.plain is None for n, _, _ in s.members))

    def gather(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """``{name: tensor}`` -> one ``[N, R, C]`` per stack."""
        blocks = {n: self.symmetry.split(n, tensors[n]) for n in self.cut}
        stacks = []
        for stack in self.stacks:
            if stack.plain is None:
                parts = [blocks[n][i] for n, i, _ in stack.members]
                stacks.append(torch.cat(parts) if len(parts) > 1 else parts[0])
            else:
                parts = [tensors[n] for n, _, _ in stack.members]
                stacks.append((torch.stack(parts) if len(parts) > 1 else parts[0]).reshape(stack.shape))
        return stacks

    def scatter(self, stacks: list[Tensor], names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Inverse of :meth:`gather`, of some of the tensors (None: of all)."""
        wanted = self.names if names is None else names
        whole: dict[str, Tensor] = {}
        blocks: dict[str, dict[int, Tensor]] = {n: {} for n in set(self.cut).intersection(wanted)}
        for stack, x in zip(self.stacks, stacks, strict=True):
            if stack.plain is not None:
                whole |= zip((n for n, _, _ in stack.members), x.reshape(-1, *stack.plain).unbind(), strict=True)
                continue
            for (n, i, _), part in zip(stack.members, stack.parts(x), strict=True):
                if n in blocks:
                    blocks[n][i] = part
        whole |= {n: self.symmetry.merge(n, [b[i] for i in range(len(b))]) for n, b in blocks.items()}
        return {n: whole[n] for n in wanted}

    def replaced(self, stacks: list[Tensor], tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The stacks with these tensors in the place of what they held of them."""
        if not tensors:
            return stacks
        blocks = {n: self.symmetry.split(n, x) for n, x in tensors.items()}
        new = []
        for stack, x in zip(self.stacks, stacks, strict=True):
            if any(n in blocks for n, _, _ in stack.members):
                parts = zip(stack.members, stack.parts(x), strict=True)
                x = torch.cat([blocks[n][i] if n in blocks else part for (n, i, _), part in parts])
            new.append(x)
        return new

    def stack_of(self, names: tuple[str, ...]) -> int | None:
        """The stack of these tensors as they are, in this order, and of nothing else."""
        shape, of_them = self.symmetry.specs[names[0]].shape, tuple((n, 0, 1) for n in names)
        same = (i for i, s in enumerate(self.stacks) if s.members == of_them and s.plain == s.shape[1:] == shape)
        return next(same, None)


def layout_of(symmetry: Symmetry, names: tuple[str, ...], device: torch.device) -> Layout:
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
def _layout(key: ByIdentity, names: tuple[str, ...], device: str) -> Layout:
    symmetry = key.symmetry
    label_start, n_units = _positions({n: symmetry.table_shape(n, g.size) for n, g in symmetry.labels.items()})
    scale_start, n_scales = _positions({n: symmetry.table_shape(s.label, s.size) for n, s in symmetry.scales.items()})

    def perm_units(leaf: Leaf) -> list[tuple[Tensor, int]]:
        return [] if leaf.label is None or symmetry.labels[leaf.label].fixed else [(label_start[leaf.label], 1)]

    def scale_units(leaf: Leaf) -> list[tuple[Tensor, int]]:
        return [(scale_start[name], e) for name, e in leaf.scale]

    groups: dict[tuple[str, int, int], list[tuple[str, int, Block]]] = {}
    for name in names:
        for i, block in enumerate(symmetry.blocks[name]):
            groups.setdefault((block.kind, *block.shape[1:]), []).append((name, i, block))
    stacks = []
    for (kind, r, c), members in groups.items():
        blocks = [b for _, _, b in members]
        n = sum(b.shape[0] for b in blocks)

        def units(
            side: str, of: Callable[[Leaf], list[tuple[Tensor, int]]], dummy: int, blocks: list[Block] = blocks
        ) -> Units:
            return _cat([_units(b, side, of, dummy, symmetry) for b in blocks], dummy, device)

        fixed = [
            [all(x.label is None for x in side) for side in (b.batch + b.rows, b.batch + b.cols)]
            for b in blocks
            for _ in range(b.shape[0])
        ]
        stacks.append(
            Stack(
                kind,
                tuple((name, i, b.shape[0]) for name, i, b in members),
                (n, r, c),
                torch.tensor(fixed, dtype=torch.float32, device=device),
                units("rows", perm_units, n_units),
                units("cols", perm_units, n_units),
                units("rows", scale_units, n_scales),
                units("cols", scale_units, n_scales),
                _plain(symmetry, [name for name, _, _ in members]),
            )
        )
    return Layout(symmetry, names, tuple(stacks), n_units, n_scales)


def _plain(symmetry: Symmetry, names: list[str]) -> tuple[int, ...] | None:
    blocks = [symmetry.blocks[n] for n in names]
    whole = all(len(b) == 1 and list(b[0].order) == sorted(b[0].order) for b in blocks)
    shapes = {symmetry.specs[n].shape for n in names}
    return shapes.pop() if whole and len(shapes) == 1 else None


def _positions(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], int]:
    """A table of flat positions per label, and their number."""
    tables, start = {}, 0
    for name, shape in shapes.items():
        count = int(torch.Size(shape).numel())
        tables[name] = torch.arange(start, start + count).reshape(shape)
        start += count
    return tables, start


def _units(
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

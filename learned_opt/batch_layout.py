"""Which tensors of a symmetry make a batch, and where their scales come from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from learned_opt.batches import BatchLayout, FlatBatch, Scaling, Shape, TensorBatch, Units, is_thin
from learned_opt.blocks import ByIdentity, Pack, block_units, unit_tables
from learned_opt.symmetry import Symmetry
from learned_opt.symmetry.axes import Axis, Block, Leaf, Sum, alternatives, leaves_of, map_leaves


def batches_of(symmetry: Symmetry, names: tuple[str, ...], device: torch.device) -> BatchLayout:
    """The batches of some of a symmetry's tensors (cached: they depend on shapes only)."""
    return _batches(ByIdentity(symmetry), names, str(device))


@lru_cache(maxsize=256)
def _batches(key: ByIdentity, names: tuple[str, ...], device: str) -> BatchLayout:
    symmetry = key.symmetry
    matrices = {n: _form(symmetry, n) for n in names if not _is_vector(symmetry, n)}
    bias_of = _biases(symmetry, names, matrices)
    groups: dict[Any, list[str]] = {}
    for n, form in matrices.items():
        groups.setdefault((form, n in bias_of), []).append(n)
    batches = []
    for at, ((form, _), own) in enumerate(groups.items()):
        biases = tuple(bias_of[n] for n in own if n in bias_of)
        batches.append(_batch(symmetry, f"batch{at}", tuple(own), biases, form, device))
    paired = {b for b in bias_of.values()}
    rest = tuple(n for n in names if n not in matrices and n not in paired)
    _, n_scales = unit_tables(symmetry, "scale")
    return BatchLayout(
        symmetry, names, tuple(batches), _flat(symmetry, rest, device) if rest else None, n_scales, torch.device(device)
    )


def _is_vector(symmetry: Symmetry, name: str) -> bool:
    shape = symmetry.specs[name].shape
    return len(shape) < 2 or (is_thin(shape) and any(b.kind != "matrix" for b in symmetry.blocks[name]))


@dataclass(frozen=True)
class _Form:
    """What tensors must share to be one batch."""

    shape: Shape
    order: tuple[int, ...]
    n_rows: int
    n_kernel: int
    parts: Shape
    cut: str  # of the axes, where the parts are no blocks of rows
    factored: bool
    thin: bool
    hidden: frozenset[int]
    fibres: frozenset[int]
    scaled: bool


def _form(symmetry: Symmetry, name: str) -> _Form:
    spec, blocks = symmetry.specs[name], symmetry.blocks[name]
    dims = range(len(spec.shape))
    fibres, bases = symmetry.entangled(name)
    hidden = frozenset(i for i in dims if any(leaf.label is not None for leaf in leaves_of(spec.axes[i])))
    hidden -= fibres | bases
    scaled = any(leaf.scale for axis in spec.axes for leaf in leaves_of(axis))
    sizes = str([map_leaves(lambda leaf: Leaf(leaf.size), a) for a in spec.axes])
    if any(b.kind != "matrix" for b in blocks):
        sizes += str([(b.shape, b.order) for b in blocks])
        return _Form(spec.shape, tuple(dims), 1, 0, (), sizes, True, False, hidden, fibres, scaled)
    rows = [i for i in dims if spec.roles[i] in ("out", "gain")]
    kernel = [i for i in dims if spec.roles[i] == "kernel"]
    reads = [i for i in dims if i not in rows and i not in kernel]
    parts = _parts(symmetry, name, rows)
    order, cut, thin = (*rows, *kernel, *reads), "" if parts else sizes, is_thin(spec.shape)
    return _Form(spec.shape, order, len(rows), len(kernel), parts, cut, False, thin, hidden, fibres, scaled)


def _parts(symmetry: Symmetry, name: str, rows: list[int]) -> Shape:
    """Rows of the matrices of a tensor, one below the other; empty where they are anything else."""
    spec, blocks = symmetry.specs[name], symmetry.blocks[name]
    if any(len(alternatives(a)) > 1 for i, a in enumerate(spec.axes) if i not in rows):
        return ()
    if len(rows) != 1:
        return () if len(blocks) > 1 or blocks[0].batch else (math.prod(spec.shape[i] for i in rows),)
    if not _is_contiguous(spec.axes[rows[0]]):
        return ()
    parts: list[int] = []
    for piece, block in zip(alternatives(spec.axes[rows[0]]), blocks, strict=True):
        if piece[: len(block.batch)] != block.batch:
            return ()
        parts += block.shape[0] * [block.shape[1]]
    return tuple(parts)


def _is_contiguous(axis: Axis) -> bool:
    """Whether the alternatives of an axis lie one after the other."""
    return all(map(_is_contiguous, axis.parts)) if isinstance(axis, Sum) else len(alternatives(axis)) == 1


def _biases(symmetry: Symmetry, names: tuple[str, ...], forms: Mapping[str, _Form]) -> dict[str, str]:
    """The vector that is added to what a matrix writes, by the matrix' name.

    It has the matrix' name but for "bias" in the place of "weight", its rows are cut alike, and are one axis of the
    matrix; what that reads is another.
    """
    found = {}
    for name, form in forms.items():
        path, dot, last = name.rpartition(".")
        bias = path + dot + last.replace("weight", "bias")
        rows, reads = form.order[: form.n_rows], form.order[form.n_rows + form.n_kernel :]
        plain = len(rows) == 1 and sum(form.shape[i] > 1 for i in reads) <= 1
        if form.factored or form.thin or form.cut or not plain or bias == name or bias not in names:
            continue
        if len(symmetry.specs[bias].shape) != 1:
            continue
        own, other = symmetry.blocks[name], symmetry.blocks[bias]
        cut = [(b.batch, b.rows) for b in own] == [(b.batch, b.rows) for b in other]
        if cut and all(b.kind == "vector" for b in other):
            found[name] = bias
    return found


def _batch(
    symmetry: Symmetry, key: str, names: tuple[str, ...], biases: tuple[str, ...], form: _Form, device: str
) -> TensorBatch:
    cols = [form.shape[i] for i in form.order[form.n_rows :]]
    spec = symmetry.specs[names[0]]
    batch = TensorBatch(
        key=key,
        names=names,
        biases=biases,
        shape=form.shape,
        order=form.order,
        rows=tuple(form.shape[i] for i in form.order[: form.n_rows]),
        kernel=math.prod(cols[: form.n_kernel]),
        reads=tuple(cols[form.n_kernel :]),
        parts=form.parts,
        pack=Pack(names, spec.axes, symmetry.blocks[names[0]], ()) if form.cut else None,
        factored=form.factored,
        thin=form.thin,
        hidden=form.hidden,
        fibres=form.fibres,
        scaling=None,
    )
    return replace(batch, scaling=scaling_of(symmetry, batch, device, "scale")) if form.scaled else batch


def scaling_of(symmetry: Symmetry, batch: TensorBatch, device: str, of: Literal["label", "scale"]) -> Scaling:
    """Where factors of a batch's rows and columns come from that belong to scales, or to units of labels."""
    tables, dummy = unit_tables(symmetry, of)

    def own(leaf: Leaf) -> list[tuple[Tensor, int]]:
        if of == "scale":
            return [(tables[s], e) for s, e in leaf.scale]
        return [] if leaf.label is None or symmetry.labels[leaf.label].fixed else [(tables[leaf.label], 1)]

    n_blocks = len(symmetry.blocks[batch.names[0]])

    def units(blocks: Sequence[Block], side: str) -> Units:
        parts = [block_units(b, side, own, dummy, symmetry) for b in blocks]
        k = max(index.shape[-1] for index, _ in parts)
        index = torch.cat([functional.pad(i, (0, k - i.shape[-1]), value=dummy) for i, _ in parts])
        exponent = torch.cat([functional.pad(e, (0, k - e.shape[-1])) for _, e in parts])
        if side == "cols" and batch.pack is None:  # kernel positions come first; a bias reads no unit
            index, exponent = (
                x.unflatten(1, (-1, batch.kernel)).transpose(1, 2).flatten(1, 2) for x in (index, exponent)
            )
            if batch.biases:
                index = functional.pad(index, (0, 0, 0, 1), value=dummy)
                exponent = functional.pad(exponent, (0, 0, 0, 1))
        return index.to(device), exponent.to(device)

    def both(blocks: Sequence[Block]) -> tuple[Units, Units]:
        return units(blocks, "rows"), units(blocks, "cols")

    first = symmetry.blocks[batch.names[0]][0]
    two_sides = len(first.rows) == len(first.cols) == 1 and not first.batch
    if batch.factored and n_blocks == 1 and two_sides:  # [d, V] or its transpose
        rows, cols = both([symmetry.blocks[n][0] for n in batch.names])
        return Scaling(((rows, cols) if first.order == (0, 1) else (cols, rows),), None)
    if batch.pack is None and len(set(batch.parts)) == 1:
        return Scaling((both([b for n in batch.names for b in symmetry.blocks[n]]),), None)
    kinds = [both([symmetry.blocks[n][k] for n in batch.names]) for k in range(n_blocks)]
    return Scaling(tuple(kinds), batch.join)


def _flat(symmetry: Symmetry, names: tuple[str, ...], device: str) -> FlatBatch:
    shapes = tuple(symmetry.specs[n].shape for n in names)
    sizes = [math.prod(s) for s in shapes]
    segment = torch.repeat_interleave(torch.arange(len(names)), torch.tensor(sizes)).to(device)
    scaled = any(leaf.scale for n in names for axis in symmetry.specs[n].axes for leaf in leaves_of(axis))
    scaling = _flat_scaling(symmetry, names, device) if scaled else None
    return FlatBatch(names, shapes, scaling, segment)


def _flat_scaling(symmetry: Symmetry, names: tuple[str, ...], device: str) -> Units:
    """Index and exponent of every entry: those of its row and of its column."""
    tables, dummy = unit_tables(symmetry, "scale")
    found: list[Units] = []
    for n in names:
        pack = Pack((n,), symmetry.specs[n].axes, symmetry.blocks[n], ())
        cut: list[Units] = []
        for b in symmetry.blocks[n]:
            sides = [
                block_units(b, s, lambda leaf: [(tables[t], e) for t, e in leaf.scale], dummy, symmetry)
                for s in ("rows", "cols")
            ]
            _, r, c = b.shape
            wide = [
                torch.cat([rows.unsqueeze(2).expand(-1, r, c, -1), cols.unsqueeze(1).expand(-1, r, c, -1)], -1)
                for rows, cols in zip(*sides, strict=True)
            ]
            cut.append((wide[0], wide[1]))
        k = max(1, *(i.shape[-1] for i, _ in cut))
        padded = [
            (functional.pad(i, (0, k - i.shape[-1]), value=dummy), functional.pad(e, (0, k - e.shape[-1])))
            for i, e in cut
        ]
        # the units of every entry one at a time, each as a tensor of the parameter's shape
        index, exponent = (
            torch.stack([pack.joined([x[of][..., j] for x in padded])[0].reshape(-1) for j in range(k)], -1)
            for of in (0, 1)
        )
        found.append((index, exponent))
    k = max(i.shape[-1] for i, _ in found)
    index = torch.cat([functional.pad(i, (0, k - i.shape[-1]), value=dummy) for i, _ in found])
    exponent = torch.cat([functional.pad(e, (0, k - e.shape[-1])) for _, e in found])
    return index.to(device), exponent.to(device)

"""Whitening: how the gradients of an axis' hidden units move together, and roots of it to step in.

Of every tensor that matrices are made of, for each axis ``i`` of hidden units and its gradient ``G`` in the frame,
unfolded along the axis to ``[d, the rest]``,

    A_i <- 0.98 A_i + 0.02 G_i G_i^T
    P_i  = (A_i / mean of its diagonal + 1e-4)^(-1/8)

as in Shampoo (Gupta et al. 2018, arXiv:1802.09568), half of whose power -1/4 is taken before and half after the polar
factor: a matrix moves along ``P polar(P n P) P``, the steepest descent for the spectral norm of whitened weights. The
roots are functions of matrices, so they commute with permutations and signs of the units, and in the frame they do not
see positive scales. A matrix's bias steps in the units of its outputs too. Axes that no label permutes are left alone,
above all the network's inputs: their covariance is that of the data, and to whiten it cost an MLP on photographs more
than whitening its hidden units gained. Where classification ends near zero loss, whitening hidden units neither gains
nor costs (experiments, 36 and 43).

Matrices of at most four rows or columns move along Adam's direction, as whitened units cost regressions (23, 41). Not
so at the beginning of a run: there they move along ``A^(-3/4) n``, at the size of Adam's direction, to which they then
turn. They read the network's inputs or write its outputs, and the first gradients of all hidden units agree on where to
go: a long way along that saturates a policy for good, before it has learned anything else (48).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from learned_opt.features import to_rms
from learned_opt.layout import Layout, concatenated
from learned_opt.rules.base import State
from learned_opt.rules.biases import is_wide, weights_of
from learned_opt.symmetry.axes import leaves_of

AVERAGE = 0.98  # decay rate of the second moments
FLOOR = 1e-4  # added to second moments of mean 1
POWER = -0.125
EARLY_POWER = -0.75  # of thin matrices, at the beginning
EVERY, AT_FIRST = 10, 3  # steps between new roots, after the first ones
LARGEST = 1024  # units up to which an axis is whitened, lest its eigenvalues take most of the time


def axes_with_slots(shape: tuple[int, ...]) -> list[int]:
    """Axes of a tensor that have slots in the state, whether they are whitened or not.

    This depends on its shape alone: torch's distributed checkpointing has state made, to be filled with what was saved,
    before a symmetry can have been inferred.
    """
    return [i for i, d in enumerate(shape) if 1 < d <= LARGEST] if len(shape) > 1 else []


def fresh(p: Tensor) -> dict[str, Tensor]:
    """Zero slots ``moment0``, ``root0`` [d, d] ... of a tensor (at least float32)."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    return {
        f"{slot}{i}": p.new_zeros((p.shape[i], p.shape[i]), dtype=dtype)
        for i in axes_with_slots(tuple(p.shape))
        for slot in ("moment", "root")
    }


@dataclass(frozen=True)
class _Side:
    """Whitened axes of one size, over all tensors."""

    parts: tuple[tuple[int, int], ...]  # (pack of the layout, axis of its tensors)
    counts: tuple[int, ...]  # tensors of each
    slots: tuple[tuple[str, int], ...]  # (tensor, axis): those of the first part, of the second, ...
    biases: tuple[tuple[int, Tensor], ...]  # packs of biases, and where their matrices' axes are
    thin: bool  # whether they are of thin matrices


@dataclass(frozen=True, eq=False)
class _Plan:
    axes: dict[int, tuple[int, ...]]  # pack of the layout: the axes of its tensors that are whitened
    sides: tuple[_Side, ...]
    whole: tuple[Tensor | bool, ...]  # see Whitening
    thin: tuple[Tensor | bool, ...]  # of every stack, which matrices are thin and have roots


class Whitening:
    """The roots of a layout's tensors at one step.

    Args:
        layout: of the tensors that are trained.
        g: their gradients in the frame, a ``[N, R, C]`` per stack.
        state: with the slots of :func:`fresh`.
        youth: how much of the step is as at the beginning, from 1 to 0 (0-d).

    Attributes:
        state: the next one.
        whole: of every stack, which matrices are whitened on both sides: all or none, or bool ``[N, 1, 1]``.
    """

    def __init__(self, layout: Layout, g: list[Tensor], state: State, youth: Tensor) -> None:
        self._layout, self._plan, self._youth = layout, _plan(layout), youth
        self.whole = self._plan.whole
        self.state = dict(state)
        self._roots: dict[tuple[int, int], Tensor] = {}  # [M, d, d] by pack and axis
        self._thin: dict[tuple[int, int], Tensor] = {}  # the same of thin matrices
        tensors = dict(zip(self._plan.axes, layout.packed(g, self._plan.axes), strict=True))
        for side in self._plan.sides:
            roots = self._renew(side, [_gram(tensors[pack], axis) for pack, axis in side.parts])
            of = self._thin if side.thin else self._roots
            of |= zip(side.parts, roots.split(side.counts), strict=True)
            self._lend(side, roots)

    def _renew(self, side: _Side, grams: list[Tensor]) -> Tensor:
        """One side's moments and roots, of ``G G^T / n`` [M, d, d] of every part; the roots of all."""
        slots = [self.state[n] for n, _ in side.slots]
        step = torch.stack([s["step"] for s in slots])
        due = (step <= AT_FIRST) | (step % EVERY == 0)
        old = [torch.stack([self.state[n][f"{slot}{i}"] for n, i in side.slots]) for slot in ("moment", "root")]
        moment = torch.lerp(old[0], concatenated(grams), 1 - AVERAGE)
        due = due | (old[1][..., 0, 0] == 0)  # missing, of an axis that another symmetry did not whiten
        if side.thin:
            due = due & (self._youth > 0)
        root = inverse_root(moment, old[1], due, EARLY_POWER if side.thin else POWER)
        for (n, i), a, p in zip(side.slots, moment.unbind(), root.unbind(), strict=True):
            self.state[n] = self.state[n] | {f"moment{i}": a, f"root{i}": p}
        return root

    def _lend(self, side: _Side, roots: Tensor) -> None:
        """Biases step in the units of their matrices' outputs."""
        for pack, index in side.biases:
            self._roots[pack, 0] = roots.index_select(0, index)

    def __call__(self, stacks: list[Tensor]) -> list[Tensor]:
        """``P x P`` of matrices ``[N, R, C]`` per stack; of tensors with more axes, along each that is whitened.

        ``P x`` of their biases. Other vectors in a pack with these come back as good as any: nobody looks at them.
        """
        return self._multiplied(stacks, self._roots)

    def turned(self, momenta: list[Tensor], adam: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Adam's directions of some stacks ``[N, R, C]``; those of thin matrices turned to ``A^(-3/4) n``, in youth."""
        own = [i for i in adam if self._plan.thin[i] is not False]
        if not own:
            return dict(adam)
        whitened = self._multiplied(momenta, self._thin)
        shares = {i: self._youth.to(adam[i].dtype) * self._plan.thin[i] for i in own}
        return {**adam, **{i: _turned(adam[i], whitened[i], share) for i, share in shares.items()}}

    def _multiplied(self, stacks: list[Tensor], roots: Mapping[tuple[int, int], Tensor]) -> list[Tensor]:
        own = list(dict.fromkeys(pack for pack, _ in roots))
        packs = dict(zip(own, self._layout.packed(stacks, own), strict=True))
        for (pack, i), root in roots.items():
            packs[pack] = _along(packs[pack], i, root)
        return self._layout.replaced(stacks, packs)


def _turned(x: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """A share of ``x`` replaced by another of its size, at its size: ``[N, R, C]``."""
    mixed = torch.lerp(x, other * to_rms(other, x), share)
    return mixed * to_rms(mixed, x)


def inverse_root(moment: Tensor, old: Tensor, due: Tensor, power: float = POWER) -> Tensor:
    """``(A / mean of its diagonal + FLOOR)^power`` where it is due, else the old one. What is not finite counts as I.

    Args:
        moment: symmetric, ``[M, d, d]``.
        old: ``[M, d, d]``.
        due: bool ``[M]``. Where none is, nothing is computed, under vmap neither.
        power: negative.
    """
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    finite = moment.sum((-2, -1), keepdim=True).isfinite()
    relative = torch.where(finite, moment, 0) / torch.where(finite & (mean > 0), mean, 1)
    return _InverseRoot.apply(relative, old, due, power)[0]


@torch.library.custom_op("learned_opt::inverse_root", mutates_args=())
def _inverse_root(a: Tensor, old: Tensor, due: Tensor, power: float) -> tuple[Tensor, Tensor, Tensor]:
    """Roots, new where they are due, and what those are made of. What is done depends on values: one operator."""
    root, values, vectors = old.clone(), old.new_ones(old.shape[:-1]), torch.zeros_like(old)
    if due.any():
        which = due.nonzero()[:, 0]
        some, basis = _eigen(a[which])
        root.index_copy_(0, which, (basis * some.pow(power)[..., None, :]) @ basis.mT)
        values.index_copy_(0, which, some)
        vectors.index_copy_(0, which, basis)
    return root, values, vectors


@_inverse_root.register_fake
def _(a: Tensor, old: Tensor, due: Tensor, power: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(old), old.new_empty(old.shape[:-1]), torch.empty_like(old)


class _InverseRoot(torch.autograd.Function):
    """``(A + FLOOR)^power`` by eigenvalues, differentiable where they coincide too (Daleckii and Krein's formula)."""

    @staticmethod
    def forward(a: Tensor, old: Tensor, due: Tensor, power: float) -> tuple[Tensor, Tensor, Tensor]:
        return _inverse_root(a, old, due, power)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, values, vectors = output
        ctx.power = inputs[3]
        ctx.mark_non_differentiable(values, vectors)
        ctx.save_for_backward(values, vectors, inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None]:
        values, vectors, due = ctx.saved_tensors
        row, col = values[..., :, None], values[..., None, :]
        near = (row - col).abs() <= 1e-3 * (row + col)
        slope = ctx.power * ((row + col) / 2).pow(ctx.power - 1)
        divided = torch.where(near, slope, (row.pow(ctx.power) - col.pow(ctx.power)) / torch.where(near, 1, row - col))
        inner = vectors.mT @ (grad + grad.mT) / 2 @ vectors
        kept = torch.where(due[..., None, None], 0, grad)
        return vectors @ (divided * inner) @ vectors.mT, kept, None, None  # vectors are zero where it is not due

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        whole = [
            x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(args[:3], in_dims[:3], strict=True)
        ]
        flat = _InverseRoot.apply(*(x.flatten(0, 1) for x in whole), args[3])
        return tuple(x.unflatten(0, (size, -1)) for x in flat), (0, 0, 0)


def _eigen(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [M, d] and vectors [M, d, d] of ``a + FLOOR`` of semidefinite ``a``.

    The floor is added before: LAPACK's float32 fails, or gives NaN without a word, where many rows are zero, as of
    units that no example reached yet. Where it fails all the same, float64.
    """
    a = a + FLOOR * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    try:
        values, vectors = torch.linalg.eigh(a)
    except torch.linalg.LinAlgError:
        values = vectors = a.new_tensor(torch.nan)
    if not (values.sum() + vectors.sum()).isfinite():
        values, vectors = (x.to(a.dtype) for x in torch.linalg.eigh(a.double()))
    return values.clamp(min=FLOOR), vectors


def _gram(x: Tensor, axis: int) -> Tensor:
    """``[M, ...]`` unfolded along an axis, times its transpose, over the number of its columns: ``[M, d, d]``."""
    x = x.movedim(axis + 1, 1).flatten(2)
    return torch.bmm(x, x.mT) / x.shape[-1]


def _along(x: Tensor, axis: int, root: Tensor) -> Tensor:
    """``[M, ...]`` multiplied by symmetric ``[M, d, d]`` along an axis."""
    if 0 < axis == x.ndim - 2:
        return torch.bmm(x.flatten(1, -2), root).reshape(x.shape)
    moved = x.movedim(axis + 1, 1)
    return torch.bmm(root, moved.reshape(*moved.shape[:2], -1)).reshape(moved.shape).movedim(1, axis + 1)


@lru_cache(maxsize=256)
def _plan(layout: Layout) -> _Plan:
    axes: dict[int, tuple[int, ...]] = {}
    sides: dict[tuple[int, bool], list[tuple[int, int]]] = {}
    both: set[str] = set()
    early: set[str] = set()
    for at, pack in enumerate(layout.packs):
        spec = layout.symmetry.specs[pack.names[0]]
        hidden = [any(leaf.label is not None for leaf in leaves_of(axis)) for axis in spec.axes]
        matrices = all(block.kind == "matrix" for block in pack.blocks)
        own = tuple(i for i in axes_with_slots(spec.shape) if hidden[i]) if matrices else ()
        thin = not all(map(is_wide, pack.blocks))
        if own:
            axes[at] = own
        for i in own:
            sides.setdefault((spec.shape[i], thin), []).append((at, i))
        if own and thin:
            early |= set(pack.names)
        elif {"out", "in"} <= {spec.roles[i] for i in own}:
            both |= set(pack.names)
    both |= {bias for bias, weight in weights_of(layout).items() if weight in both}
    all_sides = tuple(_side(layout, parts, thin) for (_, thin), parts in sides.items())
    return _Plan(axes, all_sides, _which(layout, both), _which(layout, early))


def _side(layout: Layout, parts: list[tuple[int, int]], thin: bool) -> _Side:
    slots = tuple((n, axis) for pack, axis in parts for n in layout.packs[pack].names)
    counts = tuple(len(layout.packs[pack].names) for pack, _ in parts)
    return _Side(tuple(parts), counts, slots, tuple(_borrowers(layout, slots)), thin)


def _borrowers(layout: Layout, slots: tuple[tuple[str, int], ...]) -> Iterator[tuple[int, Tensor]]:
    """Packs of biases, and which of the slots is the output of their matrices."""
    written = {n: at for at, (n, axis) in enumerate(slots) if layout.symmetry.specs[n].roles[axis] == "out"}
    weights = weights_of(layout)
    for at, pack in enumerate(layout.packs):
        found = [written.get(weights.get(n, "")) for n in pack.names]
        if any(i is not None for i in found):
            yield at, torch.tensor([i or 0 for i in found], device=layout.stacks[0].fixed.device)


def _which(layout: Layout, names: set[str]) -> tuple[Tensor | bool, ...]:
    """Of every stack, which matrices belong to these tensors: all or none, or bool ``[N, 1, 1]``."""
    found: list[Tensor | bool] = []
    for stack in layout.stacks:
        each = [n in names for n, _, batch in stack.members for _ in range(batch)]
        some = torch.tensor(each, device=stack.fixed.device)[:, None, None]
        found.append(all(each) if all(each) == any(each) else some)
    return tuple(found)

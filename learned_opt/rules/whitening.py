"""Second moments of the gradients of an axis' units, and roots of them to step in.

For each axis ``i`` of a tensor, with its gradient ``G`` in the frame unfolded along the axis to ``[d, the rest]``,

    A_i <- average of G_i G_i^T / n           (exponential, 50 steps; d x d, or its diagonal where d is large)
    P_i  = (A_i / mean of its diagonal + 1e-4)^(-1/8)

as in Shampoo (Gupta et al. 2018, arXiv:1802.09568), half of whose power -1/4 is taken before and half after the polar
factor. Roots are functions of matrices: they commute with permutations and signs of the units, and in the frame they
do not see positive scales.
"""

from typing import Any

import torch
from torch import Tensor

from learned_opt.batches import TensorBatch

AVERAGE = 0.98  # decay rate of the second moments, a step
FLOOR = 1e-4  # added to second moments of mean 1
POWER = -0.125
WARMUP_POWER = -0.75  # of thin matrices


def unfolded(batch: TensorBatch, x: Tensor, axis: int) -> Tensor:
    """``[N, R, K]`` without biases, unfolded along an axis of the tensors: ``[N, d, the rest]``."""
    x = x[..., : batch.C]
    if batch.is_plain and batch.is_row(axis):
        return x
    return batch.tensors(x).movedim(axis + 1, 1).flatten(2)


def second_moment(batch: TensorBatch, x: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    """``G G^T / n`` along an axis, from products in ``dtype``: ``[N, d, d]``."""
    if batch.is_plain and batch.kernel == 1 and not batch.is_row(axis):
        x = x[..., : batch.C].to(dtype)
        return torch.bmm(x.mT, x) / batch.R
    x = unfolded(batch, x, axis).to(dtype)
    return torch.bmm(x, x.mT) / x.shape[-1]


def packed(a: Tensor) -> Tensor:
    """A symmetric ``[..., d, d]`` as ``[..., d, d // 2 + 1]``: row i has the entries of columns i, i + 1, ... modulo d.

    Every entry is there in one of its two places (in both at a distance of d / 2); the diagonal comes first.
    """
    d = a.shape[-1]
    return a.gather(-1, _columns(d, a.device).expand(*a.shape[:-1], -1))


def unpacked(p: Tensor) -> Tensor:
    """The inverse of :func:`packed`: ``[..., d, d // 2 + 1] -> [..., d, d]``."""
    d = p.shape[-2]
    half = p.new_zeros(*p.shape[:-1], d).scatter(-1, _columns(d, p.device).expand_as(p), p)
    at = torch.arange(d, device=p.device)
    return torch.where((at - at[:, None]) % d <= d // 2, half, half.mT)


def _columns(d: int, device: torch.device) -> Tensor:
    return (torch.arange(d, device=device)[:, None] + torch.arange(d // 2 + 1, device=device)) % d


def mean_square(batch: TensorBatch, x: Tensor, axis: int) -> Tensor:
    """The diagonal of :func:`second_moment`: ``[N, d]``."""
    return unfolded(batch, x, axis).square().mean(-1)


def multiplied(batch: TensorBatch, x: Tensor, roots: dict[int, Tensor]) -> Tensor:
    """``[N, R, K]`` times symmetric roots along each of some axes; biases have the rows of their matrices.

    Roots have the dtype of ``x``. One of columns with a bias is ``[N, padded, padded]``, and ``x`` then
    ``[N, R, padded]`` (:func:`learned_opt.rules.slots.extended`).
    """
    for axis, root in roots.items():
        if not batch.is_plain:
            moved = batch.tensors(x).movedim(axis + 1, 1)
            product = torch.bmm(root, moved.reshape(*moved.shape[:2], -1)).reshape(moved.shape)
            x = batch.matrices(product.movedim(1, axis + 1))
        elif batch.is_row(axis):
            x = torch.bmm(root, x)
        elif batch.kernel == 1:
            x = torch.bmm(x, root)
        else:  # the columns of every kernel position; the bias stays
            w = x[..., : batch.C].reshape(len(x), -1, root.shape[-1])
            product = torch.bmm(w, root).reshape(len(x), batch.R, batch.C)
            x = torch.cat([product, x[..., batch.C :]], -1) if batch.biases else product
    return x


def is_extended(batch: TensorBatch, axis: int) -> bool:
    """Whether the root of an axis has a row and a column for the bias, which it leaves alone."""
    return bool(batch.biases) and batch.is_plain and batch.kernel == 1 and not batch.is_row(axis)


def inverse_root(moment: Tensor, old: Tensor, due: Tensor | bool, power: float = POWER) -> Tensor:
    """``(A / mean of its diagonal + FLOOR)^power`` where it is due, else the old one. What is not finite counts as I.

    Units whose gradients have all been zero stay apart: they are scaled, never mixed with others.

    Args:
        moment: symmetric, ``[N, d, d]``.
        old: ``[N, d, d]``.
        due: for all, or bool ``[N]``. Where none is, nothing is computed, under vmap neither.
        power: negative.
    """
    if due is False:
        return old
    moment = moment.to(torch.promote_types(moment.dtype, torch.float32))
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)[..., None, None]
    finite = moment.sum((-2, -1), keepdim=True).isfinite()
    relative = torch.where(finite, moment, 0) / torch.where(finite & (mean > 0), mean, 1)
    which = torch.ones(len(moment), dtype=torch.bool, device=moment.device) if due is True else due
    root = _InverseRoot.apply(relative, old.to(moment.dtype), which, power)[0]
    seen = (diagonal > 0) | ~finite[..., 0]
    apart = ~(seen[..., :, None] & seen[..., None, :]) & ~torch.eye(
        root.shape[-1], dtype=torch.bool, device=root.device
    )
    return torch.where(apart, 0, root).to(old.dtype)


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

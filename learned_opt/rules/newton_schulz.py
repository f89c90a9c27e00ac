"""The polar factor of a matrix by Newton-Schulz iteration, as in Muon."""

import torch
from torch import Tensor

# Quintic coefficients of Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/): steep at
# zero, so that few iterations bring small singular values up, to about [0.7, 1.2], not 1.
A, B, C = 3.4445, -4.7750, 2.0315
LONG = 2  # times the short side: from here on Gram matrices save multiplications


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """Approximate ``U V^T`` of ``x = U S V^T``, for every matrix of a batch.

    An all-zero matrix gives exactly zero, with a finite derivative. Commutes with permutations and sign changes of rows
    and of columns. Differentiable, runs under vmap.

    Args:
        x: ``[N, R, C]``, floating.
        steps: iterations. Each takes ``2 min^2 max + min^3`` multiplications of the sides; where one is ``LONG`` times
            the other, the iteration is of Gram matrices and takes ``4 min^3`` (not in bfloat16, too coarse for them).

    Returns:
        ``[N, R, C]``.
    """
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / norm.clamp(min=torch.finfo(norm.dtype).tiny ** 0.5)  # below, squares underflow
    rows, columns = x.shape[-2:]
    tall = rows > columns
    if max(rows, columns) >= LONG * min(rows, columns) and x.dtype != torch.bfloat16:
        factor = _gram_iteration(_gram(x, tall), steps)
        return torch.bmm(x, factor) if tall else torch.bmm(factor, x)
    for _ in range(steps):
        gram = _gram(x, tall)
        correction = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.baddbmm(x, x, correction, beta=A) if tall else torch.baddbmm(x, correction, x, beta=A)
    return x


def _gram(x: Tensor, tall: bool) -> Tensor:
    """Of the short side, which is the smaller one."""
    return torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)


def _gram_iteration(gram: Tensor, steps: int) -> Tensor:
    """What ``x`` is to be multiplied by: the product of all steps' polynomials of its Gram matrix, which commute."""
    product = None
    for step in range(steps):
        q = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        q = q + A * torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        product = q if product is None else torch.bmm(q, product)
        if step + 1 < steps:
            gram = torch.bmm(torch.bmm(q, gram), q)
    assert product is not None
    return product

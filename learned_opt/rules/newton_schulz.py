"""The polar factor of a matrix by Newton-Schulz iteration, as in Muon."""

import torch
from torch import Tensor

# Quintic coefficients of Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/): steep at
# zero, so that few iterations bring small singular values up, to about [0.7, 1.2], not 1.
A, B, C = 3.4445, -4.7750, 2.0315


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """Approximate ``U V^T`` of ``x = U S V^T``, for every matrix of a batch.

    An all-zero matrix gives exactly zero, with a finite derivative. Commutes with permutations and sign changes of rows
    and of columns. Differentiable, runs under vmap.

    Args:
        x: ``[N, R, C]``, floating.
        steps: iterations, each ``2 min(R, C)^2 max(R, C) + min(R, C)^3`` multiplications.

    Returns:
        ``[N, R, C]``.
    """
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = x / norm.clamp(min=torch.finfo(norm.dtype).tiny ** 0.5).to(x.dtype)  # below, squares underflow
    tall = x.shape[-2] > x.shape[-1]
    for _ in range(steps):
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)  # the Gram matrix of the short side is the small one
        correction = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.baddbmm(x, x, correction, beta=A) if tall else torch.baddbmm(x, correction, x, beta=A)
    return x

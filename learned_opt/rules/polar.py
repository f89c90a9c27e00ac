"""The polar factor of a matrix by Newton-Schulz iteration, as in Muon."""

from collections.abc import Callable

import torch
from torch import Tensor

# Quintic coefficients of Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/): steep at
# zero, so that five iterations bring singular values from 1e-3 up, to about [0.7, 1.2], not 1.
A, B, C = 3.4445, -4.7750, 2.0315
_WIDE = 3  # columns per row from which the iterations are cheaper on the Gram matrix alone


def newton_schulz(x: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Approximate ``U V^T`` of ``x = U S V^T``, for every matrix of a batch.

    Scale-free from the smallest normal number to the largest; an all-zero matrix gives exactly
    zero, with a finite derivative. Commutes with permutations and sign changes of rows and of
    columns. Differentiable, runs under vmap.

    Args:
        x: ``[..., R, C]``, floating.
        steps: iterations.
        dtype: in which to iterate and return (Muon: bfloat16); default: that of ``x``.

    Returns:
        ``[..., R, C]`` in ``dtype``.
    """
    shape = x.shape
    x = unit_norm(x, dtype or x.dtype)
    tall = shape[-2] > shape[-1]
    x = x.mT if tall else x  # the Gram matrix of the short side is the small one
    if x.ndim > 3:
        x = x.flatten(0, -3)
    wide = x.shape[-1] >= _WIDE * x.shape[-2]
    x = _product(_polynomial_of_gram(x, steps), x) if wide and steps and _is_exact(x) else _iterate(x, steps)
    x = x.mT if tall else x
    return x.reshape(shape)


def _iterate(x: Tensor, steps: int) -> Tensor:
    """``x <- (A + B g + C g^2) x`` with ``g = x x^T``: ``2 R^2 C + R^3`` multiplications an iteration."""
    for _ in range(steps):
        x = _times(_correction(_product(x, x.mT)), x)
    return x


def _polynomial_of_gram(x: Tensor, steps: int) -> Tensor:
    """``q`` such that ``q x`` is what :func:`_iterate` gives, ``[..., R, R]``: a polynomial in ``x x^T``.

    ``4 R^3`` multiplications an iteration, and ``2 R^2 C`` once.
    """
    gram = _product(x, x.mT)
    correction = _correction(gram)
    q = A * torch.eye(x.shape[-2], dtype=x.dtype, device=x.device) + correction
    for _ in range(steps - 1):
        gram = _times(correction, gram)  # symmetric, as the two commute
        gram = _times(correction, gram)
        correction = _correction(gram)
        q = _times(correction, q)
    return q


def _is_exact(x: Tensor) -> bool:
    """Whether products have the precision of float32: with less the powers of a singular Gram matrix drift apart."""
    if x.dtype != torch.float32:
        return x.dtype == torch.float64
    backend = torch.backends.cuda if x.is_cuda else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("none", "ieee")


def _correction(gram: Tensor) -> Tensor:
    """``B g + C g^2``."""
    return _multiply_add(gram)(gram, gram, gram, beta=B, alpha=C)


def _times(correction: Tensor, x: Tensor) -> Tensor:
    """``(A + correction) x``."""
    return _multiply_add(x)(x, correction, x, beta=A)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Of matrices or batches of them; of batches ``@`` is six operations."""
    return x @ y if x.ndim == 2 else torch.bmm(x, y)


def _multiply_add(x: Tensor) -> Callable[..., Tensor]:
    return torch.addmm if x.ndim == 2 else torch.baddbmm


def unit_norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x / |x|`` (Frobenius) over the last two dimensions, in ``dtype``; zero stays zero.

    The largest entry is first brought into [0.5, 1) by a power of two: exact in binary floating
    point, and neither the squares in the norm nor a narrower ``dtype`` then over- or underflow. The
    power is a constant to
    autograd, rightly: the result does not depend on it. A nonzero matrix has norm >= 0.5 then, so
    the clamp only meets zero (and subnormal) matrices, where it keeps value and derivative finite.
    """
    largest = x.detach().abs().amax((-2, -1), keepdim=True)
    exponent = torch.frexp(largest).exponent.clamp(-126, 126)
    x = (x * torch.ldexp(torch.ones_like(largest), -exponent)).to(dtype)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x / norm.clamp(min=0.5)

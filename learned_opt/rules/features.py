"""What a neural functional network sees of a matrix: even features of its entries, and statistics.

All of it is taken in the frame, where nothing depends on positive scales of units. Odd features flip with the sign of a
unit, even ones do not. Everything is relative to the matrix' own size, so multiplying the loss changes nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from learned_opt.rules.numerics import ROUNDING, rsqrt

N_EVEN = 6
N_STATISTICS = 5


def mean_square(x: Tensor) -> Tensor:
    """Mean square over the matrix: ``[..., R, C] -> [..., 1, 1]``."""
    return (x * x).mean((-2, -1), keepdim=True)


def unit_rms(x: Tensor) -> Tensor:
    """Divide by the RMS over the matrix; zero stays zero."""
    return x * rsqrt(mean_square(x))


def without_noise(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Matrices whose entries are rounding noise beside those of the largest become zero."""
    squares = [mean_square(x) for x in stacks]
    largest_square = torch.stack([s.amax() for s in squares]).amax()
    smallest = (ROUNDING * torch.finfo(largest_square.dtype).eps) ** 2 * largest_square
    return [torch.where(s > smallest, x, 0) for x, s in zip(stacks, squares, strict=True)]


def odd_features(g: Tensor, m: Tensor, w: Tensor) -> Tensor:
    """Gradient, momentum and weights ``[N, R, C]``, each of RMS 1 over its matrix: ``[3, N, R, C]``."""
    return unit_rms(torch.stack([g, m, w]))


def even_features(x: Tensor) -> Tensor:
    """``[N_EVEN, N, R, C]`` in (-1, 1): squares and products of the odd features, softly bounded."""
    g, m, w = x.unbind(0)
    y = torch.stack([g * g, m * m, w * w, g * m, g * w, m * w])
    return y / (1 + y.abs())


def statistics(x: Tensor, g: Tensor, m: Tensor, w: Tensor) -> Tensor:
    """Of every matrix ``[N, N_STATISTICS]``: cosines of the odd features ``x``, the momentum's share of a gradient, and
    the size of the weights.

    Args:
        x: from :func:`odd_features`.
        g: gradients ``[N, R, C]``.
        m: momenta, corrected for their bias.
        w: weights.
    """
    xg, xm, xw = x.unbind(0)
    cosines = torch.stack([xg * xm, xg * xw, xm * xw]).mean((-2, -1))
    sizes = torch.stack([log_ratio(mean_square(m), mean_square(g)), torch.log(mean_square(w) + 1e-12) / 16])
    return torch.cat([cosines, sizes[..., 0, 0]]).T


def log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """``log(a / b) / 8`` of numbers that are not negative, at least ``log(1e-6) / 8``; that too where b is zero."""
    known = b > 0
    return torch.log(torch.where(known, a / torch.where(known, b, 1), 0) + 1e-6) / 8

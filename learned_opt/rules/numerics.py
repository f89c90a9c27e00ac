"""Roots with a finite derivative at zero."""

from torch import Tensor

TINY = 1e-30


def root(x: Tensor) -> Tensor:
    """``sqrt(x)``; next to zero where x is, with zero (not infinite) derivative."""
    return x.clamp(min=TINY).sqrt()


def rsqrt(x: Tensor) -> Tensor:
    """``1 / sqrt(x)``; a large finite number where x is zero, with zero (not infinite) derivative."""
    return x.clamp(min=TINY).rsqrt()

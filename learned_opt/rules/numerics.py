"""Roots with a finite derivative at zero, and what is too small to be more than rounding noise."""

from torch import Tensor

TINY = 1e-30
ROUNDING = 256  # times the machine epsilon: a tensor's gradient below this share of the largest is rounding noise


def root(x: Tensor) -> Tensor:
    """``sqrt(x)``; next to zero where x is, with zero (not infinite) derivative."""
    return x.clamp(min=TINY).sqrt()


def rsqrt(x: Tensor) -> Tensor:
    """``1 / sqrt(x)``; a large finite number where x is zero, with zero (not infinite) derivative."""
    return x.clamp(min=TINY).rsqrt()

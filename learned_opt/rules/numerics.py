"""Roots with a finite derivative at zero, and what is too small to be more than rounding noise."""

import torch
from torch import Tensor

ROUNDING = 256  # times the machine epsilon: a tensor's gradient below this share of the largest is rounding noise


def root(x: Tensor) -> Tensor:
    """``sqrt(x)`` with zero (not infinite) derivative at zero."""
    positive = x > 0
    return torch.where(positive, x, 1).sqrt() * positive


def rsqrt(x: Tensor) -> Tensor:
    """``1 / sqrt(x)``; 1 where x is zero, with zero (not infinite) derivative."""
    return torch.where(x > 0, x, 1).rsqrt()

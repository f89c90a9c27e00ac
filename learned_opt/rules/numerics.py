"""Roots with a finite derivative at zero, and what is too small to be more than rounding noise."""

from torch import Tensor

TINY = 1e-30
NEGLIGIBLE = 1e-12  # times the RMS of a tensor's gradients: smaller entries count as zero
ROUNDING = 256  # times the machine epsilon: a tensor's gradient below this share of the largest is rounding noise


def root(x: Tensor) -> Tensor:
    """``sqrt(x)``; next to zero where x is, with zero (not infinite) derivative."""
    return x.clamp(min=TINY).sqrt()


def rsqrt(x: Tensor) -> Tensor:
    """``1 / sqrt(x)``; a large finite number where x is zero, with zero (not infinite) derivative."""
    return x.clamp(min=TINY).rsqrt()


def is_known_zero(*tensors: Tensor) -> bool:
    """Whether all entries are zero, if that can be said at once: not of other devices, which would have to be waited
    for, and not of a batch of runs (``torch.func.vmap``), of which each has entries of its own."""
    if any(x.device.type != "cpu" for x in tensors):
        return False
    try:
        return not any(bool(x.any()) for x in tensors)
    except RuntimeError:
        return False

"""From gradients to features: accumulators, and what they say in the frame.

Odd features flip with the sign of a unit, even features do not; in the frame both are invariant to positive scale.
Everything is relative to the tensor's own scale, so multiplying the loss by a constant changes nothing.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from learned_opt.rules.base import State

MOMENTUM, SLOW, SQUARE = 0.9, 0.99, 0.99  # decay rates of m, m_slow and v
AVERAGES = ("m", "m_slow", "v")

N_ODD = 5  # g, n (Nesterov momentum), m_slow, w, m / sqrt(v)
N_EVEN = 8
N_STATISTICS = 6


def fresh(params: Mapping[str, Tensor], averages: Sequence[str] = AVERAGES) -> State:
    """Zero accumulators of each parameter, at least float32.

    ``step`` and ``clock``, 0-d, how often it and how often the network was stepped; some of ``m``, ``m_slow`` and
    ``v``, like it.
    """

    def zeros(p: Tensor) -> Tensor:
        return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))

    def ages(p: Tensor) -> dict[str, Tensor]:
        return {k: zeros(p.new_zeros(())) for k in ("step", "clock")}

    return {n: ages(p) | {k: zeros(p) for k in averages} for n, p in params.items()}


def averaged(g: Tensor, old: Mapping[str, Tensor], memory: float | Tensor = MOMENTUM) -> dict[str, Tensor]:
    """Exponential moving averages of the gradient (two horizons) and of its square, one step on.

    They are not bias-corrected; ``memory`` is the decay rate of ``m``.
    """
    decays = {"m": memory, "m_slow": SLOW, "v": SQUARE}
    return {k: torch.lerp(x, g * g if k == "v" else g, 1 - decays[k]) for k, x in old.items()}


def nesterov(m: Tensor, g: Tensor, memory: float | Tensor = MOMENTUM) -> Tensor:
    """The momentum one step ahead, up to a constant: ``0.9 m + 0.1 g``."""
    return torch.lerp(g, m, memory)


def adam_direction(m: Tensor, v: Tensor, step: Tensor) -> Tensor:
    """``m_hat / sqrt(v_hat)`` with an epsilon relative to the tensor's own mean square: ``[N, R, C]``."""
    m = m / (1 - MOMENTUM**step)
    v = v / (1 - SQUARE**step)
    return m * rsqrt(v + 1e-16 * v.mean((-2, -1), keepdim=True))


def quarter_power(v: Tensor, step: Tensor) -> Tensor:
    """``v_hat^(-1/4)``, epsilon as in :func:`adam_direction`; 1 where the whole matrix has none: ``[N, R, C]``."""
    v = v / (1 - SQUARE**step)
    return rsqrt(v + 1e-16 * v.mean((-2, -1), keepdim=True)).sqrt()


def mean_square(x: Tensor) -> Tensor:
    """Mean square over the matrix: ``[..., R, C] -> [..., 1, 1]``."""
    return (x * x).mean((-2, -1), keepdim=True)


def root_mean_square(x: Tensor) -> Tensor:
    """RMS over the matrix, with zero (not infinite) derivative at zero: ``[..., R, C] -> [..., 1, 1]``."""
    return root(mean_square(x))


def to_rms(x: Tensor, other: Tensor) -> Tensor:
    """What ``x`` is to be multiplied by, so that its RMS is another matrix's; 1 where that is zero: ``[N, 1, 1]``."""
    size = root_mean_square(other)
    return torch.where(size > 0, size * rsqrt(mean_square(x)), 1)


def root(x: Tensor) -> Tensor:
    """``sqrt(x)`` with zero (not infinite) derivative at zero."""
    positive = x > 0
    return torch.where(positive, x, 1).sqrt() * positive


def unit_rms(x: Tensor) -> Tensor:
    """Divide by the RMS over the matrix; zero stays zero."""
    return x * rsqrt(mean_square(x))


def rsqrt(x: Tensor) -> Tensor:
    """``1 / sqrt(x)``; 1 where x is zero, with zero (not infinite) derivative."""
    return torch.where(x > 0, x, 1).rsqrt()


def odd_features(g: Tensor, n: Tensor, slow: Tensor, w: Tensor, adam: Tensor) -> Tensor:
    """``[N_ODD, N, R, C]``, each of RMS 1 over its matrix."""
    return unit_rms(torch.stack([g, n, slow, w, adam]))


def even_features(x: Tensor, adam: Tensor) -> Tensor:
    """``[N_EVEN, N, R, C]`` in (-1, 1): squares and products of the odd features ``x``, softly bounded."""
    g, n, slow, w, _ = x.unbind(0)
    y = torch.stack([g * g, n * n, slow * slow, w * w, adam * adam, n * w, n * slow, g * n])
    return y / (1 + y.abs())


def statistics(x: Tensor, g: Tensor, m: Tensor, slow: Tensor, w: Tensor, step: Tensor) -> Tensor:
    """Per matrix ``[N, N_STATISTICS]``: alignments, signal-to-noise of the gradient at two horizons, size of w."""
    xg, xn, xs, xw, _ = x.unbind(0)
    cosines = torch.stack([xn * xs, xg * xn, xn * xw]).mean((-2, -1))
    power = mean_square(torch.stack([g, m, slow, w]))[..., 0, 0]
    noise = power[0]
    corrected = torch.stack([1 - MOMENTUM**step, 1 - SLOW**step]).flatten(1)
    signal = power[1:3] / (corrected * corrected)
    ratio = torch.log((signal + 1e-6 * noise) / torch.where(noise > 0, noise, 1) + 1e-6) / 8
    size = torch.log(power[3:] + 1e-12) / 16
    return torch.cat([cosines, ratio, size]).T

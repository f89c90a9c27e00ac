"""The learning rate, measured in the first steps, and the decay rate of the momentum, measured later.

Where the last step still points down the gradient of the next batch, a longer step would have gained more; where it
points up, a shorter one. The slope is unbiased, as the batch is a new one (a hypergradient: Baydin et al. 2018,
arXiv:1703.04782, of the logarithm of the rate, normalised). With ``d`` the last step and ``g`` the gradient at its end,

    c_t = - sum <g_t, d_t> / sum |g_t| |d_t|                  over all tensors, in the frame
    rho <- rho + 0.3 / (1 + t / 50) (tanh(mean c / e) - rho),    e = 0.03 max(1, 800 / T)

from ``rho = -1`` in the warm-up, an eighth of the run, 10 to 50 steps; the rate is multiplied by ``exp(rho)``.

The mean of ``-c_t`` sets the decay rate of the momentum. It is 0 to 0.05 where the gradient is mostly noise, 0.2 to 0.4
where it is mostly an oscillation across a valley, which a longer momentum averages out. After 50 steps

    beta1 = 0.9 + 0.07 min(1, max(0, - mean c / 0.28)).

The correlation of gradients says what ends a run. With momentum m,

    a = (1 + beta1) / (1 - beta1) |m|^2 / mean |g|^2

is 1 where gradients are independent: steps are a random walk, which a lower rate alone calms. Its mean over as many
steps as the warm-up has, from twice its length on, multiplies the rate of the rest by

    (1/2)^q,    q = min(1, max(0, 2 - 5 |a - 1|)).
"""

from typing import NamedTuple

import torch
from torch import Tensor

Number = float | Tensor  # a number, or a 0-d tensor

RATE = 0.01  # at the start of HORIZON steps: entries of vectors move by 2 RATE, of matrices by an RMS of 0.2 RATE
HORIZON = 800  # at which the rate starts at RATE
SHORTEST, LONGEST, SHARE = 10.0, 50.0, 0.125  # the warm-up in steps, and as a share of the horizon
ANYTIME = 100.0  # steps after which the rate without horizon starts to decay like 1 / sqrt(t)
TO_COME = 500.0  # steps that the built-in decay expects besides those done where there is no horizon
START = -1.0  # rho at the first step; the state holds what it has gained since
GAIN = 0.3  # share of the way to the new evidence that rho moves in a step
FADE = 50.0  # steps after which the gain is half
EVIDENCE = 0.03  # size of a cosine that counts
AVERAGE = 0.8  # decay of the average of the cosines
OSCILLATION = 0.28  # mean of -c_t at which the momentum is longest
BETA1, LONGER = 0.9, 0.07  # the momentum's decay rate, and what is added at most
AFTER = 1.2  # multiple of the measured rate that the rest of the run takes
NOISE_LR = 0.5  # times the rate where gradients are independent
SAME, OTHER = 0.2, 0.4  # |correlation - 1| up to which gradients count as independent, and from which on as dependent


class Measured(NamedTuple):
    """What the steps have measured so far, 0-d each.

    Attributes:
        slope: mean cosine.
        log_lr: what the logarithm of the rate has gained.
        correlation: mean correlation of gradients.
        lr_scale: what the schedule is multiplied by.
    """

    slope: Tensor
    log_lr: Tensor
    correlation: Tensor
    lr_scale: Tensor


def warmup_steps(total_steps: Number | None) -> Number:
    """Steps of the warm-up: an eighth of the horizon, 10 to 50; 50 without one."""
    if total_steps is None:
        return LONGEST
    if isinstance(total_steps, Tensor):
        return (SHARE * total_steps).clamp(SHORTEST, LONGEST)
    return min(max(SHARE * total_steps, SHORTEST), LONGEST)


def warmup_weight(t: Number, total_steps: Number | None) -> Number:
    """1 in the warm-up, then a line to zero that is as long."""
    left = 2 - t / warmup_steps(total_steps)
    return left.clamp(0.0, 1.0) if isinstance(left, Tensor) else min(max(left, 0.0), 1.0)


def horizon_scale(total_steps: Number) -> Number:
    """``sqrt(800 / T)``, at most 4: measured on VALID, the best rate is 2 at T = 200, 1 at 800, 0.7 at 1600."""
    if isinstance(total_steps, Tensor):
        return torch.rsqrt(total_steps / HORIZON).clamp(max=4.0)
    return min((HORIZON / total_steps) ** 0.5, 4.0)


def decay(t: Number, total_steps: Number | None) -> Number:
    """The schedule's form, from 1 at the first step: a line to zero, or ``1 / sqrt(1 + t / 100)`` without a horizon."""
    if total_steps is None:
        return (1 + (t - 1) / ANYTIME) ** -0.5
    left = 1 - (t - 1) / total_steps
    return left.clamp(min=0.0) if isinstance(left, Tensor) else max(left, 0.0)


def decay_scale(t: Number, total_steps: Number | None) -> Number:
    """:func:`horizon_scale` for the built-in decay, which has one without a horizon too."""
    return horizon_scale(t + TO_COME) if total_steps is None else horizon_scale(total_steps)


def beta1(t: Tensor, slope: Tensor) -> Tensor:
    """Decay rate of the momentum at step t (0-d); ``slope`` as measured before it."""
    return BETA1 + LONGER * (slope * (-1 / OSCILLATION)).clamp(0.0, 1.0) * (t > LONGEST)


def log_lr(measured: Measured, slope: Tensor, t: Tensor, total_steps: Number | None) -> Tensor:
    """What the logarithm of the rate has gained after step t; ``slope`` with that step's cosine."""
    mean = slope / (1 - AVERAGE ** (t - 1).clamp(min=1))  # the first cosine is of no step: zero
    gain = GAIN / (1 + t / FADE) * ((t > 1) & (t <= warmup_steps(total_steps)))
    return measured.log_lr + gain * (torch.tanh(mean / evidence(total_steps)) - (START + measured.log_lr))


def mean_correlation(measured: Measured, correlation: Tensor, t: Tensor, total_steps: Number | None) -> Tensor:
    """The mean over the steps from twice to three times the warm-up."""
    end = warmup_steps(total_steps)
    share = ((t > 2 * end) & (t <= 3 * end)) / (t - 2 * end).clamp(min=1.0)
    return torch.lerp(measured.correlation, correlation, share.to(correlation.dtype))


def evidence(total_steps: Number | None) -> Number:
    """The size of a cosine that counts: ``0.03 max(1, 800 / T)``.

    Evidence comes from steps at a fraction of the rate that it licenses, which is the higher the shorter a run is; and
    where data do not repeat, the first steps of a short run see a plateau, on which any length looks too short.
    """
    if total_steps is None:
        return EVIDENCE
    share = HORIZON / total_steps
    return EVIDENCE * (share.clamp(min=1.0) if isinstance(share, Tensor) else max(share, 1.0))


def after_warmup(total_steps: Number | None) -> Number:
    """Multiple of the measured rate that the rest of the run takes: 1.2, less in runs of under 800 steps."""
    if total_steps is None:
        return AFTER
    share = total_steps / HORIZON
    return 1 + (AFTER - 1) * (share.clamp(max=1.0) if isinstance(share, Tensor) else min(share, 1.0))


def lr_scale(measured: Measured, t: Tensor, total_steps: Number | None) -> Tensor:
    """What :func:`decay` and ``RATE`` are multiplied by at step t (0-d)."""
    end = warmup_steps(total_steps)
    after = after_warmup(total_steps)
    after = after if total_steps is None else after * horizon_scale(total_steps)
    noise = NOISE_LR ** ((OTHER - (measured.correlation - 1).abs()) / (OTHER - SAME)).clamp(0.0, 1.0)
    later = torch.where(t > end, after * torch.ones_like(t), 1)
    return torch.exp(START + measured.log_lr) * later * torch.where(t > 3 * end, noise, 1)

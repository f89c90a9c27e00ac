"""How far to go along what was learned: whole runs tell, paired with runs of the rule without it.

Truncated backpropagation finds directions of theta that whole runs gain from, and goes too far along some of them: it
does not see what comes later. So each part of theta (what one control is read off) is multiplied by a factor between 0
and 1, drawn for every run; the change of the logarithm of the final loss is fitted by a quadratic function of the
factors, and theta is multiplied by those at which that is lowest (:mod:`meta_train.surface`). At the factor 0 a
control does nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from learned_opt.rules.base import UpdateRule
from meta_train.paired import paired_ends
from meta_train.surface import Surface
from meta_train.unroll import Unroll

Theta = dict[str, Tensor]

LEFT_OUT = 0.3  # probability that a factor is 0
LARGEST = 0.5  # changes beyond count as this: a run that fails must not decide


@dataclass(frozen=True)
class Lengths:
    """When and from how many runs factors are fitted.

    Attributes:
        every: outer steps between two fits.
        tasks: fresh tasks of a fit, of the families in turn.
        particles: pairs of runs of a task.
        steps: inner steps of a run.
    """

    every: int = 50
    tasks: int = 8
    particles: int = 8
    steps: int = 300

    def __post_init__(self) -> None:
        if min(self.every, self.tasks, self.particles, self.steps) < 1 or self.steps < 10:
            raise ValueError(f"{self} fits nothing. Pass positive numbers, and at least 10 steps.")


class Pairs(NamedTuple):
    """Of a task: factors ``[P, parts]``, and the changes of the log of the final loss that they made ``[P]``."""

    factors: Tensor
    changes: Tensor


def scaled(rule: UpdateRule, theta: Mapping[str, Tensor], factors: Tensor) -> Theta:
    """Theta with its parts multiplied by factors ``[parts]``, or by those of every particle: ``[P, parts]``.

    Raises:
        TypeError: the rule has no parts.
    """
    if not rule.parts:
        raise TypeError(f"{type(rule).__name__} does not say which parts its theta has.")
    many = factors.shape[:-1]
    found = {n: t.detach().expand((*many, *t.shape)).clone() for n, t in theta.items()}
    for factor, rows in zip(factors.unbind(-1), rule.parts.values(), strict=True):
        for name, row in rows:
            if name in found:
                own = found[name][(slice(None),) * len(many) + (row,)]  # a view
                own.mul_(factor.reshape((*many, *[1] * (own.ndim - len(many)))))
    return found


def compare(unroll: Unroll, theta: Mapping[str, Tensor], lengths: Lengths, generator: torch.Generator) -> Pairs:
    """Runs with random factors beside runs with all factors 0, from the same weights and with the same batches."""
    factors = torch.rand(lengths.particles, len(unroll.rule.parts), generator=generator)
    factors *= torch.rand(factors.shape, generator=generator) >= LEFT_OUT
    none = scaled(unroll.rule, theta, torch.zeros_like(factors))
    own = scaled(unroll.rule, theta, factors)
    both = {n: torch.cat([t, none[n]]) for n, t in own.items()}
    ends = paired_ends(unroll, both, 2, lengths.steps, generator)
    return Pairs(factors, ends.train[0] - ends.train[1])


def best_factors(pairs: list[Pairs]) -> tuple[Tensor, float]:
    """Factors ``[parts]`` at which runs end lowest, as far as that is sure; and the change that they are good for.

    Args:
        pairs: of several tasks.
    """
    task = torch.arange(len(pairs)).repeat_interleave(torch.tensor([len(p.changes) for p in pairs]))
    factors = torch.cat([p.factors for p in pairs])
    surface = Surface(factors, torch.cat([p.changes for p in pairs]), task, LARGEST)
    return surface.lowest(lambda c: c.clamp(0, 1), factors.shape[1])

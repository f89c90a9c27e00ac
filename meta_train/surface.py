"""A quadratic function of a few numbers, fitted to noisy changes of whole runs, and where it is lowest for sure."""

from collections.abc import Callable

import torch
from torch import Tensor

GROUPS = 20  # that the tasks are dealt to, of which one at a time is left out
RIDGE, RIDGES = 0.1, 9  # the least, and how many are tried, each four times the one before
SQUARES, PRODUCTS = 4.0, 30.0  # ridge of these, relative to that of linear terms: they are many, and small
QUIET = 0.05  # RMS of the changes up to which tasks count alike; of noisier ones, the inverse of their variance counts
ROUNDS, CANDIDATES = 12, 2000  # of the search for the lowest point
CAUTION = 2.0  # standard errors that are added to a change
NEGLIGIBLE = 2e-3  # of a change


def terms(x: Tensor) -> Tensor:
    """Linear, squares and products: ``[n, d] -> [n, d + d + d (d - 1) / 2]``. At zero nothing changes: no constant."""
    at = torch.triu_indices(x.shape[1], x.shape[1], 1)
    return torch.cat([x, x * x, x[:, at[0]] * x[:, at[1]]], 1)


class Surface:
    """Of changes ``[n]`` at points ``[n, d]``, by ridge regression.

    The ridge is the one whose fits predict best the changes of tasks that they have not seen. The lowest point of a fit
    to noisy runs is too low by as much as the noise allows. So two standard errors are added where a lowest point is
    looked for: that of fits without each group of tasks (jackknife), or that of the regression's coefficients where few
    runs have been, whichever is larger.

    Args:
        points: zero is where nothing changes.
        changes: of the runs.
        task: number of the task of each point.
        largest: changes beyond, or that are not finite, count as this: a run that fails must not decide.
        run: number of the run of the hand-made rule that each change is against, which counts as a point too; its noise
            is theirs in common. None: each has one of its own.
    """

    def __init__(
        self, points: Tensor, changes: Tensor, task: Tensor, largest: float, run: Tensor | None = None
    ) -> None:
        x = terms(points.double())
        y = changes.double().nan_to_num(nan=largest).clamp(-largest, largest)
        if run is not None:
            x, y = (v - _means(v, run) for v in (x, y))
        weight = (QUIET**2 + _means(y.square(), task)).rsqrt()
        weight = weight / weight.mean()
        x, y = x * weight[:, None], y * weight
        groups = task.unique(return_inverse=True)[1] % GROUPS
        each = [groups == k for k in groups.unique()]
        products = torch.stack([x[own].T @ x[own] for own in each])
        right = torch.stack([x[own].T @ y[own] for own in each])
        d = points.shape[1]
        penalty = torch.ones(x.shape[1], dtype=x.dtype)
        penalty[d : 2 * d], penalty[2 * d :] = SQUARES, PRODUCTS
        least = torch.inf
        for ridge in (RIDGE * 4**k * torch.diag(penalty) for k in reversed(range(RIDGES))):
            without = torch.linalg.solve(products.sum(0) - products + ridge, (right.sum(0) - right)[..., None])[..., 0]
            errors = [(y[own] - x[own] @ fit).square().sum() for own, fit in zip(each, without, strict=True)]
            if float(sum(errors)) < least:
                least, self._without = float(sum(errors)), without  # [groups, terms]
                inverse = torch.linalg.inv(products.sum(0) + ridge)
                self._whole = inverse @ right.sum(0)
                self._covariance = inverse * (least / len(y))

    def __call__(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The changes to expect at points ``[n, d]``, and their standard errors."""
        x = terms(points.double())
        values = x @ self._without.T
        n = values.shape[1]
        jackknife = (values - values.mean(1, keepdim=True)).square().sum(1) * (n - 1) / n
        regression = ((x @ self._covariance) * x).sum(1)
        return x @ self._whole, torch.maximum(jackknife, regression).sqrt()

    def lowest(self, bounded: Callable[[Tensor], Tensor], dimensions: int) -> tuple[Tensor, float]:
        """The point ``[d]`` at which the change and two standard errors are lowest in sum; zero if nowhere below zero.

        Args:
            bounded: puts points into the space that is searched.
            dimensions: d.

        Returns:
            The point and that sum.
        """
        generator = torch.Generator().manual_seed(0)
        best, value = torch.zeros(dimensions, dtype=torch.float64), 0.0
        for k in range(ROUNDS):
            noise = torch.randn(CANDIDATES, dimensions, generator=generator, dtype=torch.float64)
            noise *= torch.rand(noise.shape, generator=generator) < 0.5 if k else 1
            candidates = bounded(best + noise * 0.6**k)
            sure = self._sure(candidates)
            lowest = int(sure.argmin())
            if float(sure[lowest]) < value:
                best, value = candidates[lowest], float(sure[lowest])
        for i in best.nonzero()[:, 0].tolist():  # what does not help stays out
            without = bounded((best * (torch.arange(dimensions) != i))[None])
            change = float(self._sure(without))
            if change <= min(value + NEGLIGIBLE, 0.0):
                best, value = without[0], change
        return (best.float(), value) if value < -NEGLIGIBLE else (torch.zeros(dimensions), 0.0)

    def _sure(self, points: Tensor) -> Tensor:
        change, error = self(points)
        return change + CAUTION * error


def _means(x: Tensor, group: Tensor) -> Tensor:
    """Of the group of each row."""
    group = group.unique(return_inverse=True)[1]
    ones = torch.cat([x.view(len(x), -1), x.new_ones(len(x), 1)], 1)
    sums = ones.new_zeros(int(group.max()) + 1, ones.shape[1]).index_add(0, group, ones)
    return (sums[:, :-1] / sums[:, -1:]).index_select(0, group).view(x.shape)

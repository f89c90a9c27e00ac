"""A quadratic function of a few numbers, fitted to noisy changes of whole runs, and where it is lowest for sure."""

from collections.abc import Callable

import torch
from torch import Tensor

GROUPS = 20  # that the tasks are dealt to, of which one at a time is left out
ROUNDS, CANDIDATES = 12, 2000  # of the search for the lowest point
CAUTION = 2.0  # standard errors that are added to a change
NEGLIGIBLE = 2e-3  # of a change


def terms(x: Tensor) -> Tensor:
    """Linear and quadratic: ``[n, d] -> [n, d + d (d + 1) / 2]``. There is no constant: at zero nothing changes."""
    at = torch.triu_indices(x.shape[1], x.shape[1])
    return torch.cat([x, x[:, at[0]] * x[:, at[1]]], 1)


class Surface:
    """Of changes ``[n]`` at points ``[n, d]``, by ridge regression.

    The lowest point of a fit to noisy runs is too low by as much as the noise allows. So the fit is made anew without
    each group of tasks, and two of its standard errors (jackknife) are added where a lowest point is looked for.

    Args:
        points: zero is where nothing changes.
        changes: of the runs.
        task: number of the task of each point.
        ridge: in units of points.
        largest: changes beyond, or that are not finite, count as this: a run that fails must not decide.
    """

    def __init__(self, points: Tensor, changes: Tensor, task: Tensor, ridge: float, largest: float) -> None:
        x = terms(points.double())
        y = changes.double().nan_to_num(nan=largest).clamp(-largest, largest)
        groups = task.unique(return_inverse=True)[1] % GROUPS
        eye = ridge * torch.eye(x.shape[1], dtype=x.dtype)
        each = [groups == k for k in groups.unique()]
        products = torch.stack([x[own].T @ x[own] for own in each])
        right = torch.stack([x[own].T @ y[own] for own in each])
        self._whole = torch.linalg.solve(products.sum(0) + eye, right.sum(0))
        left = torch.linalg.solve(products.sum(0) - products + eye, (right.sum(0) - right)[..., None])
        self._without = left[..., 0]  # [groups, terms]

    def __call__(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The changes to expect at points ``[n, d]``, and their standard errors."""
        x = terms(points.double())
        values = x @ self._without.T
        n = values.shape[1]
        spread = (values - values.mean(1, keepdim=True)).square().sum(1)
        return x @ self._whole, (spread * (n - 1) / n).sqrt()

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
            if change <= value + NEGLIGIBLE:
                best, value = without[0], change
        return best.float(), value

    def _sure(self, points: Tensor) -> Tensor:
        change, error = self(points)
        return change + CAUTION * error

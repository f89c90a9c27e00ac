"""A quadratic function fitted to noisy changes, and where it is lowest for sure."""

import pytest
import torch
from torch.testing import assert_close

from meta_train.surface import Surface, terms


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def surface_of(change, noise, n=600, tasks=30, d=4, seed=0):
    x = torch.randn(n, d, generator=seeded(seed))
    y = change(x) + noise * torch.randn(n, generator=seeded(seed + 100))
    return Surface(x, y, torch.arange(n) % tasks, largest=20.0)


def bounded(x):
    return x.clamp(-2, 2)


def bowl(x):
    """Lowest, -0.13, at (0.5, -0.2, 0, 0)."""
    return 0.5 * ((x[:, 0] - 0.5) ** 2 - 0.25) + 0.1 * ((x[:, 1] + 0.2) ** 2 - 0.04)


def test_without_noise_it_is_the_function():
    surface, x = surface_of(bowl, 0.0), torch.randn(50, 4, generator=seeded(9)).clamp(-1, 1)
    assert_close(surface(x)[0].float(), bowl(x), atol=0.03, rtol=0.05)
    point, value = surface.lowest(bounded, 4)
    assert_close(point, torch.tensor([0.5, -0.2, 0.0, 0.0]), atol=0.1, rtol=0)
    assert value == pytest.approx(-0.129, abs=0.01)


def test_it_does_not_promise_too_much():
    for seed in range(5):
        point, value = surface_of(bowl, 0.3, seed=seed).lowest(bounded, 4)
        assert float(bowl(point[None])) < -0.1  # most of what there is
        assert value > float(bowl(point[None])) - 0.03


def test_where_there_is_only_noise_little_is_promised():
    """The lowest point of such fits is far too low; without their standard error that would be the promise."""
    raw, sure = [], []
    for seed in range(8):
        surface = surface_of(lambda x: 0 * x[:, 0], 0.3, seed=seed)
        raw.append(float(surface(bounded(2 * torch.randn(4000, 4, generator=seeded(1))))[0].min()))
        sure.append(surface.lowest(bounded, 4)[1])
    assert sum(raw) < 3 * sum(sure) <= 0


def test_the_standard_error_is_that_of_fits_to_other_tasks():
    at = torch.tensor([[1.0, -1.0, 0.5, 0.0]])
    values, errors = zip(*(surface_of(bowl, 0.3, seed=seed)(at) for seed in range(40)), strict=True)
    assert torch.cat(values).std() == pytest.approx(float(torch.cat(errors).mean()), rel=0.3)


def test_what_has_no_effect_mostly_stays_zero():
    points = torch.stack([surface_of(bowl, 0.1, seed=seed).lowest(bounded, 4)[0] for seed in range(10)])
    zero = (points == 0).float().mean(0)
    assert zero[0] == 0 and (zero[2:] >= 0.3).all()


def test_runs_of_one_task_do_not_pass_for_many():
    """Each task has a slope of its own: then runs of a task say less than as many runs of other tasks."""
    x = torch.randn(600, 2, generator=seeded(0))
    task = torch.arange(600) // 100
    slopes = 0.5 + 0.2 * torch.randn(6, generator=seeded(1))
    y = slopes[task] * x[:, 0]
    at = torch.tensor([[1.0, 0.0]])
    together = float(Surface(x, y, task, 2.0)(at)[1])
    apart = float(Surface(x, y, torch.arange(600), 2.0)(at)[1])
    assert together > 2 * apart


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e9])
def test_a_run_that_fails_does_not_decide(wrong):
    x = torch.randn(400, 2, generator=seeded(0))
    y = bowl(x)
    y[0] = wrong
    point, _ = Surface(x, y, torch.arange(400) % 20, largest=1.0).lowest(bounded, 2)
    assert point[0] == pytest.approx(0.5, abs=0.2)


def test_bounds_hold():
    point, _ = surface_of(lambda x: -x[:, 0], 0.01).lowest(lambda x: x.clamp(-0.3, 0.3), 4)
    assert point[0] == pytest.approx(0.3)


def test_terms_are_linear_and_quadratic():
    assert terms(torch.tensor([[2.0, 3.0]])).tolist() == [[2, 3, 4, 9, 6]]

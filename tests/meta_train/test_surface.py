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


def test_the_ridge_is_the_one_that_predicts_other_tasks():
    """With as many coefficients as runs, the least ridge would follow the noise."""
    x = torch.randn(90, 8, generator=seeded(0))
    y = -0.3 * x[:, 0] + 0.3 * torch.randn(90, generator=seeded(1))
    other = torch.randn(500, 8, generator=seeded(2))
    found = Surface(x, y, torch.arange(90) % 30, largest=2.0)(other)[0]
    error = (found - -0.3 * other[:, 0]).square().mean().sqrt()
    assert error < 0.25  # 0.277 at the least ridge, 0.284 without any slope


def test_noisy_tasks_count_less():
    x = torch.randn(600, 2, generator=seeded(0))
    task = torch.arange(600) % 30
    noise = torch.where(task < 10, 0.6, 0.01)
    y = torch.where(task < 10, 0.3, -0.1) * x[:, 0] + noise * torch.randn(600, generator=seeded(1))
    slope = float(Surface(x, y, task, largest=5.0)(torch.tensor([[1.0, 0.0]]))[0])
    assert slope < -0.05  # 0.001 if all counted alike


def test_the_noise_that_runs_have_in_common_is_no_curvature():
    x = torch.randn(600, 2, generator=seeded(0))
    x[::10] = 0
    run = torch.arange(600) // 10
    y = -0.2 * x[:, 0] + torch.where(x.any(1), 0.3 * torch.randn(60, generator=seeded(1))[run] + 0.6, 0.0)
    at = torch.tensor([[1.5, 0.0], [-1.5, 0.0]])
    found = Surface(x, y, run, largest=5.0, run=run)(at)[0]
    assert found.tolist() == pytest.approx([-0.3, 0.3], abs=0.08)


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

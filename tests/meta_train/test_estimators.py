import dataclasses

import pytest
import torch
from torch import nn
from torch.func import functional_call

from learned_opt.rules.base import UpdateRule
from meta_train.estimators import ES, ESTIMATORS, PES, TBPTT, CoolDown, TruncatedES
from meta_train.unroll import Trace, Unroll
from tests.meta_train.test_unroll import LearnedSGD, Regression, make, naive_losses, seeded, theta_of


class Drive(UpdateRule):
    """w <- 0.9 w + theta: linear, so losses are quadratic in theta and ES has no smoothing bias."""

    def __init__(self):
        super().__init__()
        self.push = nn.Parameter(torch.tensor([0.05, -0.02], dtype=torch.float64))

    def init(self, params, symmetry):
        return {n: {} for n in params}

    def forward(self, params, grads, state, symmetry, *, total_steps=None, **options):
        return {n: -0.1 * p + self.push for n, p in params.items()}, state


class Target:
    """Loss |w - target|^2 / 2; every run starts at the same w, and there is no data."""

    name = "target"
    ceiling = 1.0
    target = torch.tensor([1.0, 1.0], dtype=torch.float64)

    def init(self, generator):
        return {"w": torch.tensor([-0.5, 0.7], dtype=torch.float64)}

    def batches(self, generator, n):
        return (torch.zeros(n, 1),)

    def loss(self, params, batch):
        return 0.5 * (params["w"] - self.target).square().sum() + 0 * batch[0].sum()


HORIZON, TRUNCATION, CALLS = 20, 8, 5  # 40 steps: two runs


def linear_system():
    return Unroll(Target(), Drive(), None, horizon=(HORIZON, HORIZON), clip=1e9)


def exact_gradient(unroll, runs):
    """Of the mean loss over runs of these lengths, by autograd through a plain loop."""
    theta, total = theta_of(unroll, grad=True), 0.0
    for length in runs:
        w = unroll.task.init(None)["w"]
        for _ in range(length):
            total = total + unroll.task.loss({"w": w}, (torch.zeros(1),))
            w = 0.9 * w + theta["push"]
    return torch.autograd.grad(total / sum(runs), theta["push"])[0]


def gradient_over_runs(estimator, unroll, seed):
    """Mean over CALLS truncations. The first run of every other pair ends after 10 of its 20 steps.

    So runs end and begin inside truncations (8 does not divide 10), and the phases differ.
    """
    generator, theta = seeded(seed), theta_of(unroll)
    carry = estimator.init(unroll, theta, generator)
    particles = carry.get("particles", carry)
    early = torch.arange(len(particles["step"])) % 2 == 0
    particles["stop"] = torch.where(early, 10, HORIZON)
    total = torch.zeros(2, dtype=torch.float64)
    for _ in range(CALLS):
        _, gradient, carry, metrics = estimator(unroll, theta, carry, generator)
        assert metrics["particle_steps"] == TRUNCATION * estimator.particles
        total += gradient["push"]
    return total / CALLS


def errors(samples, exact):
    """Distance of the mean from ``exact`` in standard errors, per entry."""
    return (samples.mean(0) - exact).abs() / (samples.std(0) / len(samples) ** 0.5)


def test_pes_is_unbiased_where_truncated_es_and_tbptt_are_biased():
    unroll, count = linear_system(), 50
    exact = exact_gradient(unroll, [20, 20, 10, 20, 10])
    pes = torch.stack([gradient_over_runs(PES(32, TRUNCATION, sigma=0.1), unroll, s) for s in range(count)])
    truncated = torch.stack(
        [gradient_over_runs(TruncatedES(32, TRUNCATION, sigma=0.1), unroll, s) for s in range(count)]
    )
    backward = gradient_over_runs(TBPTT(4, TRUNCATION), unroll, 0)
    assert (errors(pes, exact) < 4).all()
    assert (pes.std(0) / count**0.5 < 0.1 * exact.abs().max()).all(), "the test could tell"
    assert (errors(truncated, exact) > 4).all()
    # Truncated ES estimates what truncated backpropagation computes.
    assert (errors(truncated, backward) < 4).all()


def test_pes_correlates_each_run_with_its_own_perturbations(monkeypatch):
    """To mix them up would leave the mean as it is and only add variance, so: the exact numbers.

    Pair 0 is reset by the last step, pair 1 in the middle, pair 2 runs on.
    """
    loss = torch.randn(4, 6, dtype=torch.float64)
    segment = torch.zeros(4, 6, dtype=torch.int64)
    segment[2:, [1, 4]] = 1
    step = torch.tensor([0, 2, 4, 0, 2, 4])

    class Fixed:
        task, clip = Target(), 1.5

        def __call__(self, theta, particles, steps, generator, **_):
            return {"step": step, "stop": step + 9}, Trace(loss, loss, segment)

    noise = torch.randn(3, 2, dtype=torch.float64)
    monkeypatch.setattr("meta_train.estimators._noise", lambda *_: {"push": noise})
    before = torch.randn(3, 2, dtype=torch.float64)
    carry = {"particles": {"step": step, "stop": step + 9}, "drift": {"push": before}}
    theta = {"push": torch.zeros(2, dtype=torch.float64)}
    _, gradient, after, _ = PES(6, 4, sigma=0.1)(Fixed(), theta, carry, seeded(0))

    difference = (loss[:, :3] - loss[:, 3:]) / (2 * 0.1**2) / 4  # [K, pair], mean over K
    drift = before + noise
    per_pair = torch.stack(
        [
            difference[:, 0].sum() * drift[0],
            difference[:2, 1].sum() * drift[1] + difference[2:, 1].sum() * noise[1],
            difference[:, 2].sum() * drift[2],
        ]
    )
    torch.testing.assert_close(gradient["push"], per_pair.mean(0))
    torch.testing.assert_close(after["drift"]["push"], torch.stack([torch.zeros_like(noise[0]), noise[1], drift[2]]))


def test_es_is_unbiased():
    unroll, count = linear_system(), 60
    estimator, theta = ES(40, sigma=0.1), theta_of(unroll)
    samples = torch.stack([estimator(unroll, theta, {}, seeded(s))[1]["push"] for s in range(count)])
    exact = exact_gradient(unroll, [HORIZON])
    assert (errors(samples, exact) < 4).all()
    assert (samples.std(0) / count**0.5 < 0.1 * exact.abs().max()).all(), "the test could tell"


@pytest.mark.parametrize("detach", [True, False])
def test_full_length_tbptt_is_plain_autograd(detach):
    """One particle, and the truncation is longer than the run."""
    unroll = make(horizon=(10, 10))
    estimator, generator = TBPTT(1, truncation=30, detach=detach), seeded(5)
    theta = theta_of(unroll)
    carry = estimator.init(unroll, theta, generator)
    loss, gradient, carry, _ = estimator(unroll, theta, carry, generator)

    leaves = theta_of(unroll, grad=True)
    naive = naive_losses(unroll, leaves, 5, 10, detach).mean()
    expected = torch.autograd.grad(naive, list(leaves.values()))
    torch.testing.assert_close(loss, naive.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(list(gradient.values()), list(expected), rtol=1e-10, atol=1e-10)
    assert carry["step"].tolist() == [0], "the run is over and a fresh one is ready"


def test_the_gradient_of_a_cool_down_is_that_of_the_loss_where_it_ends():
    """And the run goes on from where the truncation ended."""
    unroll, theta = dataclasses.replace(linear_system(), horizon=(100, 100)), theta_of(linear_system(), grad=True)
    estimator = CoolDown(2, truncation=4, cool_down=5, between=3)
    particles = unroll.init(2, seeded(0))
    loss, gradient, carry, metrics = estimator(unroll, theta, particles, seeded(1))

    w = unroll.task.init(None)["w"]
    for _ in range(3):
        w = (0.9 * w + theta["push"]).detach()
    for _ in range(4):
        w = 0.9 * w + theta["push"]
    end = w.detach()
    for k in range(5):
        w = w + (1 - (k + 0.5) / 5) * (theta["push"] - 0.1 * w)
    expected = unroll.task.loss({"w": w}, (torch.zeros(1),))
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient["push"], torch.autograd.grad(expected, theta["push"])[0])
    torch.testing.assert_close(carry["params"]["w"], end.expand(2, -1))
    assert carry["step"].tolist() == [7, 7] and metrics["particle_steps"] == 2 * 12


def test_tbptt_with_one_step_left_has_no_gradient_and_goes_on():
    """The loss of the last step is that of the weights before it, which the truncation has cut off."""
    unroll = make(horizon=(9, 9))
    estimator, theta, generator = TBPTT(2, truncation=4), theta_of(unroll), seeded(5)
    carry = unroll.init(2, generator)
    left, zero = [], []
    for _ in range(4):
        left.append(int((carry["stop"] - carry["step"]).max()))
        loss, gradient, carry, _ = estimator(unroll, theta, carry, generator)
        zero.append(not any(g.any() for g in gradient.values()))
        assert loss.isfinite()
    assert left == [9, 5, 1, 9] and zero == [False, False, True, False]


def test_es_approaches_the_exact_second_order_gradient():
    """On a nonlinear problem, with a small sigma and many pairs along each axis of theta."""
    unroll = make(horizon=(10, 10))
    theta = theta_of(unroll)
    exact = TBPTT(64, truncation=10, detach=False)
    _, expected, _, _ = exact(unroll, theta, exact.init(unroll, theta, seeded(1)), seeded(2))
    estimator = ES(64, sigma=1e-3)
    samples = [estimator(unroll, theta, {}, seeded(s))[1] for s in range(40)]
    samples = torch.stack([torch.cat([g.flatten() for g in x.values()]) for x in samples])
    expected = torch.cat([g.flatten() for g in expected.values()])
    spread = samples.std(0) / 40**0.5
    # The exact one has 64 runs of its own: allow its sampling error, that of about one sample.
    assert ((samples.mean(0) - expected).abs() < 4 * (spread + samples.std(0))).all()
    assert (samples.mean(0).sign() == expected.sign()).all()


class Poisoned(Regression):
    """Particles whose weights happen to start large see a NaN loss."""

    def loss(self, params, batch):
        poison = torch.where(params["0.bias"][0] > 0.5, torch.nan, 1.0)
        return super().loss(params, batch) * poison


@pytest.mark.parametrize("kind", list(ESTIMATORS))
def test_a_diverged_particle_leaves_the_gradient_finite(kind):
    unroll = make(Poisoned(), horizon=(12, 12), clip=50.0)
    estimator = ESTIMATORS[kind](particles=16)
    if kind != "ES":
        estimator = dataclasses.replace(estimator, truncation=5)
    theta, generator = theta_of(unroll), seeded(0)
    carry = estimator.init(unroll, theta, generator)
    seen = 0.0
    for _ in range(6):
        loss, gradient, carry, metrics = estimator(unroll, theta, carry, generator)
        seen += metrics["diverged"]
        assert loss.isfinite() and all(g.isfinite().all() for g in gradient.values())
        assert any(g.abs().max() > 0 for g in gradient.values())
        if kind in ("TBPTT", "CoolDown"):
            assert metrics["dropped"] >= metrics["diverged"] > 0
    assert seen > 0


def test_outliers_are_cut_to_a_multiple_of_the_median():
    class Cliff(Regression):
        """A few particles feel a gradient a million times as large."""

        def loss(self, params, batch):
            loss = super().loss(params, batch)
            steep = loss + 1e6 * (params["2.bias"][0] - params["2.bias"][0].detach())
            return torch.where(params["2.bias"][0] > 1.5, steep, loss)

    unroll = make(Cliff(), LearnedSGD(1e-9))
    theta = theta_of(unroll)

    def norm(outlier):
        estimator, generator = TBPTT(32, truncation=10, outlier=outlier), seeded(1)
        carry = estimator.init(unroll, theta, generator)
        gradient = estimator(unroll, theta, carry, generator)[1]
        return sum(g.square().sum() for g in gradient.values()) ** 0.5

    assert norm(None) > 1e3 * norm(3.0) > 0


@pytest.mark.parametrize("kind", list(ESTIMATORS))
def test_contract(kind):
    """The same seed gives the same estimate; carries are nested dicts of tensors without graphs."""
    unroll = make(horizon=(6, 20))
    estimator, theta = ESTIMATORS[kind](particles=4), theta_of(unroll)
    before = {n: t.clone() for n, t in theta.items()}

    def once():
        generator = seeded(0)
        carry = estimator.init(unroll, theta, generator)
        for _ in range(2):
            loss, gradient, carry, _ = estimator(unroll, theta, carry, generator)
        return loss, gradient, carry

    (loss, gradient, carry), (loss2, gradient2, _) = once(), once()
    assert torch.equal(loss, loss2) and not loss.requires_grad and loss.ndim == 0
    for n, t in theta.items():
        assert gradient[n].shape == t.shape and torch.equal(gradient[n], gradient2[n])
        assert torch.equal(t, before[n])

    def check(tree):
        for value in tree.values():
            if isinstance(value, dict):
                check(value)
            else:
                assert isinstance(value, torch.Tensor) and not value.requires_grad

    check(carry)


@pytest.mark.parametrize("kind", ["ES", "TruncatedES", "PES"])
def test_pairs_share_weights_data_and_horizon(kind):
    """Equal losses on both sides when theta has no effect: then the gradient is exactly zero."""

    class Deaf(LearnedSGD):
        def forward(self, *args, **kwargs):
            constant = {n: p.detach() * 0 + 0.1 for n, p in self.named_parameters()}
            return functional_call(Plain(), constant, args, kwargs)

    class Plain(LearnedSGD):
        pass

    unroll = make(Regression(), Deaf(), horizon=(5, 30))
    estimator, theta, generator = ESTIMATORS[kind](particles=6), theta_of(unroll), seeded(0)
    carry = estimator.init(unroll, theta, generator)
    for _ in range(4):
        _, gradient, carry, _ = estimator(unroll, theta, carry, generator)
        assert all((g == 0).all() for g in gradient.values())


@pytest.mark.parametrize(
    "make_it",
    [
        lambda: PES(3),
        lambda: ES(4, sigma=0.0),
        lambda: TBPTT(4, truncation=1),
        lambda: CoolDown(4, truncation=0),
        lambda: CoolDown(4, between=-1),
        lambda: PES(4, truncation=0),
        lambda: TruncatedES(4, truncation=-1),
    ],
)
def test_impossible_settings_say_what_to_pass(make_it):
    with pytest.raises(ValueError, match="Pass"):
        make_it()

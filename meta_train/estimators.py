"""Meta-gradients. An estimator sees an unroll and theta, the learned weights; never a task or a rule.

Every estimator is frozen plain data with two methods:

    init(unroll, theta, generator) -> carry
    __call__(unroll, theta, carry, generator) -> (meta-loss, gradient, carry, metrics)

The carry is nested dicts of tensors, so it can be saved and continued.

| estimator   | meta-gradient of                    | bias                  | variance         |
|-------------|-------------------------------------|-----------------------|------------------|
| TBPTT       | the truncation, exactly             | ignores earlier steps | grows with chaos |
| CoolDown    | the loss soon after the truncation  | ignores earlier steps | small            |
| ES          | the smoothed loss of whole runs     | none                  | grows with theta |
| TruncatedES | the smoothed loss of the truncation | ignores earlier steps | grows with theta |
| PES         | the smoothed loss of whole runs     | none                  | also with length |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from meta_train.unroll import Trace, Unroll, detached, head, tiled

Theta = Mapping[str, Tensor]
Carry = dict[str, Any]
Estimate = tuple[Tensor, dict[str, Tensor], Carry, dict[str, float]]


class Estimator(Protocol):
    """Meta-loss and meta-gradient from one unroll after the other."""

    particles: int

    def init(self, unroll: Unroll, theta: Theta, generator: torch.Generator) -> Carry:
        """Carry of the first call."""
        ...

    def __call__(self, unroll: Unroll, theta: Theta, carry: Carry, generator: torch.Generator) -> Estimate:
        """Mean meta-loss (0-d), gradient per name of theta, next carry, metrics."""
        ...


@dataclass(frozen=True)
class TBPTT:
    """Truncated backpropagation: the gradient of the mean loss of ``truncation`` steps.

    Equal to plain autograd through the whole run where the truncation covers the horizon. Each
    particle has its own copy of theta, so its gradient can be judged alone: a non-finite one is
    left out and counted, and with ``outlier`` its norm is cut to ``outlier`` times the median.

    Attributes:
        particles: runs in parallel.
        truncation: steps per call, at least 2 (the first loss does not depend on theta).
        detach: the inner gradient is a constant (first order).
        remat: recompute the rule in the backward pass: memory of one step's activations, not all.
        outlier: see above; None leaves the norms alone.
    """

    particles: int = 8
    truncation: int = 50
    detach: bool = True
    remat: bool = False
    outlier: float | None = None

    def __post_init__(self) -> None:
        if self.truncation < 2 or self.particles < 1:
            raise ValueError(
                f"TBPTT with truncation {self.truncation} and {self.particles} particles has no "
                "gradient. Pass truncation >= 2 and particles >= 1."
            )

    def init(self, unroll: Unroll, theta: Theta, generator: torch.Generator) -> Carry:
        """Fresh particles, desynchronised if a run takes several truncations."""
        return unroll.init(self.particles, generator, spread=self.truncation < unroll.horizon[1])

    def __call__(self, unroll: Unroll, theta: Theta, carry: Carry, generator: torch.Generator) -> Estimate:
        """See :class:`Estimator`."""
        own = _own(theta, self.particles)
        steps = _steps(self.truncation, carry)
        after, trace = unroll(own, carry, steps, generator, batched=True, detach=self.detach, remat=self.remat)
        per_run = trace.loss.mean(0)
        gradient, dropped = _mean_gradient(per_run, own, self.outlier)
        metrics = _metrics(unroll, trace) | {"dropped": dropped}
        return per_run.detach().mean(), gradient, detached(after), metrics


@dataclass(frozen=True)
class CoolDown:
    """Truncated backpropagation of where the truncation leads.

    A truncation is followed by steps at a rate that falls linearly to zero, and judged by the loss on fresh batches
    that they end at; then the run goes on from the truncation's end as if they had not been made. Losses on the way say
    little of where a run ends: at a high rate they are mostly the noise of the last steps. Between two truncations runs
    go on without gradient, so that they are seen at all ages. Each particle's gradient is cut to the median norm, so
    none outweighs the others. It is good for the direction of theta, not for its length: it does not see what comes
    later (see :mod:`meta_train.lengths`).

    Attributes:
        particles: runs in parallel.
        truncation: steps per call with a gradient.
        cool_down: steps at a falling rate after them.
        between: steps without gradient before them.
        batches: fresh batches that judge a particle.
    """

    particles: int = 16
    truncation: int = 20
    cool_down: int = 10
    between: int = 30
    batches: int = 2

    def __post_init__(self) -> None:
        if min(self.truncation, self.particles, self.batches) < 1 or min(self.cool_down, self.between) < 0:
            raise ValueError(
                f"{self} has no gradient. Pass at least 1 particle, 1 step of truncation and 1 batch, and nothing "
                "negative."
            )

    def init(self, unroll: Unroll, theta: Theta, generator: torch.Generator) -> Carry:
        """Fresh particles, desynchronised."""
        return unroll.init(self.particles, generator, spread=True)

    def __call__(self, unroll: Unroll, theta: Theta, carry: Carry, generator: torch.Generator) -> Estimate:
        """See :class:`Estimator`."""
        if self.between:
            with torch.no_grad():
                carry, _ = unroll(theta, carry, self.between, generator)
        own = _own(theta, self.particles)
        after, trace = unroll(own, carry, self.truncation, generator, batched=True)
        rates = [1 - (k + 0.5) / self.cool_down for k in range(self.cool_down)]
        ends, _ = unroll(own, after, self.cool_down, generator, batched=True, rates=rates, resets=False)
        loss = unroll.judged(ends["params"], self.batches, generator)
        gradient, dropped = _mean_gradient(loss, own, outlier=1.0)
        taken = self.particles * (self.between + self.truncation + self.cool_down)
        metrics = _metrics(unroll, trace) | {"dropped": dropped, "particle_steps": float(taken)}
        return loss.detach().mean(), gradient, detached(after), metrics


@dataclass(frozen=True)
class ES:
    """Antithetic evolution strategies over whole, fresh runs; one horizon per call.

    With pairs i, perturbations e_i ~ N(0, sigma^2) and L the mean loss of a run,

        gradient = mean_i  (L(theta + e_i) - L(theta - e_i)) / (2 sigma^2) * e_i,

    unbiased for the gradient of E_e L(theta + e).

    Attributes:
        particles: runs in parallel, even: two per pair.
        sigma: standard deviation of the perturbation of every entry of theta.
    """

    particles: int = 16
    sigma: float = 0.01

    def __post_init__(self) -> None:
        _check_pairs(self)

    def init(self, unroll: Unroll, theta: Theta, generator: torch.Generator) -> Carry:
        """Nothing is carried."""
        return {}

    @torch.no_grad()
    def __call__(self, unroll: Unroll, theta: Theta, carry: Carry, generator: torch.Generator) -> Estimate:
        """See :class:`Estimator`."""
        particles = unroll.init(self.particles, generator, copies=2, common=True)
        noise = _noise(theta, self.particles // 2, self.sigma, generator)
        steps = int(particles["horizon"][0])
        _, trace = unroll(_antithetic(theta, noise), particles, steps, generator, copies=2, batched=True)
        gradient = _correlate(trace.loss.mean(0), noise, self.sigma)
        return trace.loss.mean(), gradient, {}, _metrics(unroll, trace)


@dataclass(frozen=True)
class TruncatedES:
    """Antithetic evolution strategies over one truncation: a pair starts where the run stands.

    Biased: what theta did in earlier truncations is a constant. The run goes on with one of
    the pair.

    Attributes:
        particles: runs in parallel, even: two per pair.
        truncation: steps per call.
        sigma: standard deviation of the perturbation of every entry of theta.
    """

    particles: int = 16
    truncation: int = 50
    sigma: float = 0.01

    def __post_init__(self) -> None:
        _check_pairs(self)

    def init(self, unroll: Unroll, theta: Theta, generator: torch.Generator) -> Carry:
        """One particle per pair, desynchronised if a run takes several truncations."""
        spread = self.truncation < unroll.horizon[1]
        return unroll.init(self.particles // 2, generator, spread=spread)

    @torch.no_grad()
    def __call__(self, unroll: Unroll, theta: Theta, carry: Carry, generator: torch.Generator) -> Estimate:
        """See :class:`Estimator`."""
        pairs = self.particles // 2
        noise = _noise(theta, pairs, self.sigma, generator)
        steps = _steps(self.truncation, carry)
        after, trace = unroll(_antithetic(theta, noise), tiled(carry, 2), steps, generator, copies=2, batched=True)
        gradient = _correlate(trace.loss.mean(0), noise, self.sigma)
        return trace.loss.mean(), gradient, head(after, pairs), _metrics(unroll, trace)


@dataclass(frozen=True)
class PES:
    """Persistent evolution strategies (Vicol, Metz, Sohl-Dickstein 2021): truncated, yet unbiased.

    A pair runs on under a new perturbation e in every truncation. A loss depends on all
    perturbations since its run began, so it is correlated with their sum xi:

        gradient = mean_i  [ (L+ - L-) of the run that was under way * xi_i
                           + (L+ - L-) of runs begun in this truncation * e_i ] / (2 sigma^2).

    Attributes:
        particles: runs in parallel, even: two per pair.
        truncation: steps per call.
        sigma: standard deviation of the perturbation of every entry of theta.
    """

    particles: int = 16
    truncation: int = 50
    sigma: float = 0.01

    def __post_init__(self) -> None:
        _check_pairs(self)

    def init(self, unroll: Unroll, theta: Theta, generator: torch.Generator) -> Carry:
        """Pairs of particles, and the sum of the perturbations so far: none."""
        spread = self.truncation < unroll.horizon[1]
        pairs = self.particles // 2
        return {
            "particles": unroll.init(self.particles, generator, copies=2, spread=spread),
            "drift": {n: t.new_zeros(pairs, *t.shape) for n, t in detached(dict(theta)).items()},
        }

    @torch.no_grad()
    def __call__(self, unroll: Unroll, theta: Theta, carry: Carry, generator: torch.Generator) -> Estimate:
        """See :class:`Estimator`."""
        pairs = self.particles // 2
        noise = _noise(theta, pairs, self.sigma, generator)
        drift = {n: carry["drift"][n] + e for n, e in noise.items()}
        steps = _steps(self.truncation, carry["particles"])
        after, trace = unroll(_antithetic(theta, noise), carry["particles"], steps, generator, copies=2, batched=True)
        begun = trace.segment > 0
        old = _correlate(torch.where(begun, 0.0, trace.loss).mean(0), drift, self.sigma)
        new = _correlate(torch.where(begun, trace.loss, 0.0).mean(0), noise, self.sigma)
        # A run that has taken steps under this noise carries it on; one just reset has not.
        resets = begun[-1, :pairs]
        unborn = after["step"][:pairs] == 0
        carried = {}
        for n, e in noise.items():
            shape = (-1, *[1] * (e.ndim - 1))
            kept = torch.where(resets.view(shape), e, drift[n])
            carried[n] = torch.where(unborn.view(shape), 0.0, kept)
        gradient = {n: old[n] + new[n] for n in noise}
        after = {"particles": after, "drift": carried}
        return trace.loss.mean(), gradient, after, _metrics(unroll, trace)


ESTIMATORS: dict[str, type[Any]] = {c.__name__: c for c in (TBPTT, CoolDown, ES, TruncatedES, PES)}


def _own(theta: Theta, particles: int) -> dict[str, Tensor]:
    """A copy of theta for every particle."""
    return {n: t.detach().expand(particles, *t.shape).clone().requires_grad_() for n, t in theta.items()}


def _mean_gradient(loss: Tensor, own: dict[str, Tensor], outlier: float | None) -> tuple[dict[str, Tensor], float]:
    """The mean over particles of the gradients of losses [P], and how many were left out as not finite.

    Args:
        loss: of every particle.
        own: their copies of theta.
        outlier: norms are cut to so many times their median; None: they are not.
    """
    if loss.requires_grad:
        grads = torch.autograd.grad(loss.sum(), list(own.values()), materialize_grads=True)
    else:  # one step was left, whose loss is that of the weights before it
        grads = tuple(map(torch.zeros_like, own.values()))
    flat = torch.cat([g.reshape(len(loss), -1) for g in grads], 1)  # [P, size of theta]
    kept = flat.isfinite().all(1)
    norms = torch.where(kept, flat.norm(dim=1), 0.0)
    scale = kept.to(norms.dtype)
    if outlier is not None and bool(kept.any()):
        limit = outlier * norms[kept].median()
        scale = scale * (limit / norms.clamp(min=1e-30)).clamp(max=1.0)
    scale = scale / kept.sum().clamp(min=1)  # left out, not zero: the mean is over the particles that have a gradient
    gradient = {}
    for n, g in zip(own, grads, strict=True):
        shape = (-1, *[1] * (g.ndim - 1))
        gradient[n] = (torch.where(kept.view(shape), g, 0.0) * scale.view(shape)).sum(0)
    return gradient, float((~kept).sum())


def _steps(truncation: int, particles: Carry) -> int:
    """The truncation, or what the longest run has left: then the call covers it to its end."""
    return min(truncation, int((particles["stop"] - particles["step"]).max()))


def _noise(theta: Theta, pairs: int, sigma: float, generator: torch.Generator) -> dict[str, Tensor]:
    return {n: sigma * torch.randn(pairs, *t.shape, generator=generator, dtype=t.dtype) for n, t in theta.items()}


def _antithetic(theta: Theta, noise: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.cat([t + noise[n], t - noise[n]]) for n, t in theta.items()}


def _correlate(loss: Tensor, noise: dict[str, Tensor], sigma: float) -> dict[str, Tensor]:
    """mean_i (L+_i - L-_i) / (2 sigma^2) * noise_i, of losses [2 pairs]."""
    plus, minus = loss.chunk(2)
    weight = (plus - minus) / (2 * sigma**2 * len(plus))
    return {n: torch.tensordot(weight.to(e.dtype), e, 1) for n, e in noise.items()}


def _metrics(unroll: Unroll, trace: Trace) -> dict[str, float]:
    finite = trace.raw.isfinite()
    relative = trace.raw / unroll.task.ceiling
    return {
        "diverged": float((~finite).double().mean()),
        "clipped": float((finite & (relative >= unroll.clip)).double().mean()),
        "particle_steps": float(trace.raw.numel()),
    }


def _check_pairs(estimator: Any) -> None:
    if estimator.particles < 2 or estimator.particles % 2 or not estimator.sigma > 0:
        raise ValueError(
            f"{estimator} needs antithetic pairs and a perturbation. "
            "Pass an even number of particles >= 2 and sigma > 0."
        )
    if getattr(estimator, "truncation", 1) < 1:
        raise ValueError(f"{estimator} takes no step. Pass truncation >= 1.")

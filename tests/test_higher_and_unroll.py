"""``higher`` around the optimizer and our own unroll are one computation: one loss curve, one meta-gradient."""

import pytest
import torch
from torch import nn

from learned_opt import NFNOpt
from learned_opt.higher import register_higher
from learned_opt.rules import RULES
from meta_train.unroll import Unroll
from tests.inferred import infer

STEPS = 5


class Fixed:
    """A task with one batch."""

    name, steps, ceiling = "fixed", STEPS, 1.0

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
        self.x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
        self.y = torch.randint(0, 3, (16,), generator=generator)

    def init(self, generator):
        return {
            n: 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in self.model.named_parameters()
        }

    def batches(self, generator, n):
        return self.x.expand(n, -1, -1), self.y.expand(n, -1)

    def loss(self, params, batch):
        x, y = batch
        return nn.functional.cross_entropy(torch.func.functional_call(self.model, params, (x,)), y)


def test_higher_and_the_unroll_have_one_meta_gradient():
    higher = pytest.importorskip("higher")
    register_higher()
    task, generator = Fixed(), torch.Generator().manual_seed(1)
    rule = RULES["learned"]().double()
    with torch.no_grad():
        for p in rule.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    symmetry = infer(task.model)

    theta = {n: p.detach().clone().requires_grad_() for n, p in rule.named_parameters()}
    unroll = Unroll(task, rule, symmetry, (STEPS, STEPS), clip=1e9, floor=0.0)
    particles = unroll.init(1, torch.Generator().manual_seed(2))
    weights = {n: p[0].clone() for n, p in particles["params"].items()}
    _, trace = unroll(theta, particles, STEPS, generator, detach=False)
    ours = torch.autograd.grad(trace.loss.mean(), list(theta.values()), materialize_grads=True)

    task.model.load_state_dict(weights)
    optimizer = NFNOpt(task.model.named_parameters(), symmetry=symmetry, total_steps=STEPS, rule=rule)
    losses = []
    with higher.innerloop_ctx(task.model, optimizer) as (fmodel, diffopt):
        for _ in range(STEPS):
            losses.append(nn.functional.cross_entropy(fmodel(task.x), task.y))
            diffopt.step(losses[-1])
        mean = torch.stack(losses).mean()
        theirs = torch.autograd.grad(mean, list(rule.parameters()), allow_unused=True, materialize_grads=True)

    torch.testing.assert_close(trace.loss[:, 0], torch.stack(losses), rtol=1e-12, atol=1e-12)
    assert max(float(g.norm()) for g in ours) > 1e-3
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)

"""Many networks trained at once: weights with a leading axis of networks, and each network's own optimizer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks.zoo.zoo import ZooError

Weights = dict[str, Tensor]

# first-moment decay, second-moment decay, divides by the root of the second moment, corrects the moments' bias
OPTIMIZERS: dict[str, tuple[float, float, bool, bool]] = {
    "sgd": (0.0, 0.0, False, False),
    "momentum": (0.9, 0.0, False, False),
    "rmsprop": (0.0, 0.9, True, False),
    "adam": (0.9, 0.999, True, True),
}
EPSILON = 1e-7


@dataclass
class Optimizers:
    """SGD, momentum, RMSprop and Adam side by side: each network k of the stack has its own.

        m <- b1 m + (1 - b1 | 1) g        (1 - b1 for Adam)
        v <- b2 v + (1 - b2) g^2
        w <- w - lr m / (sqrt(v) + eps)   (Adam: bias-corrected; SGD and momentum: not divided)

    where g is the gradient plus `decay` times the weight, for parameters of more than one axis.
    """

    lr: Tensor
    decay: Tensor
    settings: Tensor  # [networks, 4], rows of OPTIMIZERS

    def __post_init__(self) -> None:
        self.step = 0
        self.m: Weights = {}
        self.v: Weights = {}

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> "Optimizers":
        """From each network's "optimizer", "learning_rate" and "decay"."""
        settings = torch.tensor([[float(v) for v in OPTIMIZERS[row["optimizer"]]] for row in rows])
        return cls(
            torch.tensor([float(row["learning_rate"]) for row in rows]),
            torch.tensor([float(row["decay"]) for row in rows]),
            settings,
        )

    @torch.no_grad()
    def update(self, weights: Weights, gradients: Weights, rate: float = 1.0) -> Weights:
        """The next weights; `rate` multiplies every learning rate."""
        self.step += 1
        b1, b2, adaptive, corrects = self.settings.unbind(1)
        fresh = torch.where(corrects > 0, 1 - b1, torch.ones_like(b1))
        c1, c2 = ((1 - b**self.step).where(corrects > 0, torch.ones_like(b)) for b in (b1, b2))
        lr = self.lr * rate / c1
        after = {}
        for name, w in weights.items():
            along = (-1, *(1,) * (w.ndim - 1))
            g = gradients[name]
            if w.ndim > 2:
                g = g + self.decay.view(along) * w
            m = self.m[name] = b1.view(along) * self.m.get(name, 0) + fresh.view(along) * g
            v = self.v[name] = b2.view(along) * self.v.get(name, 0) + (1 - b2).view(along) * g.square()
            root = (v / c2.view(along)).sqrt() + EPSILON
            after[name] = w - lr.view(along) * torch.where(adaptive.view(along) > 0, m / root, m)
        return after


def train(
    loss: Callable[[Weights, int], Tensor],
    weights: Weights,
    optimizers: Optimizers,
    steps: int,
    checkpoints: Sequence[int],
    schedule: Callable[[float], float] = lambda progress: 1.0,
) -> dict[int, Weights]:
    """Train all networks and return their weights at the checkpoints.

    Args:
        loss: (weights, step) -> [networks], each network's own loss on its batch of that step.
        weights: initial weights [networks, *shape].
        optimizers: one per network.
        steps: how many updates.
        checkpoints: after how many updates to keep the weights; 0 is the initial ones.
        schedule: progress in 0..1 -> what multiplies the learning rates.
    """
    kept = {0: weights} if 0 in checkpoints else {}
    for step in range(steps):
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        gradients = torch.autograd.grad(loss(leaves, step).sum(), list(leaves.values()))
        weights = optimizers.update(weights, dict(zip(weights, gradients, strict=True)), schedule(step / steps))
        if step + 1 in checkpoints:
            kept[step + 1] = weights
    return kept


def check_checkpoints(steps: int, checkpoints: Sequence[int]) -> None:
    """Raise ZooError where the last checkpoint is not the end of the training: it stands for the trained network."""
    if not checkpoints or min(checkpoints) < 0 or max(checkpoints) != steps:
        raise ZooError(
            f"checkpoints {', '.join(map(str, checkpoints))} do not end at the last of {steps} steps. "
            f"Give --checkpoints whose last is {steps}."
        )


def finite(weights: Mapping[str, Tensor]) -> Tensor:
    """bool [networks]: which networks have finite weights, that is, did not diverge."""
    return torch.stack([w.flatten(1).isfinite().all(1) for w in weights.values()]).all(0)

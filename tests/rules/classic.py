"""Adam, SGD and Muon as update rules, with the numerics of ``torch.optim``: rules of other kinds than our own.

They need a learning rate like torch's. Weight decay is decoupled in all three, none where it is None.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.optim._muon import _zeropower_via_newtonschulz

from learned_opt.rules.base import State, UpdateRule, Weights

Slots = dict[str, Tensor]  # the state of one tensor
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Classic(UpdateRule):
    """A rule that goes tensor by tensor, without weights of its own: subclasses say its slots and its update."""

    slots: tuple[str, ...]

    @abstractmethod
    def update(self, g: Tensor, s: Slots, matrix: bool) -> tuple[Tensor, Slots]:
        """Update at unit learning rate, and next slots, of one tensor with gradient ``g``."""

    def init(self, params, symmetry) -> State:
        return {name: self._fresh(p) for name, p in params.items()}

    def _fresh(self, p: Tensor) -> Slots:
        dtype = torch.promote_types(p.dtype, torch.float32)
        step = torch.zeros((), dtype=dtype, device=p.device)
        return {"step": step, **{slot: torch.zeros_like(p, dtype=dtype) for slot in self.slots}}

    def forward(
        self,
        params,
        grads,
        state,
        symmetry,
        *,
        total_steps=None,
        weight_decay=None,
        names=None,
        ages=None,
        in_place=False,
    ) -> tuple[Weights, State]:
        updates, state = {}, dict(state)
        for name, g in grads.items():
            slots = {**state[name], "step": state[name]["step"] + 1}
            matrix = g.ndim == 2 and "lookup" not in symmetry.specs[name].roles
            update, state[name] = self.update(g.to(slots["step"].dtype), slots, matrix)
            decay = weight_decay[name] if isinstance(weight_decay, dict) else weight_decay
            updates[name] = update - decay * params[name] if decay else update
        return updates, state


class SGD(Classic):
    """``m <- momentum m + g``, update ``-m``: ``torch.optim.SGD`` (Polyak 1964)."""

    slots = ("momentum_buffer",)

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum

    def update(self, g: Tensor, s: Slots, matrix: bool) -> tuple[Tensor, Slots]:
        m = self.momentum * s["momentum_buffer"] + g
        return -m, {**s, "momentum_buffer": m}


class Adam(Classic):
    """``-m_hat / (sqrt(v_hat) + eps)``: ``torch.optim.Adam`` (Kingma & Ba 2015)."""

    slots = ("exp_avg", "exp_avg_sq")

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__()
        self.betas, self.eps = betas, eps

    def update(self, g: Tensor, s: Slots, matrix: bool) -> tuple[Tensor, Slots]:
        return adam(g, s, self.betas, self.eps)


class Gated(Adam):
    """Adam, times a learned factor for matrices and another for the rest: a rule with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(1, 1)
        for p in self.parameters():
            nn.init.zeros_(p)

    def update(self, g: Tensor, s: Slots, matrix: bool) -> tuple[Tensor, Slots]:
        update, s = super().update(g, s, matrix)
        return (1 + self.gate(g.new_full((1,), float(matrix)))[0]).exp() * update, s


class Muon(Classic):
    """Polar factor of Nesterov momentum on matrices, AdamW on all else: ``torch.optim.Muon`` (Jordan et al. 2024).

    A matrix is a parameter with two dimensions that is no lookup table (the symmetry's roles tell).
    """

    slots = Adam.slots  # the matrices' momentum is exp_avg; their exp_avg_sq stays zero

    def __init__(self, momentum: float = 0.95) -> None:
        super().__init__()
        self.momentum = momentum

    def update(self, g: Tensor, s: Slots, matrix: bool) -> tuple[Tensor, Slots]:
        if not matrix:
            return adam(g, s, (0.9, 0.999), 1e-8)
        m = s["exp_avg"].lerp(g, 1 - self.momentum)
        polar = _zeropower_via_newtonschulz(g.lerp(m, self.momentum), COEFFICIENTS, 5, 1e-7)
        return -0.2 * max(g.shape) ** 0.5 * polar.to(g.dtype), {**s, "exp_avg": m}


def adam(g: Tensor, s: Slots, betas: tuple[float, float], eps: float) -> tuple[Tensor, Slots]:
    """Adam's update at unit learning rate, and next slots; ``s["step"]`` counts from 1."""
    m = s["exp_avg"].lerp(g, 1 - betas[0])
    v = betas[1] * s["exp_avg_sq"] + (1 - betas[1]) * g * g
    m_hat = m / bias_correction(betas[0], s["step"])
    # no gradient at v = 0, where the square root has none
    root = v.clamp(min=torch.finfo(v.dtype).tiny).sqrt()
    root_hat = root / bias_correction(betas[1], s["step"]).sqrt()
    return -m_hat / (root_hat + eps), {**s, "exp_avg": m, "exp_avg_sq": v}


def bias_correction(beta: float, step: Tensor) -> Tensor:
    """``1 - beta^step`` without the cancellation that costs float32 four digits at first."""
    return -torch.expm1(step * (math.log(beta) if beta else -math.inf))

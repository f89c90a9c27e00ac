"""Adam, SGD and Muon as update rules: yardsticks with the numerics of ``torch.optim``.

They need a learning rate like torch's. Weight decay is decoupled in all three: ``Adam`` with it is
``torch.optim.AdamW``.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from learned_opt.rules.base import State, UpdateRule, Weights
from learned_opt.rules.polar import newton_schulz
from learned_opt.symmetry import Symmetry

Slots = dict[str, Tensor]  # the state of one tensor


class Classic(UpdateRule):
    """A rule that goes tensor by tensor, without theta: subclasses say its slots and its update."""

    slots: tuple[str, ...]

    @abstractmethod
    def update(self, g: Tensor, s: dict[str, Tensor], matrix: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Update at unit learning rate, and next slots, of one tensor with gradient ``g``."""

    def init(self, params: Weights) -> State:
        return {name: self._fresh(p) for name, p in params.items()}

    def _fresh(self, p: Tensor) -> Slots:
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        step = torch.zeros((), dtype=dtype, device=p.device)
        return {"step": step, **{slot: torch.zeros_like(p, dtype=dtype) for slot in self.slots}}

    def forward(
        self,
        params: Weights,
        grads: Weights,
        state: State,
        symmetry: Symmetry,
        *,
        total_steps: float | Tensor | None = None,
        weight_decay: float | Mapping[str, float] = 0.0,
    ) -> tuple[Weights, State]:
        updates, state = {}, dict(state)
        for name, g in grads.items():
            slots = {**state[name], "step": state[name]["step"] + 1}
            matrix = g.ndim == 2 and "lookup" not in symmetry.specs[name].roles
            update, state[name] = self.update(g.to(slots["step"].dtype), slots, matrix)
            decay = weight_decay[name] if isinstance(weight_decay, Mapping) else weight_decay
            updates[name] = update - decay * params[name] if decay else update
        return updates, state


class SGD(Classic):
    """``m <- momentum m + g``, update ``-m``: ``torch.optim.SGD`` (Polyak 1964)."""

    slots = ("momentum_buffer",)

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum

    def update(self, g: Tensor, s: dict[str, Tensor], matrix: bool) -> tuple[Tensor, dict[str, Tensor]]:
        m = self.momentum * s["momentum_buffer"] + g
        return -m, {**s, "momentum_buffer": m}


class Adam(Classic):
    """``-m_hat / (sqrt(v_hat) + eps)``: ``torch.optim.Adam`` (Kingma & Ba 2015)."""

    slots = ("exp_avg", "exp_avg_sq")

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__()
        self.betas, self.eps = betas, eps

    def update(self, g: Tensor, s: dict[str, Tensor], matrix: bool) -> tuple[Tensor, dict[str, Tensor]]:
        return adam(g, s, self.betas, self.eps)


class Muon(Classic):
    """Polar factor of Nesterov momentum on matrices, AdamW on all else (Jordan et al. 2024).

    On matrices it is ``torch.optim.Muon``.

    A matrix is a parameter with two dimensions that is no lookup table (the symmetry's roles tell).

    Args:
        momentum: of the matrices.
        nesterov: take the polar factor of the look-ahead momentum.
        ns_steps: Newton-Schulz iterations.
        adjust: "match_rms_adamw", update ``0.2 sqrt(max(R, C)) polar``, so that one learning rate
            serves the matrices and AdamW; or "original", ``sqrt(max(1, R / C)) polar``.
        dtype: of the Newton-Schulz iteration.
        betas, eps: of AdamW.
    """

    slots = Adam.slots  # the matrices' momentum is exp_avg; their exp_avg_sq stays zero

    def __init__(
        self,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust: str = "match_rms_adamw",
        dtype: torch.dtype = torch.bfloat16,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if adjust not in ("match_rms_adamw", "original"):
            raise ValueError(f"adjust={adjust!r} is unknown; it is 'match_rms_adamw' or 'original'")
        super().__init__()
        self.momentum, self.nesterov, self.ns_steps = momentum, nesterov, ns_steps
        self.adjust, self.dtype = adjust, dtype
        self.betas, self.eps = betas, eps

    def update(self, g: Tensor, s: dict[str, Tensor], matrix: bool) -> tuple[Tensor, dict[str, Tensor]]:
        if not matrix:
            return adam(g, s, self.betas, self.eps)
        m = s["exp_avg"].lerp(g, 1 - self.momentum)
        x = g.lerp(m, self.momentum) if self.nesterov else m
        polar = newton_schulz(x, self.ns_steps, self.dtype)
        rows, cols = g.shape
        scale = max(1.0, rows / max(cols, 1)) ** 0.5 if self.adjust == "original" else 0.2 * max(rows, cols) ** 0.5
        return -scale * polar.to(g.dtype), {**s, "exp_avg": m}


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

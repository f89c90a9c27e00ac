"""Losses of predictors by name, what their targets must be, and the measures of how good predictions are."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

LossName = Literal["bce", "mse", "cross_entropy"]
LossFunction = Callable[[Tensor, Tensor], Tensor]
OVERFLOW = (
    "Their weights are probably far larger than those that were fitted to (polynomials of weights overflow): scale "
    "them alike, or leave these networks out."
)
ROWS = 256  # of the pairs that are compared at a time


def kendall_tau(predictions: Tensor, targets: Tensor) -> float:
    """Kendall's tau-b of two vectors: 0 where one of them is constant, nan where a value is not finite.

    Of all pairs, some rows at a time: seconds for 10,000 networks, and scipy need not be installed.
    """
    if not bool(predictions.isfinite().all() & targets.isfinite().all()):
        return math.nan
    x, y = (v.detach().cpu().double() for v in (predictions, targets))
    agreeing = apart_x = apart_y = 0.0
    for rows in torch.arange(len(x)).split(ROWS):
        a, b = (torch.sign(v[rows, None] - v) for v in (x, y))
        agreeing += float((a * b).sum())
        apart_x, apart_y = apart_x + float(a.abs().sum()), apart_y + float(b.abs().sum())
    if not apart_x or not apart_y:
        return 0.0
    return min(1.0, max(-1.0, agreeing / math.sqrt(apart_x) / math.sqrt(apart_y)))


def r2(predictions: Tensor, targets: Tensor) -> float:
    """Coefficient of determination; 0 for constant targets."""
    p, t = predictions.double(), targets.double()
    spread = (t - t.mean(0)).square().sum()
    return float(1 - (p - t).square().sum() / spread) if spread > 0 else 0.0


def check_finite(targets: Tensor) -> Tensor:
    """The targets, one row per network.

    Raises:
        ValueError: some are infinite or not a number.
    """
    if targets.is_floating_point() and not bool(targets.isfinite().all()):
        bad = (~targets.reshape(len(targets), -1).isfinite().all(1)).nonzero().flatten().tolist()
        raise ValueError(f"targets are not finite for {len(bad)} networks, the first is {bad[0]}. Leave them out.")
    return targets


def warned(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results, one row per network; a warning names those of networks that are not finite."""
    finite = [x.reshape(len(x), -1).isfinite().all(1) for x in results.values() if len(x)]
    bad = (~torch.stack(finite).all(0)).nonzero().flatten().tolist() if finite else []
    if bad:
        warnings.warn(
            f"what comes out is not finite for {len(bad)} of {len(finite[0])} networks, the first is network {bad[0]}. "
            f"{OVERFLOW}",
            stacklevel=3,
        )
    return results


@dataclass(frozen=True)
class Loss:
    """A loss on outputs ``[batch, outputs]`` (before any sigmoid), and what goes with it.

    Attributes:
        name: ``bce``, ``mse``, ``cross_entropy``, or ``custom``.
        function: ``(outputs, targets) -> scalar``, a mean over the batch.
        keep: the measure by which the best weights are chosen.
        higher: whether more of it is better.
    """

    name: str
    function: LossFunction
    keep: str
    higher: bool

    @classmethod
    def of(cls, loss: LossName | LossFunction) -> "Loss":
        """The loss of that name, or a user's own."""
        if not isinstance(loss, str):
            return cls("custom", loss, "loss", False)
        functions: dict[str, tuple[LossFunction, str]] = {
            "bce": (functional.binary_cross_entropy_with_logits, "tau"),
            "mse": (functional.mse_loss, "tau"),
            "cross_entropy": (functional.cross_entropy, "accuracy"),
        }
        if loss not in functions:
            raise ValueError(f"unknown loss {loss!r}; there are {', '.join(functions)}, or pass a function")
        function, keep = functions[loss]
        return cls(loss, function, keep, True)

    def check(self, targets: Tensor, outputs: int) -> Tensor:
        """Targets in the type and shape that the loss needs.

        Raises:
            ValueError: they are not finite, not in [0, 1] (bce), no classes (cross_entropy), or have another size.
        """
        check_finite(targets)
        if self.name == "custom":
            return targets
        if self.name == "cross_entropy":
            if targets.is_floating_point() or targets.ndim != 1:
                raise ValueError(f"cross_entropy needs integer classes [networks], got {targets.dtype} {targets.shape}")
            if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < outputs:
                raise ValueError(f"classes go from {int(targets.min())} to {int(targets.max())}, outputs={outputs}")
            return targets.long()
        targets = targets.float() if not targets.is_floating_point() else targets
        targets = targets.unsqueeze(1) if targets.ndim == 1 else targets
        if targets.ndim != 2 or targets.shape[1] != outputs:
            raise ValueError(
                f"targets have shape {tuple(targets.shape)}, outputs={outputs}: say outputs= their columns"
            )
        if self.name == "bce" and len(targets) and not 0 <= float(targets.min()) <= float(targets.max()) <= 1:
            raise ValueError("loss='bce' needs targets in [0, 1] (accuracies); use loss='mse' for other numbers")
        return targets

    def predict(self, outputs: Tensor) -> Tensor:
        """Outputs -> predictions: probabilities in [0, 1] (bce), classes (cross_entropy), else as they are."""
        if self.name == "cross_entropy":
            return outputs.argmax(1)
        outputs = outputs.sigmoid() if self.name == "bce" else outputs
        return outputs.squeeze(1) if self.name != "custom" and outputs.shape[1] == 1 else outputs

    def measures(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """``loss``, and ``accuracy`` of classes or ``tau``, ``r2``, ``mse`` of numbers (tau is a mean over columns)."""
        with torch.no_grad():
            found = {"loss": float(self.function(outputs, targets))}
        if self.name == "cross_entropy":
            found["accuracy"] = float((outputs.argmax(1) == targets).float().mean())
        elif self.name in ("bce", "mse"):
            p = outputs.sigmoid() if self.name == "bce" else outputs
            taus = [kendall_tau(a, b) for a, b in zip(p.T, targets.T, strict=True)]
            found["tau"] = sum(taus) / len(taus)
            found |= {"r2": r2(p, targets), "mse": float((p - targets).square().mean())}
        return found

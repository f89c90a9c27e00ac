"""Random small networks of supported operators, for the property that what is inferred is true."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky": F.leaky_relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "sin": torch.sin,
    "cos": torch.cos,
    "square": torch.square,
    "abs": torch.abs,
    "softplus": F.softplus,
    "clamp": lambda h: torch.clamp(h, min=-1.0),
    "hardtanh": F.hardtanh,
    "relu_": lambda h: h.clone().relu_(),
    "relu_ half": lambda h: _half_in_place(h.clone()),
    "transpose batch": lambda h: h.transpose(0, 1).transpose(0, 1),
    "head softmax": lambda h: h.view(-1, 4, 3).softmax(1).flatten(1),
    "softmax": lambda h: h.softmax(-1),
    "layer norm": lambda h: F.layer_norm(h, (12,)),
    "head layer norm": lambda h: F.layer_norm(h.view(-1, 4, 3), (3,)).flatten(1),
    "rms norm": lambda h: F.rms_norm(h, (12,)),
    "group norm": lambda h: F.group_norm(h, 4),
    "batch norm": lambda h: F.batch_norm(h.view(-1, 4, 3), None, None, training=True).flatten(1),
    "swapped batch norm": lambda h: (
        F.batch_norm(h.view(-1, 4, 3).transpose(1, 2), None, None, training=True).transpose(1, 2).flatten(1)
    ),
    "minus mean": lambda h: h - h.mean(-1, keepdim=True),
    "minus max": lambda h: (h.view(-1, 4, 3) - h.view(-1, 4, 3).amax(1, keepdim=True)).flatten(1),
    "gate by sum": lambda h: h * h.view(-1, 4, 3).sum(-1).repeat_interleave(3, -1),
    "over std": lambda h: h / h.std(0),
    "times std": lambda h: h * h.std(-1, keepdim=True),
    "glu": lambda h: torch.cat([F.glu(h), h[:, 6:]], -1),
    "swap halves": lambda h: torch.cat([h[:, 6:], h[:, :6]], -1),
    "swap heads": lambda h: h.view(-1, 4, 3).transpose(1, 2).flatten(1),
    "select": lambda h: h * h[:, :1] if h.shape[0] else h,
    "expand": lambda h: h.view(-1, 4, 3)[:, :, :1].expand(-1, 4, 3).flatten(1),
    "repeat": lambda h: h.view(-1, 2, 6)[:, 0].repeat(1, 2),
    "thirds": lambda h: torch.cat([a * k for k, a in enumerate(h.chunk(3, -1), 1)], -1),
    "unbind": lambda h: torch.cat([f(a) for f, a in zip((torch.tanh, torch.relu), _two(h), strict=True)], -1),
    "gram": lambda h: ((q := h.view(-1, 4, 3)) @ q.mT @ q).flatten(1),
    "attention": lambda h: F.scaled_dot_product_attention(*(h.view(-1, 4, 3),) * 3).flatten(1),
    "roll": lambda h: h.roll(1, -1),
    "cumsum": lambda h: h.cumsum(-1),
    "cumsum batch": lambda h: h.cumsum(0),
    "logcumsumexp": lambda h: h.logcumsumexp(0),
}
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "gate": lambda a, b: a * torch.sigmoid(b),
    "maximum": torch.maximum,
    "where": lambda a, b: torch.where(b > 0, a, b),
    "matmul": lambda a, b: (a.view(-1, 4, 3) @ b.view(-1, 3, 4) @ a.view(-1, 4, 3)).flatten(1),
    "halves": lambda a, b: torch.cat([a[:, :6], b[:, 6:]], -1),
    "lead": lambda a, b: a * b.view(-1, 4, 3).mean(-1).repeat_interleave(3, -1),
}
LAYERS = ("linear", "shared", "norm", "conv", "gain")


def _half_in_place(h: Tensor) -> Tensor:
    h[:, :6].relu_()
    return h


def _two(h: Tensor) -> tuple[Tensor, ...]:
    return h.view(-1, 2, 6).unbind(1)


class RandomNet(nn.Module):
    """Units of width 12; every step reads one or two of the values before it.

    Args:
        steps: ``(operation, first, second)``: the values read, counted back from the last.
    """

    def __init__(self, steps: Sequence[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = tuple(steps)
        self.first, self.last, self.shared = nn.Linear(4, 12), nn.Linear(12, 3), nn.Linear(12, 12)
        made = {
            "linear": lambda: nn.Linear(12, 12),
            "norm": lambda: nn.LayerNorm(12),
            "conv": lambda: nn.Conv1d(4, 4, 3, padding=1),
            "gain": lambda: nn.BatchNorm1d(12).eval(),
        }
        self.layers = nn.ModuleDict({str(i): made[s[0]]() for i, s in enumerate(self.steps) if s[0] in made})

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 4] -> [B, 3]``."""
        values = [self.first(x)]
        for i, (name, a, b) in enumerate(self.steps):
            one, other = values[-1 - a % len(values)], values[-1 - b % len(values)]
            if name == "conv":
                y = self.layers[str(i)](one.view(-1, 4, 3)).flatten(1)
            elif name in LAYERS:
                y = self.shared(one) if name == "shared" else self.layers[str(i)](one)
            else:
                y = JOINS[name](one, other) if name in JOINS else FUNCTIONS[name](one)
            values.append(y)
        return self.last(values[-1])

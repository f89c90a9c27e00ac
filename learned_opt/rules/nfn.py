"""The learned rule: the nominal step, corrected by a neural functional network that starts at zero.

In the frame, a matrix with momentum ``n`` and nominal direction ``N`` is updated by

    n' = n + sum_k a_k x_k                              a: of the layer       (which momentum the direction is taken of)
    D  = N(n') exp(b_i + c_j) + rms(N) sum_k phi_k x_k  b, c: of the units,   phi: of entry, units and layer
    D <- exp(gain) D rms(N) / rms(D)                    gain: of the layer

with odd features ``x_k`` and coefficients that depend on even features only. Hence the update is odd, permutation
and scale equivariant whatever theta is. The last maps start at zero, where the rule is the nominal one exactly.
"""

import torch
from torch import Tensor, nn

from learned_opt import features
from learned_opt.features import N_EVEN, N_ODD, N_STATISTICS
from learned_opt.layout import Layout, Stack
from learned_opt.rules.embedding import Embedding, broadcast
from learned_opt.rules.nominal import Nominal, View, pull, steps
from learned_opt.rules.whitening import Whitening

KINDS = ("matrix", "embedding", "vector", "gain")
N_SHAPE = 3 + len(KINDS) + 2
N_TIME = 5


class NFN(Nominal):
    """Monomial-equivariant learned update rule.

    Args:
        width: channels of the embeddings and of the hidden layer of the gates.
        frame: False gives up scale: permutation (and sign) equivariance only.
        pool: False gives up the network: every parameter is updated by itself.
    """

    averages = features.AVERAGES

    def __init__(self, width: int = 8, frame: bool = True, pool: bool = True) -> None:
        super().__init__(frame)
        self.width, self.pool = width, pool
        self.embedding = Embedding(N_EVEN, N_STATISTICS + N_SHAPE, N_TIME, width, pool)
        self.entry = nn.Linear(N_EVEN, width)
        self.row = nn.Linear(width, width, bias=False)
        self.col = nn.Linear(width, width, bias=False)
        self.layer = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, N_ODD)
        self.unit_gain = nn.Linear(width, 2, bias=False)  # of the written and of the read unit
        self.layer_gain = nn.Linear(width, 1)
        self.blend = nn.Linear(width, 2)  # of g and m_slow
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Hidden maps at random from a fixed seed, last maps at zero: the nominal rule."""
        generator = generator or torch.Generator().manual_seed(0)
        last = (self.gate, self.unit_gain, self.layer_gain, self.blend)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    bound = 0.0 if module in last else module.in_features**-0.5
                    module.weight.uniform_(-bound, bound, generator=generator)
                    if module.bias is not None:
                        module.bias.zero_()

    def directions(
        self,
        layout: Layout,
        views: list[View],
        white: Whitening | None,
        clock: Tensor,
        total_steps: float | Tensor | None,
    ) -> list[Tensor]:
        adam = [v.adam for v in views]
        odd = [features.odd_features(v.g, v.nesterov, v.slow, v.w, a) for v, a in zip(views, adam, strict=True)]
        even = [features.even_features(x, a) for a, x in zip(adam, odd, strict=True)]
        layers = [
            torch.cat([_statistics(v, x), _shape_features(v.stack, v.w)], -1) for v, x in zip(views, odd, strict=True)
        ]
        units, embedded = self.embedding(layout, even, layers, time_features(clock, total_steps))
        momenta = [self._momentum(*each) for each in zip(views, odd, embedded, strict=True)]
        nominal = steps(layout, views, momenta, white, pull(clock, total_steps))
        return [self._direction(*each, units) for each in zip(views, nominal, odd, even, embedded, strict=True)]

    def _direction(self, view: View, nominal: Tensor, x: Tensor, e: Tensor, layer: Tensor, units: Tensor) -> Tensor:
        rows, cols = broadcast(units, view.stack.rows), broadcast(units, view.stack.cols)  # [U, N, L]
        gains = self.unit_gain.weight @ rows.flatten(1), self.unit_gain.weight @ cols.flatten(1)
        b, c = (torch.tanh(g[i]).reshape(r.shape[1:]) for i, (g, r) in enumerate(zip(gains, (rows, cols), strict=True)))
        phi = self._gates(e, rows, cols, layer)
        size = features.root_mean_square(nominal)
        correction = (phi * x).sum(0) * size
        d = nominal * torch.exp(b.unsqueeze(2) + c.unsqueeze(1)) + correction
        # a zero nominal direction (no signal) stays zero, so the sizes' ratio is wanted only where both are positive
        ratio = size * features.rsqrt(features.mean_square(d))
        return d * ratio * torch.exp(2 * torch.tanh(self.layer_gain(layer)))[..., None]

    def _momentum(self, view: View, x: Tensor, layer: Tensor) -> Tensor:
        """Which momentum the nominal step is taken along, at its size: ``[N, R, C]``."""
        g, slow = x[0], x[2]
        a = self.blend(layer).T[..., None, None]
        return view.nesterov + features.root_mean_square(view.nesterov) * (a[0] * g + a[1] * slow)

    def _gates(self, e: Tensor, rows: Tensor, cols: Tensor, layer: Tensor) -> Tensor:
        """``[N_ODD, N, R, C]``. Row, column and layer terms are rank-one and never stored per entry."""
        entry = (self.entry.weight @ e.flatten(1)).reshape(-1, *e.shape[1:])
        row = (self.row.weight @ rows.flatten(1)).reshape(rows.shape).unsqueeze(3)
        col = (self.col.weight @ cols.flatten(1)).reshape(cols.shape).unsqueeze(2)
        shared = (self.layer(layer) + self.entry.bias).T[..., None, None]
        hidden = entry.add_(row + shared).add_(col).relu_()
        phi = self.gate.weight @ hidden.flatten(1) + self.gate.bias[:, None]
        return phi.reshape(-1, *e.shape[1:])


def time_features(clock: Tensor, total_steps: float | Tensor | None) -> Tensor:
    """``[N_TIME]``: age, length of the horizon, a constant, fractions of the horizon done and left.

    Without a horizon the rule, which has met only runs that end, is told that it is half way.
    """
    total = 2 * clock if total_steps is None else torch.as_tensor(total_steps, dtype=clock.dtype, device=clock.device)
    done = ((clock - 1) / total).clamp(max=1.0)
    return torch.stack([torch.log10(clock) / 4, torch.log10(total) / 4, torch.ones_like(done), done, 1 - done])


def _statistics(view: View, x: Tensor) -> Tensor:
    return features.statistics(x, view.g, view.m, view.slow, view.w, view.step[:, 0, 0])


def _shape_features(stack: Stack, like: Tensor) -> Tensor:
    """``[N, N_SHAPE]``: logs of the shape, the kind, whether it reads the input or writes the output."""
    _, r, c = stack.shape
    logs = torch.log2(torch.tensor([r, c], dtype=like.dtype, device=like.device)) / 8
    kind = [float(stack.kind == k) for k in KINDS]
    row = torch.cat([logs, (logs[0] - logs[1])[None], like.new_tensor(kind)])
    return torch.cat([row.expand(stack.shape[0], -1), stack.fixed.to(like.dtype)], -1)

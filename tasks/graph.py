"""A graph network of multivectors on charged particles in space, equivariant to rotations and reflections.

A multivector of the Clifford algebra Cl(3, 0) is 8 numbers: a scalar, a vector (e1, e2, e3), a bivector
(e12, e13, e23) and a pseudoscalar (e123). The geometric product of two of them is all that couples grades, and it
commutes with every orthogonal map. After Ruhe et al. 2023, "Clifford Group Equivariant Neural Networks".
"""

import functools

import torch
from torch import Generator, Tensor, nn

from tasks.data import Batch
from tasks.task import Problem, mean_squared_error

BLADES = ((), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3))
GRADES = (0, 1, 1, 1, 2, 2, 2, 3)


def _blade_product(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    """Sign and blade of e_a e_b: sorted by exchanges of neighbours, equal neighbours being 1."""
    sign, indices = 1.0, [*a, *b]
    for end in range(len(indices) - 1, 0, -1):
        for i in range(end):
            if indices[i] > indices[i + 1]:
                indices[i], indices[i + 1] = indices[i + 1], indices[i]
                sign = -sign
    return sign, tuple(i for i in indices if indices.count(i) == 1)


def _cayley() -> Tensor:
    table = torch.zeros(8, 8, 8)
    for i, a in enumerate(BLADES):
        for j, b in enumerate(BLADES):
            sign, blade = _blade_product(a, b)
            table[i, j, BLADES.index(blade)] = sign
    return table


CAYLEY = _cayley()
"""[i, j, k] -> the coefficient of blade k in e_i e_j; [8, 8, 8]."""


def _partners() -> tuple[Tensor, Tensor, Tensor]:
    i, j, k = CAYLEY.nonzero().T
    order = (8 * k + i).argsort()
    i, j, k = i[order], j[order], k[order]
    pick = torch.zeros(8, 64)
    pick[j, torch.arange(64)] = 1.0
    grades = torch.tensor(GRADES)
    _, path = torch.stack([grades[i], grades[j], grades[k]]).unique(dim=1, return_inverse=True)
    return pick, CAYLEY[i, j, k].view(8, 8), nn.functional.one_hot(path).float()


# Tables, not caches: a cache that is filled while torch.export traces would keep tensors without values.
PICK, SIGN, PATH = _partners()
"""For every (k, i) there is one j with e_i e_j = +-e_k. Matrices that pick it [8, 64 = (k, i)], the signs [8, 8], and
which grades of factors and result these are, [64, 20], for 20 triples of grades occur."""
PATHS = PATH.shape[1]
GRADE = nn.functional.one_hot(torch.tensor(GRADES), 4).float()  # [8, 4]


def geometric_product(x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """x y of multivectors [..., 8]; weights [..., 20] multiply the terms by the grades of factors and result."""
    sign = SIGN.to(y)
    if weights is not None:
        sign = sign * (weights @ PATH.to(y).T).unflatten(-1, (8, 8))
    return ((y @ PICK.to(y)).unflatten(-1, (8, 8)) * sign * x.unsqueeze(-2)).sum(-1)


def _per_blade(x: Tensor) -> Tensor:
    """A number per grade [..., 4] as one per blade [..., 8]."""
    return x @ GRADE.to(x).T


def squared_norms(x: Tensor) -> Tensor:
    """The invariants of multivectors [..., 8]: the sum of squares of each grade, [..., 4]."""
    return x.square() @ GRADE.to(x)


class GradeLinear(nn.Module):
    """Mixes channels within each grade; scalars have a bias. [..., fan_in, 8] -> [..., fan_out, 8]"""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fan_out, fan_in, 4) / fan_in**0.5)
        self.bias = nn.Parameter(torch.zeros(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("...ib,oib->...ob", x, _per_blade(self.weight))
        return torch.cat([y[..., :1] + self.bias.unsqueeze(-1), y[..., 1:]], -1)


class GradeGate(nn.Module):
    """Every grade times the sigmoid of an affine function of its own invariant: the square, or the scalar itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(channels, 4))
        self.shift = nn.Parameter(torch.zeros(channels, 4))

    def forward(self, x: Tensor) -> Tensor:
        invariants = torch.cat([x[..., :1], squared_norms(x)[..., 1:]], -1)
        return x * _per_blade(torch.sigmoid(self.slope * invariants + self.shift))


class ProductLayer(nn.Module):
    """left(x) + x * right(x) by the weighted geometric product, over the root mean square norm of the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.left, self.right = GradeLinear(channels, channels), GradeLinear(channels, channels)
        self.weight = nn.Parameter(torch.randn(channels, PATHS) / PATHS**0.5)
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(x) + geometric_product(x, self.right(x), self.weight)
        size = y.square().sum(-1, keepdim=True).mean(-2, keepdim=True)
        return self.gain.unsqueeze(-1) * y * torch.rsqrt(size + 1e-3)


def clifford_mlp(fan_in: int, width: int, fan_out: int) -> nn.Sequential:
    """Linear, gate, product, linear."""
    return nn.Sequential(GradeLinear(fan_in, width), GradeGate(width), ProductLayer(width), GradeLinear(width, fan_out))


class CliffordGraph(nn.Module):
    """Message passing on the complete graph: states [B, n, 7] (charge, position, velocity) -> positions [B, n, 3].

    Nodes begin as three multivectors: charge (scalar), position from the centre and velocity (vectors). Messages are
    `clifford_mlp`s of one end and of the difference of both; the vector part of a + a b, for two linear maps a and b of
    the last state, is added to the positions. Rotating, reflecting or moving the input does the same to the output.
    """

    def __init__(self, width: int, rounds: int) -> None:
        super().__init__()
        self.embed = GradeLinear(3, width)
        self.messages = nn.ModuleList(clifford_mlp(2 * width, width, width) for _ in range(rounds))
        self.updates = nn.ModuleList(clifford_mlp(2 * width, width, width) for _ in range(rounds))
        self.head = GradeLinear(width, 2)
        with torch.no_grad():
            self.head.weight.mul_(0.1)  # begins near "nothing moves"

    def forward(self, x: Tensor) -> Tensor:
        position = x[..., 1:4]
        h = self.embed(multivectors(x))  # [B, n, width, 8]
        n = h.shape[-3]
        for message, update in zip(self.messages, self.updates, strict=True):
            ends = torch.cat(
                [h.unsqueeze(-3) - h.unsqueeze(-4), h.unsqueeze(-4).expand(*h.shape[:-3], n, n, -1, 8)], -2
            )
            h = h + update(torch.cat([h, message(ends).mean(-3)], -2))
        a, b = self.head(h).unbind(-2)
        return position + (a + geometric_product(a, b))[..., 1:4]


def multivectors(x: Tensor) -> Tensor:
    """States [..., n, 7] as the multivectors [..., n, 3, 8] charge, position from the centre, velocity."""
    charge, position, velocity = x[..., :1], x[..., 1:4], x[..., 4:]
    position = position - position.mean(-2, keepdim=True)
    pad = nn.functional.pad
    return torch.stack([pad(charge, (0, 7)), pad(position, (1, 4)), pad(velocity, (1, 4))], -2)


# --------------------------------------------------------------------------------------- the bodies


def simulate(state: Tensor, time: float, steps: int) -> Tensor:
    """States [B, n, 7] after `time`, by leapfrog: charges repel and attract by a softened Coulomb force."""
    charge, position, velocity = state[..., :1], state[..., 1:4], state[..., 4:]
    couple, dt = charge @ charge.transpose(-2, -1), time / steps

    def force(position: Tensor) -> Tensor:
        gap = position.unsqueeze(-2) - position.unsqueeze(-3)
        strength = couple / (gap.square().sum(-1) + 0.1).pow(1.5)
        return (strength.unsqueeze(-1) * gap).sum(-2)

    velocity = velocity + dt / 2 * force(position)
    for step in range(steps):
        position = position + dt * velocity
        velocity = velocity + (dt if step < steps - 1 else dt / 2) * force(position)
    return torch.cat([charge, position, velocity], -1)


def bodies(generator: Generator, count: int, n: int = 5) -> Tensor:
    """Start states [count, n, 7]: charges +1 or -1, normal positions, velocities of half that size."""
    charge = torch.randint(2, (count, n, 1), generator=generator).float() * 2 - 1
    return torch.cat([charge, torch.randn(count, n, 6, generator=generator) * torch.tensor([1.0] * 3 + [0.5] * 3)], -1)


@functools.cache
def _trajectories(count: int, n: int, time: float) -> tuple[Tensor, Tensor]:
    start = bodies(Generator().manual_seed(0), count, n)
    return start, simulate(start, time, 100)[..., 1:4]


def n_body(
    name: str, *, width: int, rounds: int, batch_size: int, steps: int, n: int = 5, time: float = 1.0, count: int = 3000
) -> Problem:
    """Where n charged particles are after `time`, by a `CliffordGraph`: 3,000 trajectories, 600 others held out."""
    x, y = _trajectories(count + count // 5, n, time)

    def sample(generator: Generator, size: int) -> Batch:
        i = torch.randint(count, (size,), generator=generator)
        return x[i], y[i]

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return mean_squared_error(model(x), y)

    moved = y - x[..., 1:4]
    return Problem(
        name,
        lambda: CliffordGraph(width, rounds),
        sample,
        loss,
        batch_size=batch_size,
        steps=steps,
        held_out=lambda: (x[count:], y[count:]),
        ceiling=float(moved.square().mean()),
    )

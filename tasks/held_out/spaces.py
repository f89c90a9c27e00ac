"""Points and rays in space: a set network that tells surfaces apart, and a radiance field."""

import math

import torch
from torch import Generator, Tensor, nn

from tasks.data import Batch
from tasks.held_out.layers import dense
from tasks.task import Problem, cross_entropy, mean_squared_error

SURFACES = 8


def turns(generator: Generator, count: int) -> Tensor:
    """Uniform rotations around the third axis [count, 3, 3]."""
    angle = 2 * math.pi * torch.rand(count, generator=generator)
    c, s, zero, one = torch.cos(angle), torch.sin(angle), torch.zeros(count), torch.ones(count)
    return torch.stack([c, -s, zero, s, c, zero, zero, zero, one], -1).unflatten(-1, (3, 3))


def surfaces(generator: Generator, count: int, points: int) -> Tensor:
    """`count` points of each surface, [count, SURFACES, points, 3]: sphere, cube, cylinder, cone, torus, saddle,
    helix and Moebius strip, all about of size one."""
    u, v, w = torch.rand(3, count, points, generator=generator)
    turn, line, zero = 2 * math.pi * u, 2 * v - 1, torch.zeros_like(u)
    c, s = torch.cos(turn), torch.sin(turn)
    normal = torch.randn(count, points, 3, generator=generator)
    cube = torch.stack([2 * u - 1, line, 2 * w - 1], -1)
    r = v.sqrt()
    strip = 1 + 0.4 * line * torch.cos(turn / 2)
    tube = 0.75 + 0.3 * torch.cos(2 * math.pi * v)
    kinds = [
        normal / normal.norm(dim=-1, keepdim=True),
        cube / cube.abs().amax(-1, keepdim=True) * 0.8,
        torch.stack([0.7 * c, 0.7 * s, line], -1),
        torch.stack([r * c, r * s, 1.4 * r - 0.9], -1),
        torch.stack([tube * c, tube * s, 0.3 * torch.sin(2 * math.pi * v)], -1),
        torch.stack([line, 2 * w - 1, line.square() - (2 * w - 1).square()], -1),
        torch.stack([0.7 * torch.cos(3 * turn), 0.7 * torch.sin(3 * turn), 2 * u - 1], -1) + 0.1 * normal,
        torch.stack([strip * c, strip * s, 0.4 * line * torch.sin(turn / 2)], -1) + zero.unsqueeze(-1),
    ]
    return torch.stack(kinds, 1)


def clouds(generator: Generator, count: int, points: int = 64) -> Batch:
    """Noisy points of a surface, stretched by up to a quarter along each axis and turned upright, [count, points, 3],
    and its kind. A sixteenth of the points is anywhere.
    """
    y = torch.randint(SURFACES, (count,), generator=generator)
    x = surfaces(generator, count, points)[torch.arange(count), y]
    x = x * (0.75 + 0.5 * torch.rand(count, 1, 3, generator=generator)) @ turns(generator, count)
    x = x + 0.05 * torch.randn(x.shape, generator=generator)
    stray = torch.rand(count, points, 1, generator=generator) < 1 / 16
    return torch.where(stray, 2 * torch.rand(x.shape, generator=generator) - 1, x), y


class PointNet(nn.Module):
    """Sets of points [B, n, 3] -> classes: one network for every point, the largest of each feature, another network.

    After Qi et al. 2017, "PointNet", without its spatial transformers.
    """

    def __init__(self, each: list[int], after: list[int]) -> None:
        super().__init__()
        self.each, self.after = dense([3, *each], nn.ReLU), dense([each[-1], *after], nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.each(x).amax(-2))


def pointnet_surfaces() -> Problem:
    """Which surface a cloud of points is of."""
    return Problem(
        "stream-pointnet-surfaces",
        lambda: PointNet([44, 84, 156], [102, SURFACES]),
        clouds,
        lambda model, x, y: cross_entropy(model(x), y),
        batch_size=32,
        steps=1000,
        ceiling=math.log(SURFACES),
    )


# -------------------------------------------------------------------------------------------- rays

NEAR, FAR, FINE, COARSE = 1.5, 4.5, 96, 24
BLOBS = 10


def _scene() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centres [BLOBS, 3], sizes [BLOBS], densities [BLOBS] and colours [BLOBS, 3] of Gaussian blobs."""
    g = Generator().manual_seed(0)
    centre = 1.4 * torch.rand(BLOBS, 3, generator=g) - 0.7
    size, density = 0.12 + 0.2 * torch.rand(BLOBS, generator=g), 4 + 12 * torch.rand(BLOBS, generator=g)
    return centre, size, density, torch.rand(BLOBS, 3, generator=g)


CENTRE, SIZE, DENSITY, COLOUR = _scene()


def scene(points: Tensor) -> tuple[Tensor, Tensor]:
    """Density [..., 1] and colour [..., 3] of the scene at points [..., 3]; stripes are painted over all blobs."""
    gap = (points.unsqueeze(-2) - CENTRE).square().sum(-1)
    each = DENSITY * torch.exp(-gap / (2 * SIZE.square()))
    total = each.sum(-1, keepdim=True)
    stripes = 0.75 + 0.25 * torch.sin(14 * points.sum(-1, keepdim=True))
    return total, stripes * (each @ COLOUR) / (total + 1e-6)


def composite(density: Tensor, colour: Tensor, step: float) -> Tensor:
    """Colours [..., 3] of rays, from density [..., n, 1] and colour [..., n, 3] along them (Mildenhall et al. 2020,
    "NeRF", equation 3)."""
    depth = step * density
    before = torch.cumsum(depth, -2) - depth
    return (torch.exp(-before) * (1 - torch.exp(-depth)) * colour).sum(-2)


def along(origin: Tensor, direction: Tensor, at: Tensor) -> Tensor:
    """Points [..., n, 3] of rays [..., 3] at distances [..., n]."""
    return origin.unsqueeze(-2) + at.unsqueeze(-1) * direction.unsqueeze(-2)


def rays(generator: Generator, count: int) -> Batch:
    """Origin, direction and distances of the samples [count, 6 + COARSE] of rays through the scene; their colours."""
    origin = torch.randn(count, 3, generator=generator)
    origin = 3 * origin / origin.norm(dim=-1, keepdim=True)
    target = 1.2 * torch.rand(count, 3, generator=generator) - 0.6
    direction = (target - origin) / (target - origin).norm(dim=-1, keepdim=True)
    fine, coarse = (FAR - NEAR) / FINE, (FAR - NEAR) / COARSE
    exact = NEAR + fine * (torch.arange(FINE) + 0.5).expand(count, FINE)
    at = NEAR + coarse * (torch.arange(COARSE) + torch.rand(count, COARSE, generator=generator))
    y = composite(*scene(along(origin, direction, exact)), fine)
    return torch.cat([origin, direction, at], -1), y


class RadianceField(nn.Module):
    """Rays [B, 6 + COARSE] -> colours [B, 3]: a network of the place gives density and, with the direction, colour.

    A place is seen through sines and cosines of `octaves` frequencies; the place joins again half way.
    """

    def __init__(self, width: int, octaves: int) -> None:
        super().__init__()
        self.octaves, seen = octaves, 3 + 6 * octaves
        self.first = nn.Sequential(dense([seen, width, width], nn.ReLU), nn.ReLU())
        self.second = nn.Sequential(dense([width + seen, width, width], nn.ReLU), nn.ReLU())
        self.density, self.colour = nn.Linear(width, 1), dense([width + 3, width // 2, 3], nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        origin, direction, at = x.split([3, 3, COARSE], -1)
        place = along(origin, direction, at)
        waves = torch.cat([math.pi * 2.0**k * place for k in range(self.octaves)], -1)
        seen = torch.cat([place, torch.sin(waves), torch.cos(waves)], -1)
        h = self.second(torch.cat([self.first(seen), seen], -1))
        colour = self.colour(torch.cat([h, direction.unsqueeze(-2).expand(*h.shape[:-1], 3)], -1))
        density = nn.functional.softplus(self.density(h))
        return composite(density, torch.sigmoid(colour), (FAR - NEAR) / COARSE)


def nerf_blobs() -> Problem:
    """A radiance field fitted to rays of a scene that is known; no ray is seen twice."""
    return Problem(
        "stream-nerf-blobs",
        lambda: RadianceField(76, 4),
        rays,
        lambda model, x, y: mean_squared_error(model(x), y),
        batch_size=96,
        steps=1200,
        eval_size=512,
    )

"""What several of these networks are made of. Nothing is shared with the networks of other suites."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn


def dense(sizes: Sequence[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Linear layers of the given sizes, input to output, with an activation between each two."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def shrunk(layers: nn.Sequential, factor: float) -> nn.Sequential:
    """The same layers, the weights of the last times `factor`, so that what they give begins small."""
    for p in layers[-1].parameters():
        p.data.mul_(factor)
    return layers


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., T, heads * size] -> [..., heads, T, size]"""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def join_heads(x: Tensor) -> Tensor:
    """[..., heads, T, size] -> [..., T, heads * size]"""
    return x.transpose(-3, -2).flatten(-2)

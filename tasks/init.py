"""Initial weights: PyTorch's defaults, drawn from a generator that is passed in."""

import functools
import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn

Draw = Callable[[Generator], Tensor]


class Sin(nn.Module):
    """sin(x), elementwise. The matrix before it is initialised for it, see `initializers`."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def initializers(model: nn.Module, scale: float = 1.0, embed_std: float = 0.02) -> dict[str, Draw]:
    """For every parameter of `model`, in its order, a function that draws its initial value.

    Linear and Conv2d: PyTorch's default, uniform of +-1 / sqrt(fan_in), the matrices times `scale`;
    before a sine the matrix is uniform of +-sqrt(6 / fan_in), which keeps the variance through
    sines (Sitzmann et al. 2020, "Implicit Neural Representations with Periodic Activation
    Functions"). Normalisation: ones and zeros. Embedding: N(0, embed_std^2). Other parameters
    (positions): N(0, 0.02^2).
    """
    draws: dict[str, Draw] = {}
    for (name, module), (_, following) in pairwise([*model.named_modules(), ("", None)]):
        gain = math.sqrt(6) if isinstance(following, Sin) else 1.0
        for key, p in module.named_parameters(name, recurse=False):
            is_bias = key.endswith("bias")
            draws[key] = _draw(module, tuple(p.shape), is_bias, scale * gain, embed_std)
    return {name: draws[name] for name, _ in model.named_parameters()}


def _draw(module: nn.Module, shape: tuple[int, ...], is_bias: bool, scale: float, embed_std: float) -> Draw:
    if isinstance(module, nn.Linear | nn.Conv2d):
        fan_in = module.weight[0].numel()
        return functools.partial(_uniform, shape, (1.0 if is_bias else scale) / math.sqrt(fan_in))
    if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
        return functools.partial(_constant, shape, 0.0 if is_bias else 1.0)
    return functools.partial(_normal, shape, embed_std if isinstance(module, nn.Embedding) else 0.02)


def _uniform(shape: tuple[int, ...], bound: float, generator: Generator) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _normal(shape: tuple[int, ...], std: float, generator: Generator) -> Tensor:
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _constant(shape: tuple[int, ...], value: float, generator: Generator) -> Tensor:
    return torch.full(shape, value)

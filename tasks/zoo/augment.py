"""Networks moved by random elements of their symmetry group: other weights, the same function."""

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from tasks.zoo.zoo import Zoo, ZooError


class Group(Protocol):
    """What augmentation asks of a symmetry; learned_opt.Symmetry has it."""

    @property
    def labels(self) -> Mapping[str, Any]:
        """Permutation groups, each with `size` and `fixed`."""

    @property
    def scales(self) -> Mapping[str, Any]:
        """Scaling groups, each with `kind` ("positive", "sign", "real"), `size` and `label`."""

    def identity(self, dtype: torch.dtype = ...) -> Any:
        """A dataclass with `perms` and `scales`."""

    def table_shape(self, label: str | None, size: int) -> tuple[int, ...]:
        """Shape of one label's table."""

    def act(self, g: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """g . weights, for one network."""

    def validate(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError where it does not fit."""


@runtime_checkable
class Heads(Protocol):
    """A weight space with attention heads, whose group is more than permutations and scales: invertible matrices.

    learned_opt.nfn.TransformerSpec is one.
    """

    def pack(self, features: Mapping[str, Tensor]) -> Any:
        """{name: [networks, 1, *shape]} -> what `act` moves."""

    def unpack(self, features: Any) -> dict[str, Tensor]:
        """Inverse of `pack`."""

    def sample(self, generator: Generator, *, condition: float) -> Any:
        """One random element; its matrices' singular values are in condition ** [-1/2, 1/2]."""

    def act(self, g: Any, features: Any) -> Any:
        """g . features, alike in every network."""


def sample(
    symmetry: Group, count: int, generator: Generator, *, high: float = 1.0, dtype: torch.dtype = torch.float64
) -> Any:
    """`count` group elements as one, every table with a leading axis: uniform permutations, scales, signs.

    Args:
        symmetry: of one network.
        count: how many elements.
        generator: where they come from.
        high: positive scales are uniform in [1, high], as in the Monomial-NFN experiments, where it is 1, 10, ...,
            10^4. Signs are +1 or -1 with equal chance. A real scale is a positive one times a sign.
        dtype: of the scales.

    Raises:
        ValueError: `high` is below 1.
    """
    if high < 1:
        raise ValueError(f"scales are uniform in [1, high], and high is {high}. Pass 1 or more.")
    perms, scales = {}, {}
    for name, label in symmetry.labels.items():
        noise = torch.rand((count, *symmetry.table_shape(name, label.size)), generator=generator)
        perms[name] = torch.arange(label.size).expand(noise.shape) if label.fixed else noise.argsort(-1)
    for name, scale in symmetry.scales.items():
        shape = (count, *symmetry.table_shape(scale.label, scale.size))
        size = 1 + (high - 1) * torch.rand(shape, generator=generator, dtype=dtype)
        sign = 2 * torch.randint(0, 2, shape, generator=generator).to(dtype) - 1
        scales[name] = {"positive": size, "sign": sign, "real": size * sign}[scale.kind]
    return dataclasses.replace(symmetry.identity(), perms=perms, scales=scales)


def act(symmetry: Group, elements: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Network k of weights [networks, *shape] moved by element k of `sample`; all at once.

    Raises:
        ValueError: the weights do not fit the symmetry.
    """
    symmetry.validate({name: x[0] for name, x in weights.items()})

    def one(perms: dict[str, Tensor], scales: dict[str, Tensor], w: dict[str, Tensor]) -> dict[str, Tensor]:
        return symmetry.act(dataclasses.replace(elements, perms=perms, scales=scales), w)

    return torch.func.vmap(one)(dict(elements.perms), dict(elements.scales), dict(weights))


def move(
    space: Group | Heads, weights: Mapping[str, Tensor], generator: Generator, *, high: float
) -> dict[str, Tensor]:
    """Every network of weights [networks, *shape] moved by a random element of its own; see `augment`."""
    count = len(next(iter(weights.values())))
    if not isinstance(space, Heads):
        return act(space, sample(space, count, generator, high=high), weights)
    if high < 1:
        raise ValueError(f"a condition number is at least 1, and high is {high}. Pass 1 or more.")

    def one(i: int) -> dict[str, Tensor]:
        features = space.pack({name: x[i, None, None] for name, x in weights.items()})
        return space.unpack(space.act(space.sample(generator, condition=high), features))

    moved = [one(i) for i in range(count)]
    return {name: torch.cat([m[name].squeeze(1) for m in moved]) for name in weights}


def augment(zoo: Zoo, symmetry: Group | Heads, *, high: float = 1.0, copies: int = 1, seed: int = 0) -> Zoo:
    """Every network and `copies` moved copies of it, each in the split of its original (published: one copy).

    The column "copy" says which: 0 is the original. For a transformer's spec, which has GL(d_k) and GL(d_v) in every
    head, `high` is the largest condition number of these matrices.

    Raises:
        ZooError: there are no networks.
        ValueError: the weights do not fit the symmetry, or `high` is below 1.
    """
    if not len(zoo):
        raise ZooError("a zoo without networks cannot be augmented.")
    generator = Generator().manual_seed(seed)
    parts = [_numbered(zoo, 0)]
    for copy in range(1, copies + 1):
        moved = move(symmetry, zoo.weights, generator, high=high)
        parts.append(_numbered(replace(zoo, weights=moved), copy))
    splits = {
        name: torch.cat([index + copy * len(zoo) for copy in range(copies + 1)]) for name, index in zoo.splits.items()
    }
    about = {**zoo.about, "augmented": {"high": high, "copies": copies, "seed": seed}}
    return replace(Zoo.join(parts), splits=splits, about=about)


def _numbered(zoo: Zoo, copy: int) -> Zoo:
    return replace(zoo, columns={**zoo.columns, "copy": [copy] * len(zoo)}, splits={})

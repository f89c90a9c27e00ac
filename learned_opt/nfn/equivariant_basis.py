"""All equivariant linear maps between tensors whose axes are permuted: one weight per orbit of index tuples.

A linear map from a tensor ``X[x1, .., xm]`` to ``Y[y1, .., yn]`` is a matrix ``M[y, x]``; it commutes with the group
when ``M`` is constant on the orbits of index tuples ``(y, x)``. Orbits are told apart by which indices of one label
are equal, so a basis is given by the partitions of the dims ``(x, y)`` into classes of one label: a class in X alone
is averaged, one in X and Y is aligned, one in Y alone is broadcast (Zhou et al. 2024, Universal Neural Functionals,
section 3; Maron et al. 2019 for one label). Two things are added here:

* A *fibred* dim has one permutation per index of its bases, so two of them are equal only where their bases are:
  dims of one class must have bases of one class. To average over heads and keep the index within a head would
  compare indices that move independently.
* A *scaled* dim multiplies its entries by a factor per index; a class must carry the same exponents in X as in Y.

The weight of a term depends on the indices of fixed (positional) dims. There are quadratically many pairs of tensors,
and Bell numbers of partitions of repeated labels: for small networks, for layers with few tensors, and as the
reference for cheaper ones.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_letters
from typing import Literal

import torch
from torch import Tensor, nn

Scaling = Literal["positive", "sign", "real"]


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor.

    Attributes:
        size: its length.
        label: dims of one label are permuted alike; None is positional.
        base: dims of the same tensor that say which permutation this one has (it is a fibre over them).
        scale: ``(name, exponent)`` of the factors that multiply its entries.
        fixed: its label has the identity only (None always does); weights may depend on the index.
    """

    size: int
    label: str | None = None
    base: tuple[int, ...] = ()
    scale: tuple[tuple[str, int], ...] = ()
    fixed: bool = False

    @property
    def positional(self) -> bool:
        """Whether weights may depend on the index."""
        return self.fixed or self.label is None


Dims = tuple[Dim, ...]


@dataclass(frozen=True)
class Term:
    """One basis term: the class of every dim of the input, and of the output."""

    x: tuple[int, ...]
    y: tuple[int, ...]


def terms(x: Dims, y: Dims, kinds: Mapping[str, Scaling] | None = None) -> list[Term]:
    """The basis of equivariant linear maps from ``x`` to ``y`` (``x = ()``: equivariant constants).

    Args:
        x: dims of the input.
        y: dims of the output.
        kinds: of the scales; those not named are ignored.
    """
    dims = [*x, *(Dim(d.size, d.label, tuple(b + len(x) for b in d.base), d.scale, d.fixed) for d in y)]
    valid = [c for c in _partitions(dims) if _balanced(c, dims, len(x), kinds or {})]
    # ties of positional dims are contained in the term without them, where that is a term
    free = [i for i, d in enumerate(dims) if not d.positional]
    minimal = [c for c in valid if not any(_finer(f, c, free) for f in valid)]
    return [Term(c[: len(x)], c[len(x) :]) for c in minimal]


def _partitions(dims: Sequence[Dim]) -> Iterator[tuple[int, ...]]:
    """Classes of the dims, numbered by first occurrence: equal labels, equal bases, no more classes than indices."""
    order = sorted(range(len(dims)), key=lambda i: len(dims[i].base))  # bases before fibres

    def extend(classes: dict[int, int], keys: list[tuple[object, ...]]) -> Iterator[dict[int, int]]:
        if len(classes) == len(dims):
            yield classes
            return
        i = order[len(classes)]
        dim = dims[i]
        key = (dim.label, *(classes[b] for b in dim.base)) if dim.label is not None else (i, "positional")
        same = [c for c, k in enumerate(keys) if k == key]
        for c in same:
            yield from extend({**classes, i: c}, keys)
        if len(same) < dim.size:
            yield from extend({**classes, i: len(keys)}, [*keys, key])

    for classes in extend({}, []):
        rename: dict[int, int] = {}
        yield tuple(rename.setdefault(classes[i], len(rename)) for i in range(len(dims)))


def _balanced(classes: tuple[int, ...], dims: Sequence[Dim], split: int, kinds: Mapping[str, Scaling]) -> bool:
    """Whether every class carries the same scale in the input as in the output."""
    total: dict[tuple[int, str], int] = {}
    for i, (c, dim) in enumerate(zip(classes, dims, strict=True)):
        for name, exponent in dim.scale:
            total[c, name] = total.get((c, name), 0) + (exponent if i < split else -exponent)
    used = ((kinds[name], n) for (_, name), n in total.items() if name in kinds)
    return not any(n % 2 if kind == "sign" else n for kind, n in used)


def _finer(fine: tuple[int, ...], coarse: tuple[int, ...], free: list[int]) -> bool:
    """Whether ``fine`` splits classes of ``coarse`` and agrees with it on the permuted dims."""
    refines = len(set(zip(fine, coarse, strict=True))) == len(set(fine)) > len(set(coarse))
    return refines and len({(fine[i], coarse[i]) for i in free}) == len({coarse[i] for i in free})


class PartitionLinear(nn.Module):
    """Every equivariant linear map from some tensors to others, with channels.

    Means are taken over permuted indices and sums, weighted by position, over fixed ones.

    Args:
        ins: dims of every input, without batch and channel.
        outs: dims of every output.
        in_channels: of every input.
        out_channels: of every output.
        bias: whether to add the equivariant constants.
        kinds: kinds of the scales that must be respected; default: none.

    Shape:
        list of ``[B, in_channels, *sizes]`` -> list of ``[B, out_channels, *sizes]``.
    """

    def __init__(
        self,
        ins: Sequence[Dims],
        outs: Sequence[Dims],
        in_channels: int,
        out_channels: int,
        *,
        bias: bool = True,
        kinds: Mapping[str, Scaling] | None = None,
    ) -> None:
        super().__init__()
        self.ins, self.outs = [tuple(d) for d in ins], [tuple(d) for d in outs]
        self.in_channels, self.out_channels = in_channels, out_channels
        self.terms: list[list[tuple[int | None, Term]]] = []  # per output: (input, None for a constant)
        weights = []
        for y in self.outs:
            found: list[tuple[int | None, Term]] = [(i, t) for i, x in enumerate(self.ins) for t in terms(x, y, kinds)]
            scale = 1 / math.sqrt(len(found) * in_channels) if found else 0.0
            for i, term in found:
                assert i is not None
                shape = self._positions(term, self.ins[i], y)
                fan = math.prod(size for c, size in shape.items() if c in term.x and c not in term.y)
                weight = torch.randn(out_channels, in_channels, *shape.values())
                weights.append(nn.Parameter(weight * scale / math.sqrt(fan)))
            constants = terms((), y, kinds) if bias else []
            for term in constants:
                weights.append(nn.Parameter(torch.zeros(out_channels, *self._positions(term, (), y).values())))
            self.terms.append(found + [(None, t) for t in constants])
        self.weights = nn.ParameterList(weights)

    @staticmethod
    def _positions(term: Term, x: Dims, y: Dims) -> dict[int, int]:
        """The classes that a term's weight is indexed by, with their sizes."""
        pairs = [*zip(term.x, x, strict=True), *zip(term.y, y, strict=True)]
        return {c: dim.size for c, dim in pairs if dim.positional}

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """See the class."""
        weights = iter(self.weights)
        pooled: dict[tuple[int, tuple[int, ...], frozenset[int]], Tensor] = {}
        outputs = []
        for y, found in zip(self.outs, self.terms, strict=True):
            total = inputs[0].new_zeros(())
            for (i, term), weight in zip(found, weights, strict=False):
                positions = tuple(self._positions(term, self.ins[i] if i is not None else (), y))
                if i is None:
                    z = self._constant(term, weight, positions)
                else:
                    kept = frozenset(c for c in term.x if c in term.y or c in positions)
                    if (i, term.x, kept) not in pooled:
                        pooled[i, term.x, kept] = _pool(inputs[i], self.ins[i], term.x, kept)
                    z = self._mix(term, weight, positions, pooled[i, term.x, kept], kept)
                total = total + _broadcast(z, term, y, positions)
            sizes = [d.size for d in y]
            outputs.append(total.expand(inputs[0].shape[0], self.out_channels, *sizes))
        return outputs

    @staticmethod
    def _mix(term: Term, weight: Tensor, positions: tuple[int, ...], x: Tensor, kept: frozenset[int]) -> Tensor:
        """``sum_c,p weight[e, c, p, ..] x[b, c, p, ..]``: the classes that the output has, in its order."""
        live = _live(term, positions)
        equation = f"ZC{_letters(_ordered(term.x, kept))},EC{_letters(positions)}->ZE{_letters(live)}"
        return torch.einsum(equation, x, weight)

    @staticmethod
    def _constant(term: Term, weight: Tensor, positions: tuple[int, ...]) -> Tensor:
        return torch.einsum(f"E{_letters(positions)}->E{_letters(_live(term, positions))}", weight).unsqueeze(0)

    def extra_repr(self) -> str:
        """Channels, and the number of terms."""
        return f"{self.in_channels}, {self.out_channels}, terms={sum(len(t) for t in self.terms)}"


def _letters(classes: Sequence[int]) -> str:
    return "".join(ascii_letters[c] for c in classes)  # lower case: the capitals name batch and channels


def _ordered(classes: Sequence[int], keep: frozenset[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(c for c in classes if c in keep))


def _live(term: Term, positions: tuple[int, ...]) -> tuple[int, ...]:
    """Classes of the output along which a term varies, in order."""
    return _ordered(term.y, frozenset(term.x) | frozenset(positions))


def _pool(x: Tensor, dims: Dims, classes: tuple[int, ...], kept: frozenset[int]) -> Tensor:
    """Diagonal of the dims of one class, mean over the classes that are not kept."""
    sizes = {c: d.size for c, d in zip(classes, dims, strict=True) if c not in kept}
    x = torch.einsum(f"ZC{_letters(classes)}->ZC{_letters(_ordered(classes, kept))}", x)
    return x / math.prod(sizes.values())


def _broadcast(z: Tensor, term: Term, y: Dims, positions: tuple[int, ...]) -> Tensor:
    """Lay the dims of ``z`` where the output has their class; a class of several dims is their diagonal."""
    live = set(_live(term, positions))
    first = {c: i for i, c in reversed(list(enumerate(term.y)))}
    sizes = [d.size if c in live and first[c] == i else 1 for i, (c, d) in enumerate(zip(term.y, y, strict=True))]
    z = z.reshape(*z.shape[:2], *sizes)
    for i, c in enumerate(term.y):
        if first[c] != i:
            shape = [y[k].size if k in (first[c], i) else 1 for k in range(len(y))]
            z = z * torch.eye(y[i].size, dtype=z.dtype, device=z.device).reshape(shape)
    return z

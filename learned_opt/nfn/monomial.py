"""Monomial layers: everything linear that commutes with permutations and scalings of hidden units.

Tran et al. 2024, Monomial Matrix Group Equivariant Neural Functional Networks. A term of an output must carry the same
factors as the output: ``d_j / d_k`` for a hidden weight, which therefore hears itself alone. What else may be heard
is a table of :data:`Slot` to slots, given by :func:`alike` and :func:`opposite`.

Gradients transform inversely: a channel of gradients is scaled by ``d_k / d_j`` where one of weights is scaled by
``d_j / d_k``. Under sign flips the two are the same and gradients are more channels; under positive scales they are a
second stream (``gradients=``), which linear maps join only where a weight and a gradient of *different* parameters
happen to carry the same factors, and products join everywhere (:class:`GradientGate`).
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from learned_opt.nfn.chain import Chain, Features
from learned_opt.nfn.features import split_channels, stack
from learned_opt.nfn.row_linear import RowLinear, xavier_
from learned_opt.symmetry import SymmetryError

Slot = tuple[Literal["weight", "bias"], int]


def slots(chain: Chain) -> list[Slot]:
    """The parameters of a chain by kind and position (from 0)."""
    return [
        slot
        for i, layer in enumerate(chain.layers)
        for slot in ((("weight", i), ("bias", i)) if layer.bias is not None else (("weight", i),))
    ]


def row_count(chain: Chain, slot: Slot) -> int:
    """Rows per channel of a parameter: whatever no symmetry moves."""
    kind, i = slot
    layer, side = chain.layers[i], chain.side(i)
    if kind == "bias":
        return layer.n_out if side == "out" else 1
    return layer.filters * {"none": 1, "in": layer.n_in, "out": layer.n_out}[side]


def read_rows(chain: Chain, features: Features) -> dict[Slot, Tensor]:
    """Features as rows ``[channels * row_count, batch, *moved units]``."""
    rows: dict[Slot, Tensor] = {}
    for i, layer in enumerate(chain.layers):
        rows["weight", i] = layer.rows(features[layer.weight], chain.side(i))
        if layer.bias is not None:
            b = features[layer.bias]
            rows["bias", i] = b.permute(1, 2, 0).flatten(0, 1) if chain.side(i) == "out" else b.transpose(0, 1)
    return rows


def write_rows(chain: Chain, rows: Mapping[Slot, Tensor]) -> Features:
    """Inverse of :func:`read_rows`."""
    features: Features = {}
    for i, layer in enumerate(chain.layers):
        features[layer.weight] = layer.weight_from(rows["weight", i], chain.side(i))
        if layer.bias is not None:
            z = rows["bias", i]
            out = z.unflatten(0, (-1, layer.n_out)).permute(2, 0, 1) if chain.side(i) == "out" else z.transpose(0, 1)
            features[layer.bias] = out
    return features


def alike(chain: Chain) -> dict[Slot, list[Slot]]:
    """For every parameter those with the same factors: itself, and the first weight and bias each other."""
    have = slots(chain)
    first = [s for s in have if s[1] == 0]
    return {s: first if s in first else [s] for s in have}


def opposite(chain: Chain) -> dict[Slot, list[Slot]]:
    """For every parameter those with inverse factors: the last weight's columns and what writes the last hidden units.

    With two weights the latter is the first weight, too.
    """
    end = chain.depth - 1
    last: Slot = ("weight", end)
    writers: list[Slot] = [("bias", end - 1)] if chain.layers[end - 1].bias is not None else []
    if end == 1:
        writers.insert(0, ("weight", 0))
    return {last: writers, **{s: [last] for s in writers}} if writers else {}


Source = tuple[int, Slot]  # (stream, parameter)


class _SlotMaps(nn.Module):
    """One :class:`RowLinear` per parameter, from the parameters that a table names, in one or two streams."""

    def __init__(
        self,
        chain: Chain,
        to: Chain,
        channels: Sequence[int],
        out_channels: int,
        table: Mapping[Slot, Sequence[Source]],
    ) -> None:
        super().__init__()
        self.target, self.table = to, table
        self.maps = nn.ModuleDict()
        for slot, sources in table.items():
            in_rows = [channels[stream] * row_count(chain, s) for stream, s in sources]
            invariant = slot == ("bias", chain.depth - 1)
            linear = RowLinear(out_channels * row_count(to, slot), in_rows, constant=invariant)
            xavier_(linear)
            self.maps[f"{slot[0]}{slot[1]}"] = linear

    def forward(self, *streams: Mapping[Slot, Tensor]) -> Features:
        rows = {}
        for slot, linear in zip(self.table, self.maps.values(), strict=True):
            rows[slot] = linear(*(streams[stream][s] for stream, s in self.table[slot]))
        return write_rows(self.target, rows)


class MonomialLinear(nn.Module):
    """Linear and equivariant when hidden units are permuted and scaled by any non-zero numbers.

    The whole space of such maps for positive scales (HNPSLinear in the official code), linear in depth.

    Args:
        chain: the network whose weights are transformed.
        in_channels: channels of the features read.
        out_channels: channels of the features returned.
        gradients: number of further channels, read and returned after the others, that transform like gradients.
        to: the chain of the result where it differs in its kernels (``chain.without_kernels()``).
    """

    def __init__(
        self, chain: Chain, in_channels: int, out_channels: int, *, gradients: int = 0, to: Chain | None = None
    ) -> None:
        super().__init__()
        self.chain, self.in_channels, self.gradients = chain, in_channels, gradients
        to = to or chain
        if to.widths != chain.widths or to.names != chain.names:
            raise SymmetryError(f"the result has widths {to.widths}, the network {chain.widths}")
        width = (in_channels, gradients)
        self.weights = _SlotMaps(chain, to, width, out_channels, _streams(chain, 0, bool(gradients)))
        self.duals = _SlotMaps(chain, to, width, gradients, _streams(chain, 1, True)) if gradients else None

    def forward(self, features: Features) -> Features:
        """``in_channels + gradients`` channels -> ``out_channels + gradients`` channels."""
        self.chain.validate(features, self.in_channels + self.gradients)
        if self.duals is None:
            return self.weights(read_rows(self.chain, features))
        both = [read_rows(self.chain, x) for x in split_channels(features, self.in_channels)]
        return stack(self.weights(*both), self.duals(*both))


def _streams(chain: Chain, own: int, two: bool) -> dict[Slot, list[Source]]:
    """Sources of stream ``own`` (0 weights, 1 gradients): alike in its own, opposite in the other."""
    table = {slot: [(own, s) for s in sources] for slot, sources in alike(chain).items()}
    if two:
        for slot, sources in opposite(chain).items():
            table[slot] += [(1 - own, s) for s in sources]
        last: Slot = ("bias", chain.depth - 1)
        if last in table:  # invariant, hence both at once
            table[last].append((1 - own, last))
    return table


class MonomialSignLinear(nn.Module):
    """Linear and equivariant when hidden units are permuted and sign-flipped: the whole space of such maps.

    Beyond :class:`MonomialLinear`, the last weight and what writes the last hidden units hear each other (their
    factors ``1 / d`` and ``d`` are equal for signs). This is HNPS_SirenLinear, which is also right where the last
    weight has other kernels than the one before, and where there is one hidden layer only. Gradients are just more
    channels.

    Args:
        chain: the network whose weights are transformed.
        in_channels: channels of the features read.
        out_channels: channels of the features returned.

    Raises:
        SymmetryError: for a network whose hidden units have positive scales (ReLU).
    """

    def __init__(self, chain: Chain, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if chain.scale == "positive":
            raise SymmetryError(
                "MonomialSignLinear commutes with sign flips, not with positive scales (ReLU). Use MonomialLinear."
            )
        self.chain, self.in_channels = chain, in_channels
        cross = opposite(chain)
        table = {slot: [(0, s) for s in [*own, *cross.get(slot, [])]] for slot, own in alike(chain).items()}
        self.weights = _SlotMaps(chain, chain, (in_channels,), out_channels, table)

    def forward(self, features: Features) -> Features:
        """Features of ``in_channels`` -> features of ``out_channels``."""
        self.chain.validate(features, self.in_channels)
        return self.weights(read_rows(self.chain, features))


class GradientGate(nn.Module):
    """Joins weight-like and gradient-like channels through their products, which no scale changes.

    Per entry, ``p = (A w) * (B g)`` is invariant; the result is ``w * (1 + tanh(C p))`` and ``g * (1 + tanh(D p))``,
    so both keep their factors. All of A, B, C, D are shared by the entries of a parameter.

    Args:
        chain: the network.
        channels: weight-like channels, first.
        gradients: gradient-like channels, after them.
        products: number of products per entry.
    """

    def __init__(self, chain: Chain, channels: int, gradients: int, products: int = 8) -> None:
        super().__init__()
        self.chain, self.channels = chain, channels
        self.total = channels + gradients
        self.factors = nn.ModuleDict()
        for i in range(len(chain.names)):
            maps = [
                RowLinear(products, [channels]),
                RowLinear(products, [gradients]),
                RowLinear(self.total, [products]),
            ]
            for linear in maps:
                xavier_(linear)
            self.factors[str(i)] = nn.ModuleList(maps)

    def forward(self, features: Features) -> Features:
        """``channels + gradients`` channels in and out."""
        self.chain.validate(features, self.total)
        out: Features = {}
        for i, name in enumerate(self.chain.names):
            left, right, gate = self.factors[str(i)].children()
            x = features[name].transpose(0, 1)
            product = left(x[: self.channels]) * right(x[self.channels :])
            out[name] = (x * (1 + torch.tanh(gate(product)))).transpose(0, 1)
        return out

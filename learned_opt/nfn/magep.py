"""MAGEP layers: stable polynomials of the weights, equivariant to permutations and any non-zero scales.

Vo et al. 2024, Equivariant Polynomial Functional Networks; the terms and their coefficients follow the official code.
With s > t, per channel, b^(t) for t >= 1 only:

    [W]^(s,t)    = W^(s) W^(s-1) .. W^(t+1)
    [Wb]^(s,t)   = [W]^(s,t) b^(t)
    [bW]^(s,t)   = b^(s) Psi [W]^(L,t)               Psi: 1 x n_L
    [WW]^(s,t)   = [W]^(s,0) Psi [W]^(L,t)           Psi: n_0 x n_L

All of them move like a weight from layer t to layer s, since inner factors cancel and Psi stands on units that nothing
moves. [bW] and [WW] also exist for s = t, where their traces are invariant. Here one Psi serves all t of an s.

Everything follows from one sweep of left products, one of right products and small matrices between them; of the
square ``[WW]^(s,s)`` only the trace is computed. Networks with kernels enter and leave through
``MonomialLinear(chain, ..., to=chain.without_kernels())``.
"""

import math

import torch
from torch import Tensor, nn

from learned_opt.nfn.chain import Chain, Features
from learned_opt.nfn.features import split_channels, stack
from learned_opt.nfn.monomial import Slot, read_rows, write_rows
from learned_opt.nfn.row_linear import RowLinear, xavier_
from learned_opt.symmetry import SymmetryError


class Terms:
    """The stable terms of one batch of features; ``d`` channels first: ``[d, B, ...]``. Positions count from 1.

    Args:
        chain: a chain without kernels and with all biases.
        rows: its features as rows.
        psi: ``[L, d, n_0 + 1, n_L]``: for every s the Psi of [WW] and, last, of [bW].
    """

    def __init__(self, chain: Chain, rows: dict[Slot, Tensor], psi: Tensor) -> None:
        self.n_in, self.depth, self.psi = chain.n_in, chain.depth, psi
        end = chain.depth
        first = rows["weight", 0].unflatten(0, (-1, chain.n_in)).permute(0, 2, 3, 1)
        last = rows["weight", end - 1].unflatten(0, (-1, chain.n_out)).transpose(1, 2)
        inner = {s: rows["weight", s - 1] for s in range(2, end)}
        self.weight = {1: first, **inner, end: last}
        self.bias = {s: rows["bias", s - 1] for s in range(1, end)}
        self.bias[end] = rows["bias", end - 1].unflatten(0, (-1, chain.n_out)).transpose(1, 2)
        # left[s] = [ [W]^(s,0) | sum_t [Wb]^(s,t) ], by W^(s+1) ([..] + [0 | b^(s)])
        self.left = {1: first}
        self.shifted: dict[int, Tensor] = {1: torch.zeros_like(self.bias[1])}
        for s in range(2, end + 1):
            column = (self.shifted[s - 1] + self.bias[s - 1]).unsqueeze(-1)
            product = self.weight[s] @ torch.cat([self.left[s - 1], column], -1)
            self.left[s], self.shifted[s] = product[..., :-1], product[..., -1]
        # right[t] = [W]^(L,t)
        self.right = {end - 1: last}
        for t in range(end - 1, 1, -1):
            self.right[t - 1] = self.right[t] @ self.weight[t]
        self.right[0] = self.left[end]
        # Psi [W]^(L,t) for all s and t at once: networks and n_t are columns of one product per channel
        middle = psi.transpose(0, 1).flatten(1, 2) @ torch.cat([x.mT.flatten(1, 2) for x in self.right.values()], 1).mT
        sizes = [x.shape[1] * x.shape[3] for x in self.right.values()]
        parts = zip(self.right, middle.split(sizes, 2), strict=True)
        self.middle = {t: part.unflatten(2, (first.shape[1], -1)).unflatten(1, (chain.depth, -1)) for t, part in parts}

    def _between(self, s: int, t: int) -> tuple[Tensor, Tensor]:
        """``Psi [W]^(L,t)``: ``[d, B, n_0, n_t]`` for [WW] and ``[d, B, 1, n_t]`` for [bW]."""
        middle = self.middle[t][:, s - 1].transpose(1, 2)
        return middle[..., : self.n_in, :], middle[..., self.n_in :, :]

    def pair(self, s: int, t: int) -> tuple[Tensor, Tensor]:
        """``[WW]^(s,t)`` and ``[bW]^(s,t)``: ``[d, B, n_s, n_t]``."""
        ww, bw = self._between(s, t)
        product = self.left[s] * ww if self.n_in == 1 else self.left[s] @ ww
        return product, self.bias[s].unsqueeze(-1) * bw

    def traces(self, s: int) -> tuple[Tensor, Tensor]:
        """Traces of ``[WW]^(s,s)`` and ``[bW]^(s,s)``: ``[d, B]``."""
        ww, bw = self._between(s, s)
        return (self.left[s] * ww.mT).sum((-1, -2)), (self.bias[s] * bw.squeeze(-2)).sum(-1)

    def by_input(self, s: int) -> list[Tensor]:
        """``[W]``, ``[WW]`` and ``[bW]`` from the inputs, inputs in the rows: ``[d * n_0, B, n_s]`` each."""
        return [x.permute(0, 3, 1, 2).flatten(0, 1) for x in (self.left[s], *self.pair(s, 0))]

    def invariants(self) -> list[Tensor]:
        """Everything that no hidden unit moves, ``[rows, B]`` each, in the order of :func:`_invariant_rows`."""
        end = self.depth
        traces = [self.traces(s) for s in range(1, end)]
        outer = [x.permute(0, 2, 3, 1).flatten(0, 2) for x in (self.left[end], *self.pair(end, 0))]
        inner = [torch.stack(x, 1).flatten(0, 1) for x in zip(*traces, strict=True)]
        vectors = [x.transpose(1, 2).flatten(0, 1) for x in (self.shifted[end], self.bias[end])]
        return outer + inner + vectors


def _invariant_rows(chain: Chain, channels: int) -> list[int]:
    """Rows of the terms of :meth:`Terms.invariants`."""
    outer, inner = channels * chain.n_in * chain.n_out, channels * (chain.depth - 1)
    return [outer] * 3 + [inner] * 2 + [channels * chain.n_out] * 2


def _psi(chain: Chain, channels: int) -> Tensor:
    """N(0, 1) over the number of products that a Psi sums: degrees are high, so terms must stay small."""
    psi = torch.randn(chain.depth, channels, chain.n_in + 1, chain.n_out) / (channels * chain.n_out)
    psi[:, :, :-1] /= chain.n_in
    return psi


def _need_plain(chain: Chain) -> None:
    if any(layer.kernel for layer in chain.layers):
        raise SymmetryError(
            "MAGEP layers work on matrices without kernels: begin with MonomialLinear(chain, ..., "
            "to=chain.without_kernels()) and give them chain.without_kernels()"
        )
    missing = [layer.weight for layer in chain.layers if layer.bias is None]
    if missing:
        raise SymmetryError(f"MAGEP layers need every bias, but {', '.join(missing)} has none")


class _Stream(nn.Module):
    """The equivariant layer for one kind of channels, with lifted terms of the other kind where given."""

    psi: Tensor

    def __init__(self, chain: Chain, channels: int, out_channels: int, lift: bool = False) -> None:
        super().__init__()
        self.chain = chain
        d, e, n_in, n_out, end = channels, out_channels, chain.n_in, chain.n_out, chain.depth
        extra = [d] if lift else []
        self.register_buffer("psi", _psi(chain, d))
        self.maps = nn.ModuleDict()
        by_input = [d * n_in] * 3
        for s in range(1, end + 1):
            if s == 1:
                weight = RowLinear(e * n_in, [*by_input, d, *(x * n_in for x in extra)])
                bias = RowLinear(e, [*by_input, d, *extra])
            elif s < end:
                weight, bias = RowLinear(e, [d] * 3 + extra), RowLinear(e, [*by_input, d, d, *extra])
            else:
                weight = RowLinear(e * n_out, [d * n_out] * 3 + [x * n_out for x in extra])
                bias = RowLinear(e * n_out, _invariant_rows(chain, d) + [x * n_out for x in extra], constant=True)
            for linear in (weight, bias):
                xavier_(linear)
            self.maps[f"weight{s}"], self.maps[f"bias{s}"] = weight, bias

    def forward(self, rows: dict[Slot, Tensor], lifted: dict[Slot, Tensor] | None = None) -> Features:
        chain, end = self.chain, self.chain.depth
        terms = Terms(chain, rows, self.psi)
        out: dict[Slot, Tensor] = {}
        for s in range(1, end + 1):
            w: Slot = ("weight", s - 1)
            b: Slot = ("bias", s - 1)
            if s == 1:
                weight = bias = [*terms.by_input(1), rows[b]]
            elif s < end:
                weight = [rows[w], *terms.pair(s, s - 1)]
                bias = [*terms.by_input(s), terms.shifted[s], rows[b]]
            else:
                pair = [x.transpose(1, 2).flatten(0, 1) for x in terms.pair(s, s - 1)]
                weight, bias = [rows[w], *pair], terms.invariants()
            for slot, sources in ((w, weight), (b, bias)):
                if lifted is not None:
                    sources = [*sources, lifted[slot]]
                out[slot] = self.maps[f"{slot[0]}{s}"](*sources)
        return write_rows(chain, out)


class MAGEPLinear(nn.Module):
    """Equivariant polynomial layer; terms are per channel, their coefficients mix channels.

    The matrices Psi are fixed and random (buffers). The maps are those of the module's docstring, with one coefficient
    for all [Wb] of a bias.

    Args:
        chain: a chain without kernels.
        in_channels: channels of the features read.
        out_channels: channels of the features returned.
        gradients: number of further channels, read and returned, that transform like gradients. They have a layer of
            their own (it commutes with inverse scales too); the streams meet in the lifts ``W G^T W``, ``W G^T b`` for
            weights and ``G W^T G``, ``G W^T b_G`` for gradients, which carry the right factors.

    Raises:
        SymmetryError: kernels, or a missing bias.
    """

    def __init__(self, chain: Chain, in_channels: int, out_channels: int, *, gradients: int = 0) -> None:
        super().__init__()
        _need_plain(chain)
        self.chain, self.in_channels, self.gradients = chain, in_channels, gradients
        self.weights = _Stream(chain, in_channels, out_channels, lift=bool(gradients))
        self.duals = _Stream(chain, gradients, gradients, lift=True) if gradients else None
        # channels of the other kind, as many as the products need
        self.partners = nn.ModuleList()
        if gradients:
            for n, m in ((in_channels, gradients), (gradients, in_channels)):
                partner = RowLinear(n, [m])
                xavier_(partner)
                self.partners.append(partner)

    def forward(self, features: Features) -> Features:
        """``in_channels + gradients`` channels -> ``out_channels + gradients`` channels."""
        self.chain.validate(features, self.in_channels + self.gradients)
        if self.duals is None:
            return self.weights(read_rows(self.chain, features))
        x, g = split_channels(features, self.in_channels)
        to_x, to_g = self.partners
        return stack(
            self.weights(read_rows(self.chain, x), self._lift(x, g, to_x)),
            self.duals(read_rows(self.chain, g), self._lift(g, x, to_g)),
        )

    def _lift(self, own: Features, other: Features, partner: nn.Module) -> dict[Slot, Tensor]:
        """``W V^T W`` and ``W V^T b`` with V the other kind's weights; divided by the units that are summed."""
        lifted: Features = {}
        for layer in self.chain.layers:
            w = own[layer.weight]
            v = partner(other[layer.weight].transpose(0, 1)).transpose(0, 1)
            assert layer.bias is not None
            gram = w @ v.mT / math.sqrt(w.shape[-1] * w.shape[-2])
            lifted[layer.weight] = gram @ w
            lifted[layer.bias] = (gram @ own[layer.bias].unsqueeze(-1)).squeeze(-1)
        return read_rows(self.chain, lifted)


class MAGEPInvariant(nn.Module):
    """Invariant polynomial layer: every invariant stable term, linearly; its Psi are learned.

    Args:
        chain: a chain without kernels.
        in_channels: channels of the features read.
        out_channels: numbers returned.

    Raises:
        SymmetryError: kernels, or a missing bias.
    """

    def __init__(self, chain: Chain, in_channels: int, out_channels: int) -> None:
        super().__init__()
        _need_plain(chain)
        self.chain, self.in_channels, self.outputs = chain, in_channels, 1
        self.psi = nn.Parameter(_psi(chain, in_channels))
        self.mix = RowLinear(out_channels, _invariant_rows(chain, in_channels), constant=True)
        xavier_(self.mix)
        assert self.mix.constant is not None
        nn.init.uniform_(self.mix.constant)

    def forward(self, features: Features) -> Tensor:
        """Features of ``in_channels`` -> ``[batch, out_channels]``."""
        self.chain.validate(features, self.in_channels)
        terms = Terms(self.chain, read_rows(self.chain, features), self.psi)
        return self.mix(*terms.invariants()).T

"""NP and HNP layers: everything linear that commutes with permutations of units.

Zhou et al. 2023, Permutation Equivariant Neural Functionals. NP permutes inputs and outputs too, HNP hidden units
only. Both pool (means over units), mix and broadcast. Sums in the paper are means here, as in its code, so that
widths do not set magnitudes.
"""

import torch
from torch import Tensor, nn

from learned_opt.nfn.chain import Chain, Features
from learned_opt.nfn.row_linear import RowLinear, uniform_


def _over_rows(weight: Tensor) -> Tensor:
    """Mean over the units written: ``[C, B, n_out, n_in] -> [C, B, n_in]``."""
    return weight.sum(-2) / weight.shape[-2]  # backward of mean() divides a tensor of the size of the weight


def _over_cols(weight: Tensor) -> Tensor:
    """Mean over the units read: ``[C, B, n_out, n_in] -> [C, B, n_out]``."""
    return weight.sum(-1) / weight.shape[-1]


class _Layer(nn.Module):
    """A weight that both sides permute, and its bias, from entry, written-unit, read-unit and network features."""

    def __init__(self, out_rows: int, bias_rows: int, own: int, written: int, read: int, network: int) -> None:
        super().__init__()
        self.own = RowLinear(out_rows, [own], constant=True)
        self.network = RowLinear(out_rows, [network], constant=True)
        self.read = RowLinear(out_rows, [read], constant=True)
        self.written = RowLinear(out_rows, [written], constant=True)
        uniform_(self.own, self.network, self.read, self.written)
        self.bias = _Unit(bias_rows, written, network) if bias_rows else None

    def forward(self, own: Tensor, written: Tensor, read: Tensor, network: Tensor) -> tuple[Tensor, Tensor | None]:
        y = self.own(own)
        y += (self.read(read) + self.network(network).unsqueeze(-1)).unsqueeze(-2)
        y += self.written(written).unsqueeze(-1)
        return y, None if self.bias is None else self.bias(written, network)


class _Unit(nn.Module):
    """Rows per unit from unit features and network features."""

    def __init__(self, out_rows: int, unit: int, network: int) -> None:
        super().__init__()
        self.unit = RowLinear(out_rows, [unit], constant=True)
        self.network = RowLinear(out_rows, [network], constant=True)
        uniform_(self.unit, self.network)

    def forward(self, unit: Tensor, network: Tensor) -> Tensor:
        return self.unit(unit) + self.network(network).unsqueeze(-1)


class NPLinear(nn.Module):
    """Linear and equivariant when all units, inputs and outputs included, are permuted.

    Parameters grow with ``L^2``: every weight hears the mean of every other.

    Args:
        chain: the network whose weights are transformed; its scale is not used.
        in_channels: channels of the features read.
        out_channels: channels of the features returned.
        io_embed: add learned N(0, 1) tensors to the first weight's inputs and the last weight's and bias's outputs
            before the layer (NP-PosEmb): inputs and outputs can be told apart, hidden units cannot.
    """

    def __init__(self, chain: Chain, in_channels: int, out_channels: int, *, io_embed: bool = False) -> None:
        super().__init__()
        self.chain, self.in_channels = chain, in_channels
        f = [layer.filters for layer in chain.layers]
        b = [int(layer.bias is not None) for layer in chain.layers]
        n, m, network = in_channels, out_channels, in_channels * (sum(f) + sum(b))
        self.layers = nn.ModuleList()
        for i in range(chain.depth):
            read = n * (f[i] + (f[i - 1] + b[i - 1] if i else 0))
            written = n * (f[i] + b[i] + (f[i + 1] if i < chain.depth - 1 else 0))
            self.layers.append(_Layer(m * f[i], m * b[i], n * f[i], written, read, network))
        self.io_embed = None
        if io_embed:
            shapes = ((f[0] * n, 1, 1, chain.n_in), (f[-1] * n, 1, chain.n_out, 1), (n * b[-1], 1, chain.n_out))
            self.io_embed = nn.ParameterList([torch.randn(s) for s in shapes])

    def forward(self, features: Features) -> Features:
        """Features of ``in_channels`` -> features of ``out_channels``."""
        chain = self.chain
        chain.validate(features, self.in_channels)
        weights = [layer.rows(features[layer.weight]) for layer in chain.layers]
        biases = [None if x.bias is None else features[x.bias].transpose(0, 1) for x in chain.layers]
        if self.io_embed is not None:
            first, last, bias = self.io_embed
            weights = [weights[0] + first, *weights[1:-1], weights[-1] + last]
            biases = [*biases[:-1], None if biases[-1] is None else biases[-1] + bias]
        rows, cols = [_over_rows(w) for w in weights], [_over_cols(w) for w in weights]
        network = torch.cat([c.mean(-1) for c in cols] + [b.mean(-1) for b in biases if b is not None])
        out: Features = {}
        for i, (spec, layer) in enumerate(zip(chain.layers, self.layers, strict=True)):
            read = [rows[i], *([cols[i - 1], biases[i - 1]] if i else [])]
            written = [cols[i], biases[i], *(rows[i + 1 : i + 2])]
            y, z = layer(weights[i], _cat(written), _cat(read), network)
            out[spec.weight] = spec.weight_from(y)
            if spec.bias is not None:
                out[spec.bias] = z.transpose(0, 1)
        return out


class HNPLinear(nn.Module):
    """Linear and equivariant when hidden units are permuted; inputs and outputs keep their places.

    Parameters grow with ``(L + n_0 + n_L)^2``. As in the official code the last weight does not hear the last hidden
    bias, which equivariance would allow.

    Args:
        chain: the network whose weights are transformed; its scale is not used.
        in_channels: channels of the features read.
        out_channels: channels of the features returned.
    """

    def __init__(self, chain: Chain, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.chain, self.in_channels = chain, in_channels
        f = [layer.filters for layer in chain.layers]
        b = [int(layer.bias is not None) for layer in chain.layers]
        n, m, end = in_channels, out_channels, chain.depth - 1
        first, last = f[0] * chain.n_in, f[-1] * chain.n_out  # rows per channel of the outer weights
        network = n * (sum(f) + sum(b) + first + last + b[-1] * chain.n_out)
        unit = n * (first + f[1] + b[0] + (last if end == 1 else 0))
        self.first = _Unit(m * first, unit, network)
        self.first_bias = _Unit(m, unit, network) if b[0] else None
        self.hidden = nn.ModuleList()
        for i in range(1, end):
            read = n * (f[i] + f[i - 1] + b[i - 1] + (first if i == 1 else 0))
            written = n * (f[i] + b[i] + f[i + 1] + (last if i == end - 1 else 0))
            self.hidden.append(_Layer(m * f[i], m * b[i], n * f[i], written, read, network))
        self.last = _Unit(m * last, n * (last + f[end - 1] + (first if end == 1 else 0)), network)
        self.last_bias = RowLinear(m * chain.n_out, [network], constant=True) if b[-1] else None
        if self.last_bias is not None:
            uniform_(self.last_bias)

    def forward(self, features: Features) -> Features:
        """Features of ``in_channels`` -> features of ``out_channels``."""
        specs, end = self.chain.layers, self.chain.depth - 1
        self.chain.validate(features, self.in_channels)
        weights = [s.rows(features[s.weight], self.chain.side(i)) for i, s in enumerate(specs)]
        biases = [None if s.bias is None else features[s.bias].transpose(0, 1) for s in specs]
        first, last = weights[0], weights[end]
        # means over each axis, also over the fixed ones, which stand in the rows
        by_input, by_output = first.unflatten(0, (-1, self.chain.n_in)), last.unflatten(0, (-1, self.chain.n_out))
        cols = [by_input.mean(1), *(_over_cols(w) for w in weights[1:end])]
        rows = [*(_over_rows(w) for w in weights[1:end]), by_output.mean(1)]  # of weight i + 1
        network = self._network(by_input, cols[1:], by_output, biases)
        out: Features = {}

        def put(i: int, y: Tensor, z: Tensor | None) -> None:
            out[specs[i].weight] = specs[i].weight_from(y, self.chain.side(i))
            name = specs[i].bias
            if name is not None and z is not None:
                out[name] = z.unflatten(0, (-1, specs[i].n_out)).movedim(2, 0) if i == end else z.transpose(0, 1)

        unit = _cat([first, rows[0], biases[0], *([last] if end == 1 else [])])
        put(0, self.first(unit, network), None if self.first_bias is None else self.first_bias(unit, network))
        for i, layer in enumerate(self.hidden, 1):
            read = [rows[i - 1], cols[i - 1], biases[i - 1], *([first] if i == 1 else [])]
            written = [cols[i], biases[i], rows[i], *([last] if i == end - 1 else [])]
            put(i, *layer(weights[i], _cat(written), _cat(read), network))
        unit = _cat([last, cols[end - 1], *([first] if end == 1 else [])])
        put(end, self.last(unit, network), None if self.last_bias is None else self.last_bias(network))
        return out

    @staticmethod
    def _network(first: Tensor, hidden: list[Tensor], last: Tensor, biases: list[Tensor | None]) -> Tensor:
        """Everything that no hidden permutation moves: ``[network rows, B]``."""
        inputs, outputs = first.mean(-1), last.mean(-1)  # [C f, n_0, B], [C f, n_L, B]
        parts = [inputs.mean(1), *(c.mean(-1) for c in hidden), outputs.mean(1)]
        parts += [b.mean(-1) for b in biases if b is not None]
        parts += [inputs.flatten(0, 1), outputs.flatten(0, 1)]
        if biases[-1] is not None:
            parts.append(biases[-1].transpose(1, 2).flatten(0, 1))
        return torch.cat(parts)


def _cat(parts: list[Tensor | None]) -> Tensor:
    return torch.cat([p for p in parts if p is not None])

"""What is added to features before the layers: Fourier features, where inputs, outputs and layers stand, scales."""

import math

import torch
from torch import Tensor, nn

from learned_opt.nfn.chain import Chain, Features


class FourierFeatures(nn.Module):
    """Random Fourier features of every entry: ``x -> [sin 2 pi B x, cos 2 pi B x]``, ``B ~ N(0, scale^2)`` fixed.

    Equivariant to permutations only: put nothing after it that relies on scales or signs.

    Args:
        in_channels: channels read.
        frequencies: rows of B.
        scale: standard deviation of B.
    """

    frequencies: Tensor

    def __init__(self, in_channels: int, frequencies: int = 128, scale: float = 10.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(frequencies, in_channels))
        self.out_channels = 2 * frequencies

    def forward(self, features: Features) -> Features:
        """``[batch, in_channels, ...] -> [batch, 2 * frequencies, ...]``."""
        out: Features = {}
        for name, x in features.items():
            phase = 2 * math.pi * torch.tensordot(self.frequencies, x, ([1], [1]))
            out[name] = torch.cat([phase.sin(), phase.cos()]).transpose(0, 1)
        return out


def fourier_code(x: Tensor, max_frequency: float, bands: int) -> Tensor:
    """``[n] -> [2 * bands + 1, n]``: sines and cosines at ``bands`` frequencies, and x itself."""
    scales = torch.linspace(1.0, max_frequency / 2, bands, dtype=x.dtype, device=x.device)
    phase = math.pi * scales.unsqueeze(1) * x
    return torch.cat([phase.sin(), phase.cos(), x.unsqueeze(0)])


class IOSinusoidal(nn.Module):
    """Appends channels that say which layer, which input and which output an entry belongs to.

    Sinusoidal codes of the layer on everything, plus of the input on the first weight's columns and of the output on
    the last weight's rows and bias. Breaks the permutations of inputs and outputs that NP layers have too many.

    Args:
        chain: the network.
        max_frequency: highest frequency, in half turns over the range [-1, 1].
        bands: number of frequencies.
    """

    def __init__(self, chain: Chain, max_frequency: float = 10.0, bands: int = 6) -> None:
        super().__init__()
        self.chain, self.max_frequency, self.bands = chain, max_frequency, bands
        self.extra_channels = 2 * bands + 1

    def forward(self, features: Features) -> Features:
        """``c`` channels -> ``c + extra_channels``."""
        chain, some = self.chain, features[self.chain.names[0]]

        def code(n: int) -> Tensor:
            position = torch.linspace(-1, 1, n, dtype=some.dtype, device=some.device)
            return fourier_code(position, self.max_frequency, self.bands)

        by_layer, by_input, by_output = code(chain.depth), code(chain.n_in), code(chain.n_out)
        out: Features = {}
        for i, layer in enumerate(chain.layers):
            w = by_layer[:, i, None, None].expand(-1, layer.n_out, layer.n_in)
            b = by_layer[:, i, None].expand(-1, layer.n_out)
            if i == 0:
                w = w + by_input[:, None, :]
            if i == chain.depth - 1:
                w, b = w + by_output[:, :, None], b + by_output
            w = w.reshape(*w.shape, *(1 for _ in layer.kernel)).expand(*w.shape, *layer.kernel)
            x = features[layer.weight]
            out[layer.weight] = torch.cat([x, w.reshape(-1, *layer.shape).expand(len(x), -1, *x.shape[2:])], 1)
            if layer.bias is not None:
                out[layer.bias] = torch.cat([features[layer.bias], b.expand(len(x), -1, -1)], 1)
        return out


class LearnedScale(nn.Module):
    """One learned factor per parameter of the network; an editor's changes start small."""

    def __init__(self, chain: Chain, start: float = 0.01) -> None:
        super().__init__()
        self.names = chain.names
        self.scales = nn.Parameter(torch.full((len(chain.names),), start))

    def forward(self, features: Features) -> Features:
        """Features -> features of the same shape."""
        return {n: features[n] * s for n, s in zip(self.names, self.scales, strict=True)}


class ChannelDropout(nn.Module):
    """Dropout of whole channels, the same for all entries of a parameter."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, features: Features) -> Features:
        """Features -> features of the same shape."""
        out: Features = {}
        for name, x in features.items():
            keep = nn.functional.dropout(x.new_ones(x.shape[:2]), self.p, self.training)
            out[name] = x * keep.reshape(*x.shape[:2], *(1 for _ in x.shape[2:]))
        return out

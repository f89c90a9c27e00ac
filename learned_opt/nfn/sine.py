"""Messages through sine networks: codes of their units that know the phase shifts of the sine.

A unit ``sin(omega (w x + b))`` may be permuted, and its sign flipped (``w``, ``b`` and what reads it); moreover
``b -> b + pi / omega`` only flips the sign of what reads it (ScaleGMN removes these shifts by a canonical form,
Kalogeropoulos et al. 2024). The codes here are ``sin(a(w) + omega b)`` with ``a`` linear and learned: they change sign
exactly where the unit does. Messages are weights times codes, as in MAGEP's products ``[W] = W^(s) .. W^(t+1)``.

With ``mixing="none"`` the codes are the activations at ``channels`` learned inputs, and the outputs the network's
values there (probes, Kofinas et al. 2024); otherwise every layer mixes its channels and there are no such inputs.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from learned_opt.nfn.chain import Chain, Features
from learned_opt.nfn.encodings import LearnedScale
from learned_opt.nfn.models import head
from learned_opt.symmetry import SymmetryError

Mixing = Literal["random", "points", "none"]


@dataclass(frozen=True)
class Codes:
    """What :class:`SineMessages` finds: lists have an entry per hidden layer.

    Attributes:
        codes: ``[B, n_i, K]``, odd under a sign flip or a half turn of the unit.
        slopes: derivatives of the codes by their arguments; odd under half turns only.
        outputs: ``[B, n_L, K]``, invariant.
    """

    codes: list[Tensor]
    slopes: list[Tensor]
    outputs: Tensor


class SineMessages(nn.Module):
    """A forward sweep through a sine network with learned inputs and, between layers, learned mixtures of channels.

    ``u^(1) = sin(W^(1) X + omega b^(1))``, ``u^(i) = sin(W^(i) u^(i-1) A_i + omega b^(i))`` and
    ``y = W^(L) u^(L-1) + b^(L)``; learned are ``X [n_0, K]`` and ``A_i [K, K]``. Equivariant to
    permutations, signs and phase shifts.

    Args:
        chain: the sine network.
        channels: K.
        omega: the frequency, ``sin(omega (W x + b))``.
        mixing: how ``A_i`` starts: ``random`` with gains from 1 to omega, ``points`` at omega times the identity, or
            ``none``, fixed there.

    Raises:
        SymmetryError: kernels, missing biases, or units that have positive scales (ReLU).
    """

    def __init__(self, chain: Chain, channels: int, *, omega: float = 30.0, mixing: Mixing = "random") -> None:
        super().__init__()
        if chain.scale == "positive" or any(x.kernel or x.bias is None for x in chain.layers):
            raise SymmetryError("messages through sines need dense layers with biases, and sine units (scale='sign')")
        self.chain, self.channels, self.omega = chain, channels, omega
        self.inputs = nn.Parameter(omega * (2 * torch.rand(chain.n_in, channels) - 1))
        gains = omega ** torch.linspace(0, 1, channels)
        mixtures = []
        for _ in range(chain.depth - 2):
            noise = torch.randn(channels, channels) / math.sqrt(channels)
            mixtures.append(noise * gains if mixing == "random" else omega * torch.eye(channels))
        self.mixtures = nn.ParameterList([nn.Parameter(a, requires_grad=mixing != "none") for a in mixtures])

    def read(self, features: Features) -> tuple[list[Tensor], list[Tensor]]:
        """Weights ``[B, n_i, n_{i-1}]`` and biases ``[B, n_i]`` of features with one channel."""
        self.chain.validate(features, 1)
        weights = [features[x.weight].squeeze(1) for x in self.chain.layers]
        return weights, [features[x.bias or ""].squeeze(1) for x in self.chain.layers]

    def forward(self, features: Features) -> Codes:
        """Features with one channel -> codes, slopes and outputs."""
        weights, biases = self.read(features)
        codes: list[Tensor] = []
        slopes: list[Tensor] = []
        for i, (w, b) in enumerate(zip(weights[:-1], biases, strict=False)):
            phase = w @ codes[-1] @ self.mixtures[i - 1] if i else w @ self.inputs
            phase = phase + self.omega * b.unsqueeze(-1)
            codes.append(phase.sin())
            slopes.append(phase.cos())
        return Codes(codes, slopes, weights[-1] @ codes[-1] + biases[-1].unsqueeze(-1))


class SineNFN(nn.Module):
    """The outputs of :class:`SineMessages` and a head: a vector that no symmetry of a sine network moves.

    Args:
        chain: the sine network.
        outputs: size of the vector.
        channels: of the messages.
        head_width: of the head.
        omega: the frequency.
        mixing: see :class:`SineMessages`; ``none`` is a net on values at learned points.
        dropout: in the head.
    """

    def __init__(
        self,
        chain: Chain,
        outputs: int,
        *,
        channels: int = 256,
        head_width: int = 256,
        omega: float = 30.0,
        mixing: Mixing = "random",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.messages = SineMessages(chain, channels, omega=omega, mixing=mixing)
        read = channels * chain.n_out
        self.head = nn.Sequential(nn.LayerNorm(read), head(read, head_width, outputs, dropout))

    def forward(self, features: Features) -> Tensor:
        """Features with one channel -> ``[batch, outputs]``."""
        return self.head(self.messages(features).outputs.flatten(1))  # type: ignore[no-any-return]


class SineFeatures(nn.Module):
    """Messages as features for permutation layers: invariant to signs and phase shifts, entry by entry.

    ``|W^(i)_{pj} c_j|`` and ``|c_j|`` with ``c = u B`` a learned mixture of the codes of the unit that the weight reads
    (that it writes, for the first weight), ``W^(L)_{op} c_p`` and ``y B``. As in Monomial-NFN's classifier of sine
    networks absolute values end what keeps signs.

    Args:
        chain: the sine network.
        channels: of the messages.
        out_channels: of the features returned.
        omega: the frequency.
        mixing: see :class:`SineMessages`.
    """

    def __init__(
        self, chain: Chain, channels: int, out_channels: int, *, omega: float = 30.0, mixing: Mixing = "random"
    ) -> None:
        super().__init__()
        self.chain, self.out_channels = chain, out_channels
        self.messages = SineMessages(chain, channels, omega=omega, mixing=mixing)
        self.norm = nn.LayerNorm(channels)
        self.mixtures = nn.ModuleList([nn.Linear(channels, out_channels, bias=False) for _ in chain.layers])
        widths = [1.0, *(omega for _ in chain.layers[2:]), math.sqrt(chain.widths[-2])]
        self.gains = nn.Parameter(torch.tensor(widths))  # entries of a fitted network are about one after these

    def forward(self, features: Features) -> Features:
        """One channel -> ``out_channels``."""
        found = self.messages(features)
        units = [mix(u).mT for mix, u in zip(self.mixtures, found.codes, strict=False)]  # [B, C, n_i]
        out: Features = {}
        for i, (layer, gain) in enumerate(zip(self.chain.layers, self.gains, strict=True)):
            code = units[0].unsqueeze(-1) if i == 0 else units[i - 1].unsqueeze(-2)
            product = gain * features[layer.weight] * code
            last = i == self.chain.depth - 1
            out[layer.weight] = product if last else product.abs()
            assert layer.bias is not None
            out[layer.bias] = self.mixtures[-1](self.norm(found.outputs)).mT if last else units[i].abs()
        return out


class SineGradients(nn.Module):
    """Gradients of learned invariants by the weights: features that move as weights do, but not with phase shifts.

    With ``y`` the outputs of :class:`SineMessages` and ``e_c(y)`` a net, channel c is the gradient of
    ``sum_k e_ck y_k`` by the weights, e held fixed. An invariant times the gradient of an invariant is equivariant to
    permutations and signs, and shifts of biases do not move it. What an editor adds to weights may be such a sum.

    Args:
        chain: the sine network.
        channels: of the messages.
        out_channels: of the features returned.
        width: of the net for e.
        omega: the frequency.
        mixing: see :class:`SineMessages`.
    """

    def __init__(
        self,
        chain: Chain,
        channels: int,
        out_channels: int = 1,
        *,
        width: int = 256,
        omega: float = 30.0,
        mixing: Mixing = "points",
    ) -> None:
        super().__init__()
        self.chain, self.out_channels = chain, out_channels
        self.messages = SineMessages(chain, channels, omega=omega, mixing=mixing)
        n = channels * chain.n_out
        self.coefficients = head(n, width, out_channels * n)

    def forward(self, features: Features) -> Features:
        """One channel -> ``out_channels``."""
        weights, _ = self.messages.read(features)
        found = self.messages(features)
        e = self.coefficients(found.outputs.flatten(1))
        back = e.unflatten(1, (self.out_channels, *found.outputs.shape[1:]))  # by W^(i) u^(i-1) + b^(i): [B, C, n, K]
        by_bias = back.sum(-1)
        out: Features = {}
        for i in reversed(range(self.chain.depth)):
            layer = self.chain.layers[i]
            assert layer.bias is not None
            below = found.codes[i - 1].unsqueeze(1) if i else self.messages.inputs.expand(1, 1, -1, -1)
            out[layer.weight], out[layer.bias] = back @ below.mT, by_bias
            if i:
                phase = (weights[i].mT.unsqueeze(1) @ back) * found.slopes[i - 1].unsqueeze(1)
                by_bias = self.messages.omega * phase.sum(-1)
                back = phase @ self.messages.mixtures[i - 2].mT if i > 1 else phase
        return {name: out[name] for name in self.chain.names}


class SineEditor(nn.Module):
    """Weights of a sine network -> edited weights: themselves plus what layers make of :class:`SineGradients`.

    Args:
        chain: the sine network.
        layers: equivariant layers from ``out_channels`` to one channel; without them there is one channel, and the
            editor is equivariant to permutations, signs and phase shifts.
        out_channels: channels of the gradients.
        channels: of the messages.
        omega: the frequency.
        mixing: see :class:`SineMessages`.
        start: of the learned factors of the change, one per parameter.
    """

    def __init__(
        self,
        chain: Chain,
        layers: nn.Module | None = None,
        *,
        out_channels: int = 1,
        channels: int = 128,
        omega: float = 30.0,
        mixing: Mixing = "points",
        start: float = 1e-3,
    ) -> None:
        super().__init__()
        self.gradients = SineGradients(chain, channels, out_channels, omega=omega, mixing=mixing)
        self.layers = nn.Identity() if layers is None else layers
        self.scale = LearnedScale(chain, start)

    def forward(self, features: Features) -> Features:
        """Features with one channel -> edited features with one channel."""
        change = self.scale(self.layers(self.gradients(features)))
        return {n: x + change[n] for n, x in features.items()}

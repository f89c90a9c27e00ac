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


def _need_sines(chain: Chain) -> None:
    if chain.scale == "positive" or any(x.kernel or x.bias is None for x in chain.layers):
        raise SymmetryError("messages through sines need dense layers with biases, and sine units (scale='sign')")


def _read(chain: Chain, features: Features) -> tuple[list[Tensor], list[Tensor]]:
    """Weights ``[B, n_i, n_{i-1}]`` and biases ``[B, n_i]`` of features with one channel."""
    chain.validate(features, 1)
    weights = [features[x.weight].squeeze(1) for x in chain.layers]
    return weights, [features[x.bias or ""].squeeze(1) for x in chain.layers]


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
        _need_sines(chain)
        self.chain, self.channels, self.omega = chain, channels, omega
        self.inputs = nn.Parameter(omega * (2 * torch.rand(chain.n_in, channels) - 1))
        self.mixtures = nn.ParameterList()
        for _ in range(0 if mixing == "none" else chain.depth - 2):
            noise = torch.randn(channels, channels) * omega ** torch.linspace(0, 1, channels) / math.sqrt(channels)
            self.mixtures.append(noise if mixing == "random" else omega * torch.eye(channels))

    def _mix(self, i: int, x: Tensor, back: bool = False) -> Tensor:
        """The channels of messages that weight i (from 1) reads, or of what comes back through it."""
        if not len(self.mixtures):
            return self.omega * x
        return x @ (self.mixtures[i - 1].mT if back else self.mixtures[i - 1])

    def forward(self, features: Features) -> Codes:
        """Features with one channel -> codes, slopes and outputs."""
        weights, biases = _read(self.chain, features)
        codes: list[Tensor] = []
        slopes: list[Tensor] = []
        for i, (w, b) in enumerate(zip(weights[:-1], biases, strict=False)):
            phase = self._mix(i, w @ codes[-1]) if i else w @ self.inputs
            phase = phase + self.omega * b.unsqueeze(-1)
            codes.append(phase.sin())
            slopes.append(phase.cos())
        return Codes(codes, slopes, weights[-1] @ codes[-1] + biases[-1].unsqueeze(-1))

    def gradient(self, features: Features, found: Codes, factors: Tensor) -> Features:
        """Gradients by the weights of ``sum_k e_k y_k``, the factors e held fixed.

        Args:
            features: with one channel.
            found: what ``forward`` returned for them.
            factors: e, ``[B, C, n_L, K]``.

        Returns:
            Features with C channels.
        """
        weights, _ = _read(self.chain, features)
        back, by_bias = factors, factors.sum(-1)  # back: by W^(i) u^(i-1) + b^(i), [B, C, n_i, K]
        out: Features = {}
        for i in reversed(range(self.chain.depth)):
            layer = self.chain.layers[i]
            assert layer.bias is not None
            below = found.codes[i - 1].unsqueeze(1) if i else self.inputs
            out[layer.weight], out[layer.bias] = back @ below.mT, by_bias
            if i:
                phase = (weights[i].mT.unsqueeze(1) @ back) * found.slopes[i - 1].unsqueeze(1)
                by_bias = self.omega * phase.sum(-1)
                back = self._mix(i - 1, phase, back=True) if i > 1 else phase
        return {name: out[name] for name in self.chain.names}


class SineCanonical(nn.Module):
    """The weights of a sine network with half turns and signs taken out (phase canonicalisation as in ScaleGMN).

    Biases are brought into ``[-pi / 2 omega, pi / 2 omega)``; then every unit takes the sign for which the first of
    its weights with a fixed end (from an input, or else to an output) is positive. What is left is permutations. The
    form jumps where a bias or that weight passes the end of its range. Weights are in radians times the root of what
    is summed, so that entries of a fitted network are of order one.

    Args:
        chain: the sine network; hidden layers other than the first and the last keep their signs.
        omega: the frequency.
    """

    def __init__(self, chain: Chain, omega: float = 30.0) -> None:
        super().__init__()
        _need_sines(chain)
        self.chain, self.omega = chain, omega

    def forward(self, features: Features) -> Features:
        """Features with one channel -> features with one channel."""
        weights, biases = _read(self.chain, features)
        for i in range(self.chain.depth - 1):
            turns = torch.floor(biases[i] * self.omega / math.pi + 0.5)
            biases[i] = biases[i] - turns * math.pi / self.omega
            weights[i + 1] = weights[i + 1] * (1 - 2 * (turns % 2)).unsqueeze(1)
        for i in {0, self.chain.depth - 2}:
            fixed = weights[0][..., 0] if i == 0 else weights[-1][:, 0]
            sign = torch.where(fixed < 0, -1.0, 1.0).to(fixed)
            weights[i], biases[i] = weights[i] * sign.unsqueeze(-1), biases[i] * sign
            weights[i + 1] = weights[i + 1] * sign.unsqueeze(1)
        out: Features = {}
        for i, layer in enumerate(self.chain.layers):
            gain = self.omega if i < self.chain.depth - 1 else 1.0
            out[layer.weight] = weights[i].unsqueeze(1) * (gain * (math.sqrt(layer.n_in) if i else 0.5))
            out[layer.bias or ""] = biases[i].unsqueeze(1) * gain
        return out


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
    """

    def __init__(self, chain: Chain, channels: int, out_channels: int, *, omega: float = 30.0) -> None:
        super().__init__()
        self.chain, self.out_channels = chain, out_channels
        self.norm = nn.LayerNorm(channels)
        self.mixtures = nn.ModuleList([nn.Linear(channels, out_channels, bias=False) for _ in chain.layers])
        widths = [1.0, *(omega for _ in chain.layers[2:]), math.sqrt(chain.widths[-2])]
        self.gains = nn.Parameter(torch.tensor(widths))  # entries of a fitted network are about one after these

    def forward(self, features: Features, found: Codes) -> Features:
        """Features with one channel and the codes of their messages -> ``out_channels``."""
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


class SineNFN(nn.Module):
    """A vector that no symmetry of a sine network moves: a head on the outputs of :class:`SineMessages`.

    With ``body`` invariant layers on :class:`SineFeatures` of the same messages are heard too.

    Args:
        chain: the sine network.
        outputs: size of the vector.
        channels: of the messages.
        head_width: of the head.
        omega: the frequency.
        mixing: see :class:`SineMessages`; ``none`` is a net on values at learned points.
        dropout: in the head.
        body: from features with ``in_channels`` channels to ``[batch, width]``, such as an InvariantNFN.
        in_channels: channels that the body reads.
        width: numbers that it returns.
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
        body: nn.Module | None = None,
        in_channels: int = 4,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.messages = SineMessages(chain, channels, omega=omega, mixing=mixing)
        self.features = None if body is None else SineFeatures(chain, channels, in_channels, omega=omega)
        self.body = body
        read = channels * chain.n_out + (0 if body is None else width)
        self.head = nn.Sequential(nn.LayerNorm(read), head(read, head_width, outputs, dropout))

    def forward(self, features: Features) -> Tensor:
        """Features with one channel -> ``[batch, outputs]``."""
        found = self.messages(features)
        heard = [found.outputs.flatten(1)]
        if self.body is not None and self.features is not None:
            heard.append(self.body(self.features(features, found)))
        return self.head(torch.cat(heard, 1))


class SineEditor(nn.Module):
    """Weights of a sine network of images -> edited weights, by a few learned steps.

    The outputs ``y`` are the network's values on a grid of inputs. Every step adds to the weights, with a learned rate
    per parameter, the gradient of ``sum_k e_k y_k``; the factors e, held fixed in it, are what a small convolutional
    net makes of the values before the first step and now. An invariant times the gradient of an invariant moves with
    the weights under permutations and signs, and phase shifts do not move it: so the editor commutes with all three.

    With ``layers`` there are ``in_channels`` such gradients, and what the layers make of them is added to the first.
    The editor then commutes with what the layers commute with; a half turn flips the columns of the next weight alone,
    which MonomialLinear keeps, but not layers that let other parameters of a unit hear these.

    Args:
        chain: the sine network; it has two inputs in [-1, 1].
        layers: from features with ``in_channels`` channels to one channel.
        in_channels: gradients per step.
        side: of the grid.
        steps: how many.
        width: channels of the net for e.
        omega: the frequency.
        rate: where the learned rates start.

    Raises:
        SymmetryError: the network has not two inputs, or is none that :class:`SineMessages` takes.
    """

    TYPICAL = 100.0  # size of a gradient's entries; what the layers read is about one

    def __init__(
        self,
        chain: Chain,
        layers: nn.Module | None = None,
        *,
        in_channels: int = 1,
        side: int = 20,
        steps: int = 4,
        width: int = 16,
        omega: float = 30.0,
        rate: float = 1e-4,
    ) -> None:
        super().__init__()
        if chain.n_in != 2:
            raise SymmetryError(f"the editor sees a network as an image, of 2 inputs; this one has {chain.n_in}")
        self.messages = SineMessages(chain, side * side, omega=omega, mixing="none")
        line = omega * torch.linspace(-1, 1, side)
        self.messages.inputs.data = torch.stack(torch.meshgrid(line, line, indexing="ij")).flatten(1)
        self.messages.inputs.requires_grad_(False)
        self.layers, self.side, self.rate, n = layers, side, rate, chain.n_out
        self.nets = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(2 * n, width, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(width, in_channels * n, 3, padding=1),
            )
            for _ in range(steps)
        )
        self.rates = nn.ModuleList(LearnedScale(chain, 1.0) for _ in range(steps))

    def forward(self, features: Features) -> Features:
        """Features with one channel -> edited features with one channel."""
        before: Tensor | None = None
        for net, rates in zip(self.nets, self.rates, strict=True):
            found = self.messages(features)
            now = found.outputs.unflatten(2, (self.side, self.side))
            before = now if before is None else before
            factors = net(torch.cat([before, now], 1)).unflatten(1, (-1, now.shape[1])).flatten(3)
            change = self.messages.gradient(features, found, factors)
            if self.layers is not None:
                more = self.layers({n: x / self.TYPICAL for n, x in change.items()})
                change = {n: x[:, :1] + self.TYPICAL * more[n] for n, x in change.items()}
            features = {n: features[n] + self.rate * x for n, x in rates(change).items()}
        return features

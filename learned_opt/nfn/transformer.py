"""Transformer-NFN: equivariant polynomial and invariant layers for transformers, and a model that predicts from them.

Tran et al. 2024, Equivariant Neural Functional Networks for Transformers. GL within a head leaves room for two things
only: mixing the rows of ``W_Q, W_K, W_V`` (and the columns of ``W_O``) from the left, which commutes with its action
from the right, and the products ``W_Q W_K^T`` and ``W_V W_O``, which it does not change. Summed over heads they are
tensors on which only permutations act, like the feed-forward weights. So

    (W_Q, W_K, W_V, W_O)' = theta (W_Q, W_K, W_V, W_O)                      head by head
    (W_A, b_A, W_B, b_B)' = every equivariant linear map of (QK, VO, W_A, b_A, W_B, b_B, 1)

and both lines are :class:`~learned_opt.nfn.equivariant_basis.PartitionLinear`. With ``stream="block"`` these are the
paper's terms one for one, and its numbers of parameters. Blocks are not mixed before the prediction head.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from learned_opt.nfn.equivariant_basis import Dim, Dims, PartitionLinear
from learned_opt.nfn.transformer_space import CLASSIFIER, PROJECTIONS, TransformerFeatures, TransformerSpec

Outside = Literal["mlp", "invariant", "none"]


def products(spec: TransformerSpec, block: Mapping[str, Tensor]) -> list[Tensor]:
    """``sum_h W_Q W_K^T`` and ``sum_h W_V W_O`` of one block, channel by channel, cut at the bias rows.

    One matrix product over heads and head dim each: ``[B, C, rows, rows]`` and ``[B, C, rows, dim]``.
    """
    q, k, v = (block[n].transpose(-3, -2).flatten(-2) for n in PROJECTIONS)  # [B, C, rows, heads * d]
    qk, vo = q @ k.transpose(-1, -2), v @ block["o"].flatten(-3, -2)
    if not spec.bias:
        return [qk, vo]
    d = spec.dim
    return [qk[..., :d, :d], qk[..., :d, d], qk[..., d, :d], qk[..., d, d], vo[..., :d, :], vo[..., d, :]]


def product_dims(spec: TransformerSpec) -> list[Dims]:
    """The dims of :func:`products`; the bias rows have none."""
    rows = spec.rows
    middle = spec.width("between")
    return [p + q for p in rows for q in rows] + [(*p, middle) for p in rows]


class _Rows(nn.Module):
    """Equivariant mixing of channels and of one axis (the rows, or the columns of ``W_O``), alike for every head."""

    def __init__(self, dims: Sequence[Dims], axis: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.axis, self.sizes = axis, [math.prod(d.size for d in own) for own in dims]
        self.ranks = [len(own) for own in dims]
        self.map = PartitionLinear(dims, dims, in_channels, out_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, heads, .., ..] -> [B, out, heads, .., ..]``."""
        x = x.movedim((1, self.axis), (-2, -1))  # heads and head dim are part of the batch
        parts = x.flatten(0, -3).split(self.sizes, -1)
        mixed = self.map([p if r else p.squeeze(-1) for p, r in zip(parts, self.ranks, strict=True)])
        y = torch.cat([p if r else p.unsqueeze(-1) for p, r in zip(mixed, self.ranks, strict=True)], -1)
        return y.unflatten(0, x.shape[:-2]).movedim((-2, -1), (1, self.axis))


class _BlockLinear(nn.Module):
    """One block of :class:`TransformerLinear`."""

    def __init__(self, spec: TransformerSpec, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.spec = spec
        self.read = nn.ModuleDict({n: _Rows(spec.rows, -2, in_channels, out_channels) for n in PROJECTIONS})
        self.write = _Rows([(spec.width("between"),)], -1, in_channels, out_channels)
        dims = spec.feed_forward
        self.rest = PartitionLinear([*product_dims(spec), *dims.values()], [*dims.values()], in_channels, out_channels)

    def forward(self, block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = list(self.spec.feed_forward)
        plain = self.rest([*products(self.spec, block), *(block[n] for n in names)])
        return {
            **{n: self.read[n](block[n]) for n in PROJECTIONS},
            "o": self.write(block["o"]),
            **dict(zip(names, plain, strict=True)),
        }


class TransformerLinear(nn.Module):
    """Equivariant polynomial layer: ``layer(g . U) = g . layer(U)`` for the whole group of the spec.

    Polynomial because the feed-forward part reads products of two weights. Means are taken where the paper sums.
    Tensors outside of the blocks pass through unchanged.

    Args:
        spec: of the transformers.
        in_channels: of the features.
        out_channels: of the result.

    Shape:
        ``TransformerFeatures`` with ``[B, in_channels, blocks, ...]`` -> the same with ``out_channels``.
    """

    def __init__(self, spec: TransformerSpec, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_BlockLinear(spec, in_channels, out_channels) for _ in spec.names)

    def forward(self, features: TransformerFeatures) -> TransformerFeatures:
        """See the class."""
        mixed = [f({n: x[:, :, i] for n, x in features.blocks.items()}) for i, f in enumerate(self.blocks)]
        return TransformerFeatures({n: torch.stack([m[n] for m in mixed], 2) for n in mixed[0]}, features.rest)


class TransformerReLU(nn.Module):
    """ReLU of the feed-forward tensors alone: no pointwise function commutes with GL."""

    def forward(self, features: TransformerFeatures) -> TransformerFeatures:
        """``TransformerFeatures`` -> the same shapes."""
        linear = (*PROJECTIONS, "o")
        blocks = {n: x if n in linear else torch.relu(x) for n, x in features.blocks.items()}
        return TransformerFeatures(blocks, features.rest)


class TransformerInvariant(nn.Module):
    """Invariant polynomial layer, a LayerNorm per block.

    Args:
        spec: of the transformers.
        in_channels: of the features.
        out_channels: per block.

    Shape:
        ``TransformerFeatures`` -> ``[B, blocks * out_channels]``.
    """

    def __init__(self, spec: TransformerSpec, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.spec = spec
        dims = [*product_dims(spec), *spec.feed_forward.values()]
        self.blocks = nn.ModuleList(PartitionLinear(dims, [()], in_channels, out_channels) for _ in spec.names)
        self.norms = nn.ModuleList(nn.LayerNorm(out_channels) for _ in spec.names)

    def forward(self, features: TransformerFeatures) -> Tensor:
        """See the class."""
        results = []
        for i, (f, norm) in enumerate(zip(self.blocks, self.norms, strict=True)):
            block = {n: x[:, :, i] for n, x in features.blocks.items()}
            (y,) = f([*products(self.spec, block), *(block[n] for n in self.spec.feed_forward)])
            results.append(norm(y))
        return torch.cat(results, 1)


class _Outside(nn.Module):
    """The tensors outside of the blocks as a vector that does not change under the group of their dims.

    The invariant linear maps to ``width`` features; where all dims are positional that is ``Linear`` on the
    flattened weights. ``hidden`` equivariant channels and a ReLU come first if asked for.
    """

    def __init__(self, dims: Mapping[str, Dims], channels: int, width: int, hidden: int | None = None) -> None:
        super().__init__()
        self.names, own = list(dims), list(dims.values())
        self.first = PartitionLinear(own, own, channels, hidden) if hidden else None
        self.last = PartitionLinear(own, [()], hidden or channels, width)

    def forward(self, features: TransformerFeatures) -> Tensor:
        x = [features.rest[n] for n in self.names]
        if self.first is not None:
            x = [torch.relu(y) for y in self.first(x)]
        return self.last(x)[0]


class TransformerNFN(nn.Module):
    """Predicts numbers about a transformer (its test accuracy, say) from its weights; invariant to its group.

    The paper's model: equivariant layers with ReLU and the invariant layer for the blocks, an MLP on the flattened
    weights of the classifier, a linear map of the embedding, and a linear readout of all three.

    Args:
        spec: of the transformers.
        in_channels: 1 for weights; 2 with gradients.
        channels: of the equivariant layers.
        width: features of each part, and of the MLPs.
        outputs: numbers to predict.
        classifier: ``mlp`` takes the classifier's weights as they are, as the paper does (its hidden units may be
            permuted, which this part does not know); ``invariant`` has an equivariant and an invariant layer there;
            ``none`` leaves the classifier out.
        embedding: whether the embedding is read; a spec without embedding has none.
        sigmoid: whether results are probabilities.

    Shape:
        ``TransformerFeatures`` (:meth:`TransformerSpec.pack`) -> ``[B, outputs]``.
    """

    def __init__(
        self,
        spec: TransformerSpec,
        *,
        in_channels: int = 1,
        channels: Sequence[int] = (10,),
        width: int = 10,
        outputs: int = 1,
        classifier: Outside = "mlp",
        embedding: bool = True,
        sigmoid: bool = True,
    ) -> None:
        super().__init__()
        if not channels:
            raise ValueError("channels needs at least one equivariant layer, such as (10,)")
        layers: list[nn.Module] = []
        for c, e in zip((in_channels, *channels), channels, strict=False):
            layers += [TransformerLinear(spec, c, e), TransformerReLU()]
        last = channels[-1]
        encoder = nn.Sequential(
            *layers,
            TransformerInvariant(spec, last, last),
            nn.LayerNorm(last * len(spec.names)),
            *(nn.Linear(last * len(spec.names), width), nn.LayerNorm(width), nn.ReLU()),
            *(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU()),
            nn.Linear(width, width),
        )
        parts: list[nn.Module] = [encoder]
        if classifier == "mlp" and spec.classifier:
            told = {n: tuple(_positional(d) for d in dims) for n, dims in spec.classifier.items()}
            hidden = (nn.Linear(width, width), nn.ReLU())
            first = _Outside(told, in_channels, width)
            parts.append(nn.Sequential(first, nn.ReLU(), *hidden, nn.Linear(width, width), nn.ReLU()))
        elif classifier == "invariant" and spec.classifier:
            parts.append(_Outside(spec.classifier, in_channels, width, hidden=last))
        if embedding and spec.embedding:
            parts.append(_Outside(spec.embedding, in_channels, width))
        self.parts = nn.ModuleList(parts)
        self.head = nn.Linear(width * len(parts), outputs)
        self.sigmoid = sigmoid

    def forward(self, features: TransformerFeatures) -> Tensor:
        """See the class."""
        y = self.head(torch.cat([part(features) for part in self.parts], 1))
        return y.sigmoid() if self.sigmoid else y


def _positional(dim: Dim) -> Dim:
    return Dim(dim.size) if dim.label == CLASSIFIER else dim

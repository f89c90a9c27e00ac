"""Equivariant linear layers for any :class:`Symmetry`: residual networks, recurrent networks, fused projections.

What universal neural functionals (Zhou et al. 2024) do from hand-written specifications is done here from the
symmetry itself: every tensor is cut into blocks whose dims each have one label (``q|k|v`` is three blocks,
``heads x head_dim`` two dims), and blocks are joined by what their dims have in common. Heads are bases and
head_dim is a fibre over them, so nothing ever averages over heads what differs between heads.

Features are a dict ``{name: [batch, channels, *shape]}`` with the names of the symmetry, as in the chain layers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from learned_opt.blocks import layout_of
from learned_opt.frame import potentials, scales
from learned_opt.nfn.equivariant_basis import Dim, Dims, PartitionLinear, Scaling
from learned_opt.symmetry import Symmetry, SymmetryError
from learned_opt.symmetry.axes import Leaf, alternatives, assembled, choices, pieces_of
from learned_opt.symmetry.labels import base_dim

Features = dict[str, Tensor]
Respect = Literal["none", "sign", "exact"]
LEAD = 2  # batch, channel


# ------------------------------------------------------------------------------------ tensors as blocks
def block_dims(symmetry: Symmetry, scale: Respect = "none") -> tuple[dict[str, list[Dims]], dict[str, Scaling]]:
    """The dims of every block of every tensor, and the kinds of the scales that are kept.

    Args:
        symmetry: of the network.
        scale: ``none`` keeps permutations only, ``sign`` the signs of sign and real scales, ``exact`` all scales.
    """
    kinds: dict[str, Scaling] = {}
    for name, s in symmetry.scales.items():
        if scale == "exact":
            kinds[name] = s.kind
        elif scale == "sign" and s.kind != "positive":
            kinds[name] = "sign"
    blocks = {}
    for name, spec in symmetry.specs.items():
        found = ([leaf for part in choice for leaf in part] for choice in choices(spec.axes))
        blocks[name] = [_dims(symmetry, leaves, kinds) for leaves in found]
    return blocks, kinds


def _dims(symmetry: Symmetry, leaves: list[Leaf], kinds: Mapping[str, Scaling]) -> Dims:
    labels = [leaf.label for leaf in leaves]
    dims = []
    for i, leaf in enumerate(leaves):
        exponents = ((n, e % 2 if kinds[n] == "sign" else e) for n, e in leaf.scale if n in kinds)
        kept = tuple(sorted((n, e) for n, e in exponents if e))
        base = tuple(base_dim(labels, b, i) for b in symmetry.over(leaf))
        fixed = leaf.label is None or symmetry.labels[leaf.label].fixed
        # fixed units that are scaled one by one can be tied to each other like units of a label
        label = f"fixed {leaf.size}" if leaf.label is None and kept else leaf.label
        dims.append(Dim(leaf.size, label, base, kept, fixed))
    return tuple(dims)


def split_blocks(symmetry: Symmetry, features: Mapping[str, Tensor]) -> list[Tensor]:
    """Features as the blocks of all tensors of the symmetry, in order, each ``[B, C, *dims]``.

    Raises:
        SymmetryError: when a tensor is missing, is not of the symmetry or has another shape.
    """
    check_features(symmetry, features)
    blocks = []
    for name, spec in symmetry.specs.items():
        blocks += pieces_of(features[name], spec.axes, LEAD)
    return blocks


def merge_blocks(symmetry: Symmetry, blocks: list[Tensor]) -> Features:
    """Inverse of :func:`split_blocks`."""
    features, start = {}, 0
    for name, spec in symmetry.specs.items():
        count = math.prod(len(alternatives(a)) for a in spec.axes)
        features[name] = assembled(blocks[start : start + count], spec.axes, LEAD)
        start += count
    return features


def check_features(symmetry: Symmetry, features: Mapping[str, Tensor]) -> None:
    """Raise :class:`SymmetryError` unless there is one tensor ``[batch, channels, *shape]`` for every name."""
    if features.keys() != symmetry.specs.keys():
        missing, more = symmetry.specs.keys() - features.keys(), features.keys() - symmetry.specs.keys()
        raise SymmetryError(
            f"the features are not of this symmetry: missing {sorted(missing)[:5]}, unknown {sorted(more)[:5]}. "
            "Pass one tensor [batch, channels, *shape] for every name in symmetry.specs; for some of a network's "
            "tensors (without statistics, say) dataclasses.replace(symmetry, specs={...})."
        )
    lead = {x.shape[:LEAD] for x in features.values()}
    if len(lead) != 1:
        raise SymmetryError(f"features differ in batch or channels: {sorted(map(tuple, lead))}")
    for name, x in features.items():
        if tuple(x.shape[LEAD:]) != symmetry.specs[name].shape:
            raise SymmetryError(
                f"{name} has shape {tuple(x.shape)}; expected [batch, channels, *{symmetry.specs[name].shape}]"
            )


# ---------------------------------------------------------------------------- pool, mix and broadcast
@dataclass(frozen=True)
class _View:
    """Some dims of a block that are kept, in the order of the signature that they share with other blocks."""

    dims: tuple[int, ...]
    key: tuple[object, ...]


@dataclass(frozen=True)
class _Form:
    """A block as ``[B, C * fold, long, *labelled dims]``: short positional axes are channels, long ones one axis."""

    dims: Dims
    labelled: tuple[int, ...]
    plain: tuple[int, ...]
    fold: int
    long: int

    @classmethod
    def of(cls, dims: Dims, limit: int) -> "_Form":
        labelled = tuple(i for i, d in enumerate(dims) if d.label is not None)
        plain = tuple(i for i, d in enumerate(dims) if d.label is None)
        size = math.prod(dims[i].size for i in plain)
        return cls(dims, labelled, plain, *((size, 1) if size <= limit else (1, size)))

    def fold_in(self, x: Tensor) -> Tensor:
        x = x.permute(0, 1, *(i + LEAD for i in self.plain + self.labelled))
        return x.reshape(x.shape[0], x.shape[1] * self.fold, self.long, *(self.dims[i].size for i in self.labelled))

    def unfold(self, x: Tensor) -> Tensor:
        order = self.plain + self.labelled
        x = x.reshape(x.shape[0], -1, *(self.dims[i].size for i in order))
        return x.permute(0, 1, *(order.index(i) + LEAD for i in range(len(order))))

    def views(self) -> list[_View]:
        """What is kept of a block when the rest is averaged: nothing, one dim with its bases, or all labelled dims.

        Dims that are averaged must not be scaled.
        """
        kept = [(), *((*self.dims[i].base, i) for i in self.labelled)]
        if len(self.labelled) > 1:
            kept.append(tuple(sorted(self.labelled, key=lambda i: (str(self.dims[i].label), i))))
        unique = list({frozenset(k): k for k in kept}.values())
        return [
            _View(k, tuple(self._signature(i, k) for i in k))
            for k in unique
            if not any(d.scale for i, d in enumerate(self.dims) if i not in k)
        ]

    def _signature(self, i: int, kept: tuple[int, ...]) -> tuple[object, ...]:
        dim = self.dims[i]
        return dim.label, dim.size, dim.scale, tuple(kept.index(b) for b in dim.base)


class _Hub(nn.Module):
    """From the blocks to messages per network, per unit and per entry, and from those to the blocks."""

    def __init__(self, forms: list[_Form], in_channels: int, out_channels: int, messages: int) -> None:
        super().__init__()
        self.forms, self.messages = forms, messages
        views = [f.views() for f in forms]
        count: dict[tuple[object, ...], int] = {}
        for own in views:
            for v in own:
                count[v.key] = count.get(v.key, 0) + 1
        # all dims of a block that no other block has: that is the block's own term
        self.views = [
            [v for v in own if count[v.key] > 1 or set(v.dims) != set(f.labelled)]
            for own, f in zip(views, forms, strict=True)
        ]
        self.count = count
        put, put_at, get, get_at = [], [], [], []
        for form, own in zip(forms, self.views, strict=True):
            for v in own:
                c, e = form.fold * in_channels, form.fold * out_channels
                put.append(nn.Parameter(torch.randn(messages, c) / math.sqrt(c * count[v.key])))
                get.append(nn.Parameter(torch.randn(e, messages) / math.sqrt(messages * len(own))))
                put_at.append(nn.Parameter(1 + torch.randn(messages, form.long) * (form.long > 1)))
                get_at.append(nn.Parameter(1 + torch.randn(e, form.long) * (form.long > 1)))
        self.put, self.put_at, self.get, self.get_at = map(nn.ParameterList, (put, put_at, get, get_at))

    def forward(self, blocks: list[Tensor]) -> list[Tensor]:
        """Blocks in the form's shape -> what they are told, in the same shape."""
        hubs: dict[tuple[object, ...], Tensor] = {}
        index = 0
        for form, own, x in zip(self.forms, self.views, blocks, strict=True):
            for v in own:
                message = self._put(index, form, v, x)
                hubs[v.key] = hubs[v.key] + message if v.key in hubs else message
                index += 1
        told, index = [], 0
        for form, own, x in zip(self.forms, self.views, blocks, strict=True):
            total = x.new_zeros(())
            for v in own:
                total = total + self._get(index, form, v, hubs[v.key])
                index += 1
            told.append(total)
        return told

    def _put(self, index: int, form: _Form, view: _View, x: Tensor) -> Tensor:
        """Mean over what is not kept, weighted along the long axis: ``[B, messages, *kept]``."""
        at = [form.labelled.index(i) for i in view.dims]
        drop = [k + 3 for k in range(len(form.labelled)) if k not in at]
        x = x.mean(drop) if drop else x
        kept = sorted(at)
        x = x.permute(0, 1, 2, *(kept.index(k) + 3 for k in at))
        weight = self.put[index].unsqueeze(-1) * self.put_at[index].unsqueeze(1)  # [m, c, long]
        return torch.einsum("bcq...,mcq->bm...", x, weight / form.long)

    def _get(self, index: int, form: _Form, view: _View, message: Tensor) -> Tensor:
        """A message laid along the dims that it has: ``[B, out, long, *labelled or 1]``."""
        weight = self.get[index].unsqueeze(1) * self.get_at[index].unsqueeze(-1)  # [e, long, m]
        y = torch.einsum("bm...,eqm->beq...", message, weight)
        at = [form.labelled.index(i) for i in view.dims]
        y = y.permute(0, 1, 2, *(at.index(k) + 3 for k in sorted(at)))
        sizes = [form.dims[i].size if k in at else 1 for k, i in enumerate(form.labelled)]
        return y.reshape(*y.shape[:3], *sizes)


class _PooledLinear(nn.Module):
    """The cheap flavour: every block's own linear map, and the hub."""

    def __init__(
        self, blocks: list[Dims], in_channels: int, out_channels: int, bias: bool, messages: int, fold: int
    ) -> None:
        super().__init__()
        self.forms = [_Form.of(d, fold) for d in blocks]
        self.hub = _Hub(self.forms, in_channels, out_channels, messages)
        self.own, self.bias = nn.ParameterList(), nn.ParameterList()
        for form in self.forms:
            c, e = form.fold * in_channels, form.fold * out_channels
            self.own.append(nn.Parameter(torch.randn(e, c) / math.sqrt(c)))
            if bias and not any(d.scale for d in form.dims):
                self.bias.append(nn.Parameter(torch.zeros(e, form.long, *(1 for _ in form.labelled))))
            else:
                self.bias.append(None)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        blocks = [form.fold_in(x) for form, x in zip(self.forms, inputs, strict=True)]
        outputs = []
        for form, x, own, bias, told in zip(self.forms, blocks, self.own, self.bias, self.hub(blocks), strict=True):
            y = torch.einsum("bc...,ec->be...", x, own) + told
            outputs.append(form.unfold(y if bias is None else y + bias))
        return outputs


class GeneralLinear(nn.Module):
    """An equivariant linear layer for any symmetry: ``layer(g . x) = g . layer(x)`` in every channel.

    Two flavours. By default every block (a tensor, or one of ``q|k|v``) is mapped to itself entry by entry and sends
    its means to hubs (one for the network, one per label, one for blocks with the same labels throughout), which
    answer all blocks that have the label: linear in the number of blocks, as in
    :mod:`learned_opt.rules.embedding`. Fixed axes of up to ``fold`` positions (kernels) are channels, as in the NP and
    HNP layers; longer ones share their weights but for a factor per position and channel in the means and in the
    answers. With ``exact=True``, all equivariant linear maps between all pairs of blocks
    (:mod:`learned_opt.nfn.equivariant_basis`): quadratically many, weights depend on every fixed index.

    Linear layers that respect scales exist only between blocks of one character, which is little (the Monomial
    layer). For the positive scales of a ReLU network wrap a permutation layer, or a whole stack, in
    :class:`Framed`.

    Args:
        symmetry: of the network whose weights are the features.
        in_channels: of the features.
        out_channels: of the result.
        exact: all equivariant maps instead of the cheap ones.
        scale: ``none``: permutations only. ``exact``: also all scales, linearly. ``sign``: also the signs of sign
            and real scales; with odd nonlinearities and :class:`Framed` for the magnitudes that is the whole group.
        bias: whether to add the equivariant constants (none exist where entries are scaled).
        messages: channels of the hubs; default ``out_channels``.
        fold: longest product of fixed axes that is taken as channels (cheap flavour).

    Shape:
        ``{name: [B, in_channels, *shape]}`` -> ``{name: [B, out_channels, *shape]}``, for the names of the symmetry.
    """

    def __init__(
        self,
        symmetry: Symmetry,
        in_channels: int,
        out_channels: int,
        *,
        exact: bool = False,
        scale: Respect = "none",
        bias: bool = True,
        messages: int | None = None,
        fold: int = 16,
    ) -> None:
        super().__init__()
        self.symmetry, self.in_channels, self.out_channels, self.exact = symmetry, in_channels, out_channels, exact
        by_name, kinds = block_dims(symmetry, scale)
        blocks = [dims for own in by_name.values() for dims in own]
        if exact:
            self.map: nn.Module = PartitionLinear(blocks, blocks, in_channels, out_channels, bias=bias, kinds=kinds)
        else:
            self.map = _PooledLinear(blocks, in_channels, out_channels, bias, messages or out_channels, fold)

    def forward(self, features: Mapping[str, Tensor]) -> Features:
        """See the class.

        Raises:
            SymmetryError: when the features are not of the symmetry, or have another number of channels.
        """
        blocks = split_blocks(self.symmetry, features)
        if blocks and blocks[0].shape[1] != self.in_channels:
            raise SymmetryError(f"features have {blocks[0].shape[1]} channels, the layer takes {self.in_channels}")
        return merge_blocks(self.symmetry, self.map(blocks))

    def extra_repr(self) -> str:
        """Channels and flavour."""
        return f"{self.in_channels}, {self.out_channels}, exact={self.exact}"


class GeneralPool(nn.Module):
    """Invariant pooling: per block and fixed index, mean and mean square over the permuted indices.

    Scale is not divided out: wrap in :class:`Framed` for networks that have it. The mean squares do not see signs,
    the means do; ``signed=False`` leaves them out.

    Attributes:
        features: the number of results per channel; ``out_features`` is that times the channels.

    Shape:
        ``{name: [B, channels, *shape]}`` -> ``[B, out_features]``.
    """

    def __init__(self, symmetry: Symmetry, channels: int, *, signed: bool = True) -> None:
        super().__init__()
        self.symmetry, self.signed = symmetry, signed
        self.blocks = [dims for own in block_dims(symmetry)[0].values() for dims in own]
        entries = sum(math.prod(d.size for d in dims if d.positional) for dims in self.blocks)
        self.features = entries * (2 if signed else 1)
        self.out_features = self.features * channels

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """See the class."""
        means = []
        for dims, x in zip(self.blocks, split_blocks(self.symmetry, features), strict=True):
            over = [i + LEAD for i, d in enumerate(dims) if not d.positional]
            for y in (x, x * x) if self.signed else (x * x,):
                means.append((y.mean(over) if over else y).flatten(1))
        return torch.cat(means, 1)


# ------------------------------------------------------------------------------------------ the frame
def frame_of(symmetry: Symmetry, weights: Mapping[str, Tensor]) -> Features:
    """The canonical scale of every entry of a batch of networks (:mod:`learned_opt.frame`).

    ``weights / s`` and ``gradient * s`` do not change when hidden units are rescaled by positive factors;
    ``s * anything invariant`` transforms like the weights.

    Args:
        symmetry: names the scales.
        weights: ``{name: [B, *shape]}``, all tensors of the symmetry.

    Returns:
        ``{name: [B, *shape]}``, positive.
    """
    names = tuple(symmetry.specs)

    def one(params: dict[str, Tensor]) -> dict[str, Tensor]:
        log_c = potentials(symmetry, params)
        layout = layout_of(symmetry, names, params[names[0]].device)
        stacks = []
        for x, stack in zip(layout.gather(params), layout.stacks, strict=True):
            s = scales(log_c, stack.row_scales, stack.col_scales)
            stacks.append(torch.ones_like(x) if s is None else s)
        return layout.scatter(stacks)

    return torch.func.vmap(one)({n: weights[n] for n in names})


class Framed(nn.Module):
    """Makes any permutation-equivariant module equivariant to positive scale: divide by the frame, multiply back.

    The frame is computed once, from the weights; the module (one layer or a whole stack) sees features that do not
    change under positive scales. Signs of sign and real scales are not touched: the module must respect them (layers
    with ``scale="sign"`` and odd functions) if that is wanted.

    Args:
        module: from features to features (then the result transforms like weights), or to a tensor (then invariant).
        symmetry: of the network.
        weights: the channel that holds the weights.
        gradients: channels that transform like gradients (momenta do too); they are multiplied by the frame.
        dual: features in the result transform like gradients instead of weights.
    """

    def __init__(
        self,
        module: nn.Module,
        symmetry: Symmetry,
        *,
        weights: int = 0,
        gradients: tuple[int, ...] = (),
        dual: bool = False,
    ) -> None:
        super().__init__()
        self.module, self.symmetry, self.weights, self.gradients = module, symmetry, weights, gradients
        self.dual = dual

    def forward(self, features: Mapping[str, Tensor]) -> Features | Tensor:
        """See the class."""
        check_features(self.symmetry, features)
        frame = frame_of(self.symmetry, {n: x[:, self.weights] for n, x in features.items()})
        frame = {n: s.unsqueeze(1) for n, s in frame.items()}
        result = self.module({n: self._canonical(x, frame[n]) for n, x in features.items()})
        if isinstance(result, Tensor):
            return result
        return {n: x / frame[n] if self.dual else x * frame[n] for n, x in result.items()}

    def _canonical(self, x: Tensor, s: Tensor) -> Tensor:
        power = torch.full((x.shape[1], *(1 for _ in x.shape[2:])), -1.0, dtype=x.dtype, device=x.device)
        power[list(self.gradients)] = 1.0
        return x * s**power

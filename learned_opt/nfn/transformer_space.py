"""The weight space of a transformer, and its group: permutations of heads, units and stream, GL within every head.

A head computes ``softmax(x W_Q (x W_K)^T / sqrt(d_k)) x W_V W_O`` from rows ``x``, so only ``W_Q W_K^T`` and
``W_V W_O`` matter: any invertible ``M``, ``N`` of every head change nothing in

    W_Q -> W_Q M^T,   W_K -> W_K M^-1,   W_V -> W_V N,   W_O -> N^-1 W_O

and heads may be permuted, as may the hidden units of ``relu(x W_A + b_A) W_B + b_B`` (Tran et al. 2024, Equivariant
Neural Functional Networks for Transformers). What may be done to the stream (the model's width) depends on the model:

* ``block``: no residual connection and no affine LayerNorm between attention and the feed-forward part of a block.
  Its width there is permuted in every block by itself. This is the paper's group, and the Small Transformer Zoo's.
* ``shared``: residual connections. One permutation of the stream for all blocks, embedding, norms and head.
* ``fixed``: residual connections, with something that ties the stream's positions, such as fixed sinusoidal
  positions that are added to it.

A biased projection is ``[x, 1] [W; b]``: the bias is one more row, which ``M`` and ``N`` move like the others.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from learned_opt.names import plain_name
from learned_opt.nfn.equivariant_basis import Dim, Dims
from learned_opt.symmetry import SymmetryError

Stream = Literal["block", "shared", "fixed"]
PROJECTIONS = ("q", "k", "v")
STREAM, HIDDEN, CLASSIFIER = "stream", "hidden", "classifier"


@dataclass(frozen=True)
class BlockNames:
    """Names in the state_dict of one block's tensors, stored as ``nn.Linear`` does (``[out, in]``).

    ``qkv`` is one fused tensor ``q|k|v``, or three.
    """

    qkv: tuple[str, ...]
    out: str
    fc1: str
    fc2: str


@dataclass(frozen=True)
class TransformerFeatures:
    """Features of a batch of transformers.

    Attributes:
        blocks: stacks over blocks: ``q, k`` ``[B, C, blocks, heads, rows, d_k]``, ``v`` ``[.., rows, d_v]``, ``o``
            ``[.., d_v, dim]``, ``a`` ``[B, C, blocks, dim, hidden]``, ``a_bias``, ``b`` ``[.., hidden, dim]``,
            ``b_bias``, and ``o_bias`` where projections have biases (then ``rows = dim + 1``, else ``dim``).
        rest: the other tensors by name, ``[B, C, *shape]``: embedding, norms, head.
    """

    blocks: dict[str, Tensor]
    rest: dict[str, Tensor]


@dataclass(frozen=True)
class TransformerElement:
    """A group element. Permutations hold the old index that moves to each new one, one row per block.

    Attributes:
        heads: ``[blocks, heads]``, applied after ``qk`` and ``vo``.
        qk: M, ``[blocks, heads, d_k, d_k]``.
        vo: N, ``[blocks, heads, d_v, d_v]``.
        hidden: ``[blocks, hidden]``.
        stream: ``[blocks, dim]``; for the shared stream all rows are one.
        classifier: ``[n]``, hidden units of the classifier (none: empty).
    """

    heads: Tensor
    qk: Tensor
    vo: Tensor
    hidden: Tensor
    stream: Tensor
    classifier: Tensor


@dataclass(frozen=True)
class TransformerSpec:
    """Sizes, names and group of a transformer.

    ``embedding`` and ``classifier`` give the dims of the tensors outside of the blocks: label ``stream`` where they
    move with it, ``classifier`` for the classifier's own hidden units, none where positions stay.
    """

    dim: int
    heads: int
    d_k: int
    d_v: int
    hidden: int
    names: tuple[BlockNames, ...]
    stream: Stream = "block"
    bias: bool = False
    embedding: Mapping[str, Dims] = field(default_factory=dict)
    classifier: Mapping[str, Dims] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stream not in ("block", "shared", "fixed"):
            raise SymmetryError(f"stream is {self.stream!r}; choose block (no residual), shared or fixed (residual)")
        if self.stream == "block" and self.bias:
            raise SymmetryError("projection biases are supported with stream='shared' or 'fixed'")

    @property
    def rest(self) -> dict[str, Dims]:
        """Tensors outside of the blocks."""
        return {**self.embedding, **self.classifier}

    # -- which dims are permuted together
    def width(self, where: Literal["in", "between", "out"]) -> Dim:
        """The stream as a block reads it, between attention and feed-forward, and as the block writes it."""
        label = STREAM if self.stream == "shared" or (self.stream, where) == ("block", "between") else None
        return Dim(self.dim, label)

    @property
    def rows(self) -> tuple[Dims, ...]:
        """The read side of a projection: the stream, and the bias."""
        return ((self.width("in"),), ()) if self.bias else ((self.width("in"),),)

    @property
    def feed_forward(self) -> dict[str, Dims]:
        """Dims of the tensors on which GL does not act."""
        units, middle, out = Dim(self.hidden, HIDDEN), self.width("between"), self.width("out")
        dims = {"a": (middle, units), "a_bias": (units,), "b": (units, out), "b_bias": (out,)}
        return {**dims, "o_bias": (middle,)} if self.bias else dims

    # -- from state_dicts and back
    def pack(
        self, features: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None = None
    ) -> TransformerFeatures:
        """Stacks of features ``{name: [B, C, *shape]}``; gradients (or momenta) become further channels.

        Raises:
            SymmetryError: when a tensor is missing or does not have the shape that the spec says; for gradients of
                a stream that is permuted block by block (see :meth:`swap`).
        """
        packed = self._pack(features)
        if gradients is None:
            return packed
        return concatenate(packed, self.swap(self._pack(gradients)))

    def _pack(self, features: Mapping[str, Tensor]) -> TransformerFeatures:
        stacks: dict[str, list[Tensor]] = {}
        for names in self.names:
            for key, x in self._block(names, features).items():
                stacks.setdefault(key, []).append(x)
        rest = {n: self._get(features, n, *(d.size for d in dims)) for n, dims in self.rest.items()}
        return TransformerFeatures({n: torch.stack(x, 2) for n, x in stacks.items()}, rest)

    def _block(self, names: BlockNames, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        widths = [self.heads * d for d in (self.d_k, self.d_k, self.d_v)]
        block = {}
        if len(names.qkv) == 1:
            (fused,) = names.qkv
            parts = self._rows(features, fused, sum(widths)).split(widths, -2)
        else:
            parts = tuple(self._rows(features, n, w) for n, w in zip(names.qkv, widths, strict=True))
        for key, part in zip(PROJECTIONS, parts, strict=True):
            block[key] = part.unflatten(-2, (self.heads, -1)).transpose(-1, -2)
        out = self._get(features, f"{names.out}.weight", self.dim, self.heads * self.d_v)
        block["o"] = out.transpose(-1, -2).unflatten(-2, (self.heads, -1))
        for key, name, shape in (("a", names.fc1, (self.hidden, self.dim)), ("b", names.fc2, (self.dim, self.hidden))):
            block[key] = self._get(features, f"{name}.weight", *shape).transpose(-1, -2)
            block[f"{key}_bias"] = self._get(features, f"{name}.bias", shape[0])
        if self.bias:
            block["o_bias"] = self._get(features, f"{names.out}.bias", self.dim)
        return block

    def _rows(self, features: Mapping[str, Tensor], name: str, width: int) -> Tensor:
        """``[B, C, width, dim (+ 1)]``: weight and, behind it, bias."""
        weight = self._get(features, f"{name}.weight", width, self.dim)
        if not self.bias:
            return weight
        return torch.cat([weight, self._get(features, f"{name}.bias", width).unsqueeze(-1)], -1)

    @staticmethod
    def _get(features: Mapping[str, Tensor], name: str, *shape: int) -> Tensor:
        x = features.get(name)
        if x is None or tuple(x.shape[2:]) != shape:
            found = "is missing" if x is None else f"has shape {tuple(x.shape)}"
            raise SymmetryError(
                f"{name} {found}; expected [batch, channels, {', '.join(map(str, shape))}]. Make the spec from one of "
                "these state_dicts, and one batch per architecture."
            )
        return x

    def unpack(self, features: TransformerFeatures) -> dict[str, Tensor]:
        """Inverse of :meth:`pack` (of weights): ``{name: [B, C, *shape]}``."""
        state = dict(features.rest)
        for i, names in enumerate(self.names):
            x = {n: t[:, :, i] for n, t in features.blocks.items()}
            parts = [x[n].transpose(-1, -2).flatten(-3, -2) for n in PROJECTIONS]  # [B, C, heads * d, rows]
            if len(names.qkv) == 1:
                parts = [torch.cat(parts, -2)]
            for name, part in zip(names.qkv, parts, strict=True):
                state[f"{name}.weight"] = part[..., : self.dim]
                if self.bias:
                    state[f"{name}.bias"] = part[..., -1]
            state[f"{names.out}.weight"] = x["o"].flatten(-3, -2).transpose(-1, -2)
            if self.bias:
                state[f"{names.out}.bias"] = x["o_bias"]
            for key, name in (("a", names.fc1), ("b", names.fc2)):
                state[f"{name}.weight"], state[f"{name}.bias"] = x[key].transpose(-1, -2), x[f"{key}_bias"]
        return state

    def swap(self, gradients: TransformerFeatures) -> TransformerFeatures:
        """Gradients in the slots in which they transform like weights.

        Under GL a gradient transforms by the inverse transpose: ``G_Q -> G_Q M^-1``, ``G_K -> G_K M^T``,
        ``G_V -> G_V N^-T``, ``G_O -> N^T G_O``. So ``(G_K, G_Q, G_O^T, G_V^T)`` transforms exactly like
        ``(W_Q, W_K, W_V, W_O)``; permutations are their own contragredient. The gradient of a value bias has no
        partner in ``G_O`` and is left out (a row of zeros stands for it).

        Raises:
            SymmetryError: for ``stream="block"``, where the columns of ``W_O`` are permuted and the rows of ``W_V``
                are not, so neither can stand in the other's slot.
        """
        if self.stream == "block":
            raise SymmetryError(
                "gradients cannot be channels where each block permutes its own stream (stream='block'): the swapped "
                "G_O and G_V are permuted on the wrong side. Use stream='fixed' or 'shared' (a residual network), or "
                "'fixed' for a smaller group."
            )
        x = gradients.blocks
        v, o = x["o"].transpose(-1, -2), x["v"][..., : self.dim, :].transpose(-1, -2)
        if self.bias:
            v = torch.cat([v, torch.zeros_like(v[..., :1, :])], -2)
        return TransformerFeatures({**x, "q": x["k"], "k": x["q"], "v": v, "o": o}, gradients.rest)

    # -- the group
    def sample(
        self,
        generator: torch.Generator | None = None,
        *,
        condition: float = 100.0,
        dtype: torch.dtype = torch.float64,
    ) -> TransformerElement:
        """A random group element; M and N have singular values log-uniform in ``condition ** [-1/2, 1/2]``."""
        depth = len(self.names)

        def permutations(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator).argsort(-1)

        def invertible(d: int) -> Tensor:
            u, v = (
                torch.linalg.qr(torch.randn(depth, self.heads, d, d, generator=generator, dtype=dtype))[0]
                for _ in range(2)
            )
            power = torch.rand(depth, self.heads, d, generator=generator, dtype=dtype) - 0.5
            return (u * torch.exp(math.log(condition) * power).unsqueeze(-2)) @ v

        stream = permutations(depth, self.dim)
        if self.stream == "shared":
            stream = stream[:1].expand(depth, -1)
        if self.stream == "fixed":
            stream = torch.arange(self.dim).expand(depth, -1)
        return TransformerElement(
            permutations(depth, self.heads),
            invertible(self.d_k),
            invertible(self.d_v),
            permutations(depth, self.hidden),
            stream,
            permutations(next((d.size for dims in self.rest.values() for d in dims if d.label == CLASSIFIER), 0)),
        )

    def act(self, g: TransformerElement, features: TransformerFeatures, *, dual: bool = False) -> TransformerFeatures:
        """``g . features``, alike in every network and channel; ``dual``: as gradients transform."""
        m, n = g.qk.to(features.blocks["q"]), g.vo.to(features.blocks["v"])
        if dual:
            m, n = (torch.linalg.inv(x).transpose(-1, -2) for x in (m, n))
        x = dict(features.blocks)
        x["q"], x["k"] = x["q"] @ m.transpose(-1, -2), torch.linalg.solve(m, x["k"], left=False)
        x["v"], x["o"] = x["v"] @ n, torch.linalg.solve(n, x["o"])
        for key in (*PROJECTIONS, "o"):
            x[key] = _take(x[key], g.heads, 3)
        x["a"], x["a_bias"], x["b"] = (_take(x[k], g.hidden, d) for k, d in (("a", 4), ("a_bias", 3), ("b", 3)))
        x["o"], x["a"] = _take(x["o"], g.stream, 5), _take(x["a"], g.stream, 3)
        if self.bias:
            x["o_bias"] = _take(x["o_bias"], g.stream, 3)
        if self.stream == "shared":
            rows = torch.cat([g.stream, torch.full((len(g.stream), 1), self.dim)], 1) if self.bias else g.stream
            for key, index, at in (*((k, rows, 4) for k in PROJECTIONS), ("b", g.stream, 4), ("b_bias", g.stream, 3)):
                x[key] = _take(x[key], index, at)
        moves = {STREAM: g.stream[0] if len(g.stream) else g.stream, CLASSIFIER: g.classifier}
        rest = {}
        for name, tensor in features.rest.items():
            for i, dim in enumerate(self.rest[name]):
                if dim.label is not None:
                    tensor = tensor.index_select(i + 2, moves[dim.label].to(tensor.device))
            rest[name] = tensor
        return TransformerFeatures(x, rest)


def _take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Permute dimension ``dim`` of ``[B, C, blocks, ...]`` by ``index[block]``."""
    return torch.stack([x[:, :, i].index_select(dim - 1, p.to(x.device)) for i, p in enumerate(index)], 2)


def concatenate(*features: TransformerFeatures) -> TransformerFeatures:
    """The channels of several features side by side."""
    first = features[0]
    return TransformerFeatures(
        {n: torch.cat([f.blocks[n] for f in features], 1) for n in first.blocks},
        {n: torch.cat([f.rest[n] for f in features], 1) for n in first.rest},
    )


# ------------------------------------------------------------------------------------- known formats
def zoo_spec(state: Mapping[str, Tensor], heads: int = 2, stream: Stream = "block") -> TransformerSpec:
    """The spec of a network of the Small Transformer Zoo from its state_dict.

    Names: ``encoder.N.attention.{queries,keys,values,out_projection}.weight``, ``encoder.N.{fc1,fc2}``,
    ``classifier.{fc1,fc2}`` and, for images, ``embedding.conv1``. Frozen tables (``embedding.pos_embedding``, word
    vectors) are alike in all networks and are left out.

    Args:
        state: of one network, without batch; wrappers' prefixes are left out of the names.
        heads: number of heads; the zoo's networks have 2.
        stream: ``block`` for the published networks, which have no residual connections; their positions are fixed
            sinusoids, so with residual connections it is ``fixed``.
    """
    state = {plain_name(n): x for n, x in state.items()}
    _need(state, "encoder.0.attention.queries.weight", "encoder.0.fc1.weight", "classifier.fc1.weight")
    names = tuple(
        BlockNames(
            tuple(f"encoder.{i}.attention.{n}" for n in ("queries", "keys", "values")),
            f"encoder.{i}.attention.out_projection",
            f"encoder.{i}.fc1",
            f"encoder.{i}.fc2",
        )
        for i in _indices(state, r"encoder\.(\d+)\.")
    )
    hidden, dim = state["encoder.0.fc1.weight"].shape
    width = Dim(dim, STREAM if stream == "shared" else None)
    units = Dim(state["classifier.fc1.weight"].shape[0], CLASSIFIER)
    out = Dim(state["classifier.fc2.bias"].shape[0])
    embedding: dict[str, Dims] = {}
    if "embedding.conv1.weight" in state:
        patch = tuple(Dim(n) for n in state["embedding.conv1.weight"].shape[1:])
        embedding = {"embedding.conv1.weight": (width, *patch), "embedding.conv1.bias": (width,)}
    d_k, d_v = (state[f"encoder.0.attention.{n}.weight"].shape[0] // heads for n in ("queries", "values"))
    return TransformerSpec(
        dim,
        heads,
        d_k,
        d_v,
        hidden,
        names,
        stream,
        embedding=embedding,
        classifier={
            "classifier.fc1.weight": (units, width),
            "classifier.fc1.bias": (units,),
            "classifier.fc2.weight": (out, units),
            "classifier.fc2.bias": (out,),
        },
    )


def task_spec(state: Mapping[str, Tensor], heads: int) -> TransformerSpec:
    """The spec of a ``tasks.transformer.Transformer`` (pre-norm, residual, learned positions): the shared stream.

    Names: ``blocks.N.attn.qkv`` (or ``q``, ``k``, ``v``) and ``proj``, ``blocks.N.{ln1,ln2,fc1,fc2}``, ``embed``,
    ``pos``, ``ln_f``, ``head``, projections biased.
    """
    state = {plain_name(n): x for n, x in state.items()}
    _need(state, "blocks.0.attn.proj.bias", "blocks.0.fc1.weight", "embed.weight", "head.weight", "pos")
    fused = "blocks.0.attn.qkv.weight" in state
    depth = _indices(state, r"blocks\.(\d+)\.")
    names = tuple(
        BlockNames(
            tuple(f"blocks.{i}.attn.{n}" for n in (("qkv",) if fused else PROJECTIONS)),
            f"blocks.{i}.attn.proj",
            f"blocks.{i}.fc1",
            f"blocks.{i}.fc2",
        )
        for i in depth
    )
    hidden, dim = state["blocks.0.fc1.weight"].shape
    width = Dim(dim, STREAM)
    plain = lambda x: tuple(Dim(n) for n in x)  # noqa: E731
    embed = state["embed.weight"].shape
    embedding: dict[str, Dims] = {"pos": (*plain(state["pos"].shape[:-1]), width)}
    if "embed.bias" in state:  # a linear map of patches; else a table of tokens
        embedding |= {"embed.weight": (width, *plain(embed[1:])), "embed.bias": (width,)}
    else:
        embedding["embed.weight"] = (*plain(embed[:-1]), width)
    norms = [f"blocks.{i}.{n}" for i in depth for n in ("ln1", "ln2")] + ["ln_f"]
    embedding |= {f"{n}.{p}": (width,) for n in norms for p in ("weight", "bias")}
    classes = Dim(state["head.weight"].shape[0])
    each = state["blocks.0.attn.proj.weight"].shape[1] // heads
    return TransformerSpec(
        dim,
        heads,
        each,
        each,
        hidden,
        names,
        "shared",
        True,
        embedding=embedding,
        classifier={"head.weight": (classes, width), "head.bias": (classes,)},
    )


def _indices(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    return sorted({int(m[1]) for m in (re.match(pattern, n) for n in state) if m})


def _need(state: Mapping[str, Tensor], *names: str) -> None:
    missing = [n for n in names if n not in state]
    if missing:
        raise SymmetryError(f"no {', '.join(missing)} in the state_dict: it is not of this format. Has: {[*state][:4]}")

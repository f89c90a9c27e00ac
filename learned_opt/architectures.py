"""The symmetry of models of a known kind, written down layer by layer.

Every function here reads the modules of a model, never runs it, and claims only what holds for any
input: what it does not know keeps its axes fixed. ``Symmetry.check`` confirms a result numerically.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

from torch import Tensor, nn

from learned_opt.symmetry import (
    Axis,
    Kind,
    Label,
    Leaf,
    Prod,
    Role,
    Scale,
    Spec,
    Sum,
    Symmetry,
    SymmetryError,
    independent,
)

logger = logging.getLogger(__name__)

# ------------------------------------------- what an activation lets through, by its exact type
_Kinds = frozenset[Literal["positive", "sign"]]
ANY: _Kinds = frozenset({"positive", "sign"})  # linear: f(d x) = d f(x) for every d
POSITIVE: _Kinds = frozenset({"positive"})  # f(d x) = d f(x) for d > 0
SIGN: _Kinds = frozenset({"sign"})  # odd: f(-x) = -f(x)
NONE: _Kinds = frozenset()  # elementwise, or alike for all units (softmax): permutations only

_ACTIVATIONS: dict[type[nn.Module], _Kinds] = {
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), ANY),
    **dict.fromkeys((nn.ReLU, nn.LeakyReLU), POSITIVE),
    **dict.fromkeys((nn.Tanh, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink), SIGN),
    **dict.fromkeys((nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.Hardswish), NONE),
    **dict.fromkeys((nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.Softplus, nn.ReLU6), NONE),
    **dict.fromkeys((nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d, nn.AlphaDropout), NONE),
}
_POOLS: dict[type[nn.Module], tuple[int, _Kinds]] = {  # -> spatial dimensions, kinds
    **{t: (1, POSITIVE) for t in (nn.MaxPool1d, nn.AdaptiveMaxPool1d)},
    **{t: (2, POSITIVE) for t in (nn.MaxPool2d, nn.AdaptiveMaxPool2d)},
    **{t: (1, ANY) for t in (nn.AvgPool1d, nn.AdaptiveAvgPool1d)},
    **{t: (2, ANY) for t in (nn.AvgPool2d, nn.AdaptiveAvgPool2d)},
}
_CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2}
_KERNEL: tuple[Role, ...] = ("kernel", "kernel")
_NORMS = {nn.BatchNorm1d: (0, 1), nn.BatchNorm2d: (2,), nn.LayerNorm: (0,)}  # -> spatial dimensions


def _kinds(module: nn.Module) -> _Kinds | None:
    """What an elementwise module lets through; None if it is not known to be elementwise."""
    if type(module) is nn.Hardtanh:
        return SIGN if module.min_val == -module.max_val else NONE
    if type(module) is nn.PReLU and module.num_parameters == 1:
        return POSITIVE
    if type(module).__name__ == "Sin" and not list(module.parameters()):
        return SIGN
    return _ACTIVATIONS.get(type(module))


# --------------------------------------------------------- a symmetry while it is being written
def _read(leaf: Leaf) -> Leaf:
    """The leaf on the side that reads it: exponents negated."""
    return replace(leaf, scale=tuple((name, -exponent) for name, exponent in leaf.scale))


def _leaves(axis: Axis) -> Iterator[Leaf]:
    if isinstance(axis, Leaf):
        yield axis
    else:
        for a in axis.factors if isinstance(axis, Prod) else axis.parts:
            yield from _leaves(a)


class _Draft:
    """Specs whose labels may still become fixed and whose scales may still lose kinds."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())  # each tensor under its first name
        self.uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        self.uses.update(id(b) for _, b in model.named_buffers(remove_duplicate=False))
        self.names = {*self.parameters, *dict(model.named_buffers())}
        self.specs: dict[str, Spec] = {}
        self.labels: dict[str, Label] = {}
        self.scales: dict[str, Scale] = {}
        self.kinds: dict[str, _Kinds] = {}
        self.fixed: set[str] = set()

    def label(self, name: str, size: int, over: str | None = None) -> Leaf:
        """New units, permuted together (separately for every index of the label ``over``)."""
        self.labels[name] = Label(size, () if over is None else (over,))
        return Leaf(size, name)

    def scaled(self, leaf: Leaf, name: str) -> Leaf:
        """The same units, written anew: any earlier scale has been read, a new one begins."""
        self.scales[name] = Scale("real", leaf.size, leaf.label)
        self.kinds[name] = ANY
        return replace(leaf, scale=((name, 1),))

    def restrict(self, leaf: Leaf, kinds: _Kinds) -> None:
        """Keep only these kinds of the leaf's scales."""
        for name, _ in leaf.scale:
            self.kinds[name] &= kinds

    def fix(self, leaf: Leaf) -> None:
        """Neither permute nor scale these units."""
        self.restrict(leaf, NONE)
        if leaf.label is not None:
            self.fixed.add(leaf.label)

    def put(self, name: str, tensor: Tensor | None, axes: Sequence[Axis], roles: Sequence[Role]) -> None:
        """Describe a tensor (None: there is none); one that is used twice stays fixed."""
        if tensor is None:
            return
        if self.uses[id(tensor)] > 1:
            for leaf in (leaf for axis in axes for leaf in _leaves(axis)):
                self.fix(leaf)
        if name in self.names:
            self.specs[name] = Spec(tuple(axes), tuple(roles))

    def affine(
        self,
        name: str,
        module: Any,
        axes: Sequence[Axis],
        roles: Sequence[Role] = ("out", "in"),
    ) -> None:
        """A linear map or convolution; its bias has the axis with role ``out``."""
        roles = (*roles, *_KERNEL[: module.weight.ndim - 2])
        axes = (*axes, *(Leaf(k) for k in module.weight.shape[2:]))
        self.put(f"{name}.weight", module.weight, axes, roles)
        self.put(f"{name}.bias", module.bias, (axes[roles.index("out")],), ("out",))

    def norm(self, name: str, module: Any, leaf: Leaf) -> Leaf:
        """A normalisation keeps the permutation and ends the scale; gain and bias start another."""
        self.restrict(leaf, NONE)
        plain = Leaf(leaf.size, leaf.label)
        for stat in ("running_mean", "running_var"):
            self.put(f"{name}.{stat}", getattr(module, stat, None), (plain,), ("out",))
        if module.weight is None:
            return plain
        leaf = self.scaled(plain, name)
        self.put(f"{name}.weight", module.weight, (leaf,), ("gain",))
        self.put(f"{name}.bias", module.bias, (leaf,), ("out",))
        return leaf

    def finish(self) -> Symmetry:
        """The symmetry, with every parameter not yet described fixed."""
        fixed = {n for n, g in self.labels.items() if self.fixed & {n, *g.over}}
        labels = {n: g for n, g in self.labels.items() if n not in fixed}
        scales = {}
        for name, scale in self.scales.items():
            per_fibre = scale.label in fixed and self.labels[scale.label].over
            if self.kinds[name] and not per_fibre:
                kind: Kind = "real" if self.kinds[name] == ANY else next(iter(self.kinds[name]))
                scales[name] = Scale(kind, scale.size, None if scale.label in fixed else scale.label)

        def settle(axis: Axis) -> Axis:
            if isinstance(axis, Prod):
                return Prod(tuple(settle(a) for a in axis.factors))
            if isinstance(axis, Sum):
                return Sum(tuple(settle(a) for a in axis.parts))
            label = None if axis.label in fixed else axis.label
            return Leaf(axis.size, label, tuple(s for s in axis.scale if s[0] in scales))

        specs = {n: Spec(tuple(map(settle, s.axes)), s.roles) for n, s in self.specs.items()}
        for name, p in self.parameters.items():
            if name not in specs:
                roles: tuple[Role, ...] = (("out", "in") + ("kernel",) * p.ndim)[: p.ndim]
                specs[name] = Spec(tuple(Leaf(n) for n in p.shape), roles)
        symmetry = Symmetry(specs, labels, scales)
        symmetry.validate(self.parameters)
        return symmetry


# ----------------------------------------------------------------------------------------- chains
@dataclass(frozen=True)
class _Units:
    """Units that a chain carries, the number of dimensions after them, and how flattened."""

    leaf: Leaf
    space: int | None = None
    flat: Literal["no", "before space", "after positions"] = "no"

    def axis(self, size: int, space: int) -> Axis | None:
        """The axis of a layer that reads ``size`` inputs; None where it reads other than units."""
        leaf, rest = _read(self.leaf), size // self.leaf.size
        if self.space != space or size != rest * self.leaf.size:
            return None
        if rest == 1:
            return leaf
        order = {"before space": (leaf, Leaf(rest)), "after positions": (Leaf(rest), leaf)}
        return Prod(order[self.flat]) if self.flat in order else None


def _chain(model: Any, prefix: str = "") -> Iterable[tuple[str, nn.Module]]:
    """Modules in the order in which they run (one that occurs twice is named twice)."""
    for key, module in model._modules.items():
        if _is_chain(module):
            yield from _chain(module, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", module


def _is_chain(module: nn.Module) -> TypeGuard[nn.Sequential]:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def sequential(model: nn.Sequential) -> Symmetry:
    """Symmetry of an MLP or a CNN: linear, convolutions, norms, activations, pooling, flattening.

    Inputs are ``[batch, features]``, ``[batch, positions, features]`` (no BatchNorm1d) or
    ``[batch, channels, *space]``. Input and output units are fixed, and so is whatever meets an
    unknown module, a grouped (not depthwise) convolution or a weight that is used twice. A
    normalisation of the raw input has no scale.

    Args:
        model: an ``nn.Sequential``; nested ones are followed.

    Returns:
        Specs for every name of ``model.named_parameters()``, and for BatchNorm's statistics.
    """
    draft = _Draft(model)
    units = _Units(Leaf(1))
    for name, module in _chain(model):
        units = _step(draft, units, name, module)
    draft.fix(units.leaf)
    return draft.finish()


def _step(draft: _Draft, units: _Units, name: str, module: Any) -> _Units:
    """One module of a chain: describe its tensors, return the units that it hands on."""
    kind, own = type(module), {n for n, p in module._parameters.items() if p is not None}
    if kind is nn.Linear and "weight" in own:
        axis = _reading(draft, units, module.in_features, 0)
        leaf = draft.scaled(draft.label(name, module.out_features), name)
        draft.affine(name, module, (leaf, axis))
        return _Units(leaf, 0)
    if kind in _CONVOLUTIONS and "weight" in own:
        return _convolve(draft, units, name, module)
    if kind is nn.Embedding and module.max_norm is None and "weight" in own:
        leaf = draft.scaled(draft.label(name, module.embedding_dim), name)
        draft.put(f"{name}.weight", module.weight, (Leaf(module.num_embeddings), leaf), ("lookup", "out"))
        return _Units(leaf, 0)
    if kind in _NORMS and units.space in _NORMS[kind]:
        shape = module.normalized_shape if kind is nn.LayerNorm else (module.num_features,)
        if tuple(shape) == (units.leaf.size,):
            return replace(units, leaf=draft.norm(name, module, units.leaf))
    if kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1) and units.space is not None:
        if units.flat != "no":
            return units
        return replace(units, space=0, flat="before space" if units.space else "after positions")
    passes, space = _POOLS.get(kind, (units.space, _kinds(module)))[::-1]
    if passes is not None and space == units.space:
        draft.restrict(units.leaf, passes)
        return units
    draft.fix(units.leaf)  # unknown, or working on another axis than the units'
    return _Units(Leaf(1))


def _reading(draft: _Draft, units: _Units, size: int, space: int) -> Axis:
    """The axis by which a layer reads the units; if it reads another one, they are fixed."""
    axis = units.axis(size, space)
    if axis is None:
        draft.fix(units.leaf)
    return axis or Leaf(size)


def _convolve(draft: _Draft, units: _Units, name: str, module: Any) -> _Units:
    space, channels = _CONVOLUTIONS[type(module)], (module.in_channels, module.out_channels)
    if module.groups == 1:
        axis = _reading(draft, units, module.in_channels, space)
        leaf = draft.scaled(draft.label(name, module.out_channels), name)
        if module.transposed:
            draft.affine(name, module, (axis, leaf), ("in", "out"))
        else:
            draft.affine(name, module, (leaf, axis))
        return _Units(leaf, space)
    if not module.transposed and channels == (module.groups,) * 2:
        axis = _reading(draft, units, module.in_channels, space)
        if isinstance(axis, Leaf):  # depthwise: a channel reads itself
            leaf = draft.scaled(Leaf(axis.size, axis.label), name)
            both = replace(leaf, scale=leaf.scale + axis.scale)
            rest = [Leaf(n) for n in module.weight.shape[1:]]
            roles: list[Role] = ["out", "in", *_KERNEL[:space]]
            draft.put(f"{name}.weight", module.weight, (both, *rest), roles)
            draft.put(f"{name}.bias", module.bias, (leaf,), ("out",))
            return _Units(leaf, space)
    draft.fix(units.leaf)
    return _Units(Leaf(1))


# ----------------------------------------------------------------------------------- transformers
def transformer(model: Any) -> Symmetry:
    """Symmetry of a pre-norm transformer with learned or fixed additive positions.

    The model has ``blocks`` of ``ln1``, ``attn`` (``heads``; ``qkv`` or ``q, k, v``; ``proj``),
    ``ln2, fc1, act, fc2``, then ``ln_f`` and ``head``. ``embed`` (Embedding, Linear or convolution)
    and ``pos`` write the residual stream; a class token may be named ``cls``, ``cls_token`` or
    ``class_token``. Attention is plain: as many key and value heads as query heads, and nothing
    between the projections and the product of queries and keys.

    Returns:
        One permutation of the stream; per block one of the heads, one per head of the query-key
        axis and one of the value-output axis (both with real scale), and one of the hidden axis
        (scale by the activation). The gain and bias of every LayerNorm have a real scale that the
        next layers read; not the last if ``head`` is tied to ``embed``.

    Raises:
        SymmetryError: where a part is missing or has another form, or a parameter has no place.
    """
    _need(model, "blocks", "ln_f", "head", "embed", "pos")
    draft = _Draft(model)
    stream = draft.label("stream", model.ln_f.normalized_shape[-1])
    tied = getattr(model.embed, "weight", None) is model.head.weight
    if tied:
        draft.uses[id(model.head.weight)] -= 1
    _embed(draft, model, stream)
    for i, block in enumerate(model.blocks):
        _need(block, "ln1", "attn", "ln2", "fc1", "act", "fc2")
        _block(draft, f"blocks.{i}", block, stream)
    final = _layer_norm(draft, "ln_f", model.ln_f, stream)
    if tied:
        draft.restrict(final, NONE)
        draft.put("head.bias", model.head.bias, (Leaf(model.head.out_features),), ("out",))
    else:
        draft.affine("head", model.head, (Leaf(model.head.out_features), _read(final)))
    _complete(draft)
    return draft.finish()


def _need(module: nn.Module, *attributes: str) -> None:
    missing = [a for a in attributes if not hasattr(module, a)]
    if missing:
        raise SymmetryError(
            f"{type(module).__name__} has no {', '.join(missing)}: it is not the transformer "
            "that architectures.transformer knows. Pass symmetry=learned_opt.independent(params)."
        )


def _complete(draft: _Draft) -> None:
    unknown = [n for n in draft.parameters if n not in draft.specs]
    if unknown:
        raise SymmetryError(
            f"{', '.join(unknown[:5])}: parameters with no place in the transformer that "
            "architectures.transformer knows. Pass symmetry=learned_opt.independent(params)."
        )


def _embed(draft: _Draft, model: Any, stream: Leaf) -> None:
    tables = {"embed": model.embed, "pos": model.pos}
    tables |= {n: p for n, p in model._parameters.items() if n in ("cls", "cls_token", "class_token")}
    for name, table in tables.items():
        if isinstance(table, nn.Embedding):
            name, table = f"{name}.weight", table.weight
        if type(table) in (nn.Linear, nn.Conv1d, nn.Conv2d):
            draft.affine(name, table, (stream, Leaf(table.weight.shape[1])))
        elif isinstance(table, nn.Parameter):
            rest = [Leaf(n) for n in table.shape[:-1]]
            lookup: list[Role] = ["lookup"] * len(rest)
            draft.put(name, table, (*rest, stream), (*lookup, "out"))
        else:  # constant positions, say: what they are added to cannot be permuted
            draft.fix(stream)


def _layer_norm(draft: _Draft, name: str, module: Any, stream: Leaf) -> Leaf:
    if type(module) is not nn.LayerNorm or tuple(module.normalized_shape) != (stream.size,):
        raise SymmetryError(f"{name} is {module}, not LayerNorm(({stream.size},))")
    return draft.norm(name, module, stream)


def _block(draft: _Draft, name: str, block: Any, stream: Leaf) -> None:
    # x + proj(attention(ln1(x)))
    read = _read(_layer_norm(draft, f"{name}.ln1", block.ln1, stream))
    attn, at = block.attn, f"{name}.attn"
    layers = [attn.qkv] if hasattr(attn, "qkv") else [attn.q, attn.k, attn.v]
    inner = attn.proj.in_features
    if sum(layer.out_features for layer in layers) != 3 * inner or inner % attn.heads:
        widths = [layer.out_features for layer in layers]
        raise SymmetryError(f"{at}: widths {widths} are not q, k, v of {attn.heads} heads and {inner} in all")
    heads = draft.label(f"{name}.heads", attn.heads)
    qk, vo = (draft.scaled(draft.label(n, inner // attn.heads, heads.label), n) for n in (f"{name}.qk", f"{name}.vo"))
    # q.k does not change when k scales inversely to q
    q, k, v = (Prod((heads, leaf)) for leaf in (qk, _read(qk), vo))
    if len(layers) == 1:
        draft.affine(f"{at}.qkv", attn.qkv, (Sum((q, k, v)), read))
    else:
        for n, layer, axis in zip("qkv", layers, (q, k, v), strict=True):
            draft.affine(f"{at}.{n}", layer, (axis, read))
    draft.affine(f"{at}.proj", attn.proj, (stream, Prod((heads, _read(vo)))))
    # x + fc2(act(fc1(ln2(x))))
    read = _read(_layer_norm(draft, f"{name}.ln2", block.ln2, stream))
    hidden = draft.scaled(draft.label(f"{name}.ff", block.fc1.out_features), f"{name}.ff")
    draft.affine(f"{name}.fc1", block.fc1, (hidden, read))
    passes = _kinds(block.act)
    if passes is None:
        draft.fix(hidden)
    else:
        draft.restrict(hidden, passes)
    draft.affine(f"{name}.fc2", block.fc2, (stream, _read(hidden)))


# -------------------------------------------------------------------------------------- any model
_WRAPPERS = ("net", "model", "module", "_orig_mod")


def from_model(model: nn.Module) -> Symmetry:
    """Symmetry of a chain, of a transformer, of either in a plain wrapper; else independent axes.

    A wrapper has no parameters of its own and one child: net, model, module or _orig_mod.
    Nothing is run; ``from_model(model).check(model, x)`` confirms the result.

    Args:
        model: any module.

    Returns:
        Specs under the names of ``model.named_parameters()``.
    """
    children = list(model.named_children())
    if len(children) == 1 and children[0][0] in _WRAPPERS and not model._parameters:
        ((name, child),) = children
        inner = from_model(child)
        return Symmetry(_prefixed(inner.specs, name), inner.labels, inner.scales)
    reason = "it is neither an nn.Sequential nor a transformer with blocks, ln_f and head"
    try:
        if _is_chain(model):
            return sequential(model)
        if all(hasattr(model, a) for a in ("blocks", "ln_f", "head")):
            return transformer(model)
    except SymmetryError as error:
        reason = str(error)
    logger.info("%s: every axis taken as independent, because %s", type(model).__name__, reason)
    return independent(dict(model.named_parameters()))


def _prefixed(specs: Mapping[str, Spec], prefix: str) -> dict[str, Spec]:
    return {f"{prefix}.{name}": spec for name, spec in specs.items()}

"""The numeric check: does the exported graph's function stay the same under the group that is claimed?

It runs the graph, not the model, so that it can compute in float64 throughout (casts to float32 inside of a model are
widened) and without dropout, at random weights: initial ones hide errors behind zero biases and unit gains.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate, map_arg
from torch.utils import _pytree as pytree

from learned_opt.symmetry.axes import Leaf, map_leaves
from learned_opt.symmetry.group import Element, Symmetry, randomised
from learned_opt.symmetry.infer.network import Network, has_data, operator_name
from learned_opt.symmetry.labels import Spec

TOLERANCE = 1e-9
_DROPOUTS = ("dropout", "dropout_", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
Weights = Mapping[str, Tensor]


class Function:
    """``outputs = function(tensors)``: an exported network in float64, without dropout, at its example inputs."""

    def __init__(self, network: Network) -> None:
        self.network = network
        signature = network.program.graph_signature
        specs = {s.arg.name: s for s in signature.input_specs if hasattr(s.arg, "name")}
        # numbers and None have placeholders too, and `signature.user_inputs` has their values instead of their names
        inputs = [s.arg.name for s in signature.input_specs if s.kind == InputKind.USER_INPUT]
        given = dict(zip(inputs, pytree.tree_leaves(network.program.example_inputs), strict=True))
        self.held: dict[str, Any] = {}
        for node in network.graph.graph.nodes:
            if node.op != "placeholder" or isinstance(network.placeholders[node.name], str):
                continue
            if node.name in given:
                self.held[node.name] = _wide(given[node.name])
            else:
                self.held[node.name] = _wide(_constant(network, node.name, specs))

    def __call__(self, tensors: Weights) -> list[Tensor]:
        """The network's outputs: numbers, indices and masks (complex ones are left out)."""
        env: dict[Node, Any] = {}
        for node in self.network.graph.graph.nodes:
            if node.op == "placeholder":
                name = self.network.placeholders[node.name]
                held = tensors[name] if isinstance(name, str) else self.held[node.name]
                env[node] = _fresh(held)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the same noise every time, if the network draws any
            result = _run(self.network.graph, env)
        specs = self.network.program.graph_signature.output_specs
        counted = [r for r, s in zip(result, specs, strict=True) if s.kind == OutputKind.USER_OUTPUT]
        return [r.double() for r in counted if isinstance(r, Tensor) and not r.is_complex()]


def _constant(network: Network, name: str, specs: Mapping[str, Any]) -> Any:
    held = network.placeholders[name]
    if held is None:  # written to by the graph: its present value, from a copy
        target = specs[name].target
        for source in (network.program.constants, network.program.state_dict):
            if target in source:
                return source[target]
    return held


def _fresh(held: Any) -> Any:
    """What a run may write into, or draw from."""
    if isinstance(held, torch.Generator):
        return torch.Generator().manual_seed(0)
    return held.clone() if isinstance(held, Tensor) else held


def _run(graph: GraphModule, env: dict[Node, Any]) -> list[Any]:
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            env[node] = getattr(graph, node.target)
            env[node] = _wide(env[node].detach()) if isinstance(env[node], Tensor) else env[node]
        elif node.op == "call_function":
            env[node] = _wide(_call(node, env))
        elif node.op == "output":
            values = map_arg(node.args[0], lambda a: env[a])
            return list(values) if isinstance(values, (list, tuple)) else [values]
    raise AssertionError("a graph without output")


def _call(node: Node, env: dict[Node, Any]) -> Any:
    name = operator_name(node.target)
    args: tuple[Any, ...] = _arguments(node.args, env)
    kwargs: dict[str, Any] = _arguments(node.kwargs, env)
    if name.startswith("_assert"):
        return None
    if name in _DROPOUTS:
        return args[0]
    if name in ("_grouped_mm", "grouped_mm"):  # has no float64
        return grouped_mm(args[0], args[1], kwargs.get("offs", args[2] if len(args) > 2 else None))
    if name == "native_dropout":
        return [args[0], torch.ones_like(args[0])]
    if name == "scaled_dot_product_attention" and len(args) > 4:
        args = (*args[:4], 0.0, *args[5:])
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        args = (*args[:5], 0.0, *args[6:])
    if name == "packed_recurrent":
        args = (*args[:7], 0.0, *args[8:])
    if name == "recurrent":
        args = (*args[:6], 0.0, *args[7:])
    at = next((i for i, a in enumerate(args) if isinstance(a, GraphModule)), None)
    if at is not None:
        inner, operands = args[at], args[at + 1 :]
        holders = [n for n in inner.graph.nodes if n.op == "placeholder"]
        return _run(inner, dict(zip(holders, operands, strict=True)))
    target: Any = node.target
    return target(*args, **kwargs)


def grouped_mm(x: Tensor, w: Tensor, offs: Tensor | None) -> Tensor:
    """As ``torch._grouped_mm``: products of matrices, of runs of the axis that one or both lack a batch for.

    ``offs`` holds the ends of the runs; where both have a batch there are none. What lies behind the last run is zero.
    """
    if offs is None:
        return torch.bmm(x, w)
    ends = offs.tolist()
    runs = list(zip([0, *ends], ends, strict=False))
    if x.ndim == 2 and w.ndim == 2:  # runs of what is summed over
        return torch.stack([x[:, a:b] @ w[a:b] for a, b in runs])
    if x.ndim == 2:  # runs of rows
        rows = [x[a:b] @ m for (a, b), m in zip(runs, w, strict=True)]
        return torch.cat([*rows, x.new_zeros(x.shape[0] - ends[-1], w.shape[2])])
    columns = [m @ w[:, a:b] for (a, b), m in zip(runs, x, strict=True)]
    return torch.cat([*columns, x.new_zeros(x.shape[1], w.shape[1] - ends[-1])], -1)


def _arguments(of: Any, env: dict[Node, Any]) -> Any:
    return map_aggregate(map_arg(of, lambda n: env[n]), _widened)


def _widened(a: Any) -> Any:
    if isinstance(a, torch.dtype) and a.is_floating_point:
        return torch.float64
    return torch.device("cpu") if isinstance(a, torch.device) else a


def _wide(x: Any) -> Any:
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        return x.double() if x.is_floating_point() else x
    return type(x)(_wide(v) for v in x) if type(x) in (list, tuple) else x


# ----------------------------------------------------------------------------------------- the check
@dataclass(frozen=True)
class Verdict:
    """What the numeric check leaves: the symmetry, its largest relative error, and what had to be fixed."""

    symmetry: Symmetry
    error: float
    demoted: tuple[str, ...] = ()


class Check:
    """Compares a network's function before and after group elements.

    Args:
        networks: as exported, in one or several ways: the outputs of all of them count.
        seed: of the random weights and of the group elements.
    """

    def __init__(self, *networks: Network, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.functions = [Function(network) for network in networks]
        plain = {n: _wide(t) for network in networks for n, t in network.tensors.items() if has_data(t)}
        shapes = {n: t.shape for network in networks for n, t in network.tensors.items()}
        plain = {n: plain[n] if n in plain else torch.zeros(shape, dtype=torch.float64) for n, shape in shapes.items()}
        self.weights = {n: randomised(t, self.generator) for n, t in plain.items()}
        self.reference = self.function(self.weights)
        if not self._usable():
            self.weights = plain
            self.reference = self.function(plain)

    def function(self, tensors: Weights) -> list[Tensor]:
        """The outputs of all networks."""
        return [y for f in self.functions for y in f(tensors)]

    def _usable(self) -> bool:
        return bool(self.reference) and all(bool(torch.isfinite(y).all()) for y in self.reference)

    @property
    def possible(self) -> bool:
        """Whether the function has finite outputs that are not all zero."""
        return self._usable() and any(float(y.abs().max()) > 0 for y in self.reference if y.numel())

    def error(self, symmetry: Symmetry, element: Element) -> float:
        """``max |f(g W) - f(W)| / max |f(W)|`` over the outputs."""
        moved = self.function(symmetry.act(element, self.weights))
        pairs = zip(moved, self.reference, strict=True)
        errors = [float((a - b).abs().max() / (b.abs().max() or 1)) for a, b in pairs if b.numel()]
        return max(errors) if all(map(math.isfinite, errors)) else math.inf

    def sampled(self, symmetry: Symmetry, samples: int) -> float:
        """Largest error over random elements."""
        elements = (symmetry.sample(self.generator, scale_range=(0.3, 3.0)) for _ in range(samples))
        return max((self.error(symmetry, g) for g in elements), default=0.0)

    def verdict(self, symmetry: Symmetry, samples: int = 2) -> Verdict:
        """The largest part of the symmetry that passes: what fails is fixed."""
        demoted: list[str] = []
        error = self.sampled(symmetry, samples)
        while error > TOLERANCE:
            names = [f"label {n}" for n, g in symmetry.labels.items() if not g.fixed]
            names += [f"scale {n}" for n in symmetry.scales]
            if not names:
                break
            wrong = self._search(symmetry, names) or names
            demoted += wrong
            symmetry = without(symmetry, wrong)
            error = self.sampled(symmetry, samples)
        return Verdict(symmetry, error, tuple(demoted))

    def _search(self, symmetry: Symmetry, names: Sequence[str]) -> list[str]:
        """By bisection, labels and scales that break the function by themselves (or a set that does together)."""
        g, one = symmetry.sample(self.generator, scale_range=(0.3, 3.0)), symmetry.identity()
        part = Element(
            {n: g.perms[n] if f"label {n}" in names else x for n, x in one.perms.items()},
            {n: g.scales[n] if f"scale {n}" in names else x for n, x in one.scales.items()},
        )
        if self.error(symmetry, part) <= TOLERANCE:
            return []
        if len(names) == 1:
            return list(names)
        half = len(names) // 2
        return self._search(symmetry, names[:half]) + self._search(symmetry, names[half:]) or list(names)

    def missed(self, symmetry: Symmetry) -> list[str]:
        """Fixed labels of which two units could be exchanged (a symmetry with all axes labelled is needed)."""
        one, found = symmetry.identity(), []
        for name, label in symmetry.labels.items():
            if label.fixed and label.size > 1:
                swap = one.perms[name].clone()
                i, j = torch.randperm(label.size, generator=self.generator)[:2].tolist()
                swap[..., [i, j]] = swap[..., [j, i]]
                if self.error(symmetry, Element({**one.perms, name: swap}, one.scales)) <= TOLERANCE:
                    found.append(name)
        return found


def without(symmetry: Symmetry, names: Sequence[str]) -> Symmetry:
    """The subgroup in which some labels stay in place and some scales are 1."""
    fixed = {n for n in symmetry.labels if f"label {n}" in names}
    gone = {n for n in symmetry.scales if f"scale {n}" in names}

    def settled(leaf: Leaf) -> Leaf:
        return replace(leaf, scale=tuple(s for s in leaf.scale if s[0] not in gone))

    return replace(
        symmetry,
        specs={n: Spec(tuple(map_leaves(settled, a) for a in s.axes), s.roles) for n, s in symmetry.specs.items()},
        labels={n: replace(g, fixed=g.fixed or n in fixed) for n, g in symmetry.labels.items()},
        scales={n: s for n, s in symmetry.scales.items() if n not in gone},
        notes=(*symmetry.notes, *(f"{n}: fixed, because the numeric check failed with it" for n in names)),
    )


def unscaled(symmetry: Symmetry) -> Symmetry:
    """The subgroup of permutations and signs."""
    scales = {n: s if s.kind == "sign" else replace(s, kind="sign") for n, s in symmetry.scales.items()}
    gone = [n for n, s in symmetry.scales.items() if s.kind == "positive"]
    return replace(without(replace(symmetry, scales=scales), [f"scale {n}" for n in gone]), notes=symmetry.notes)

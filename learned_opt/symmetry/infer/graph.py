"""Propagation of labels through the graphs of a model.

In-place operators are read as functions whose result takes the place of their argument.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.export.graph_signature import OutputKind
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from learned_opt.symmetry.infer.engine import Engine, Profile, Stack, UnknownOperator, Value
from learned_opt.symmetry.infer.expansion import Expansions
from learned_opt.symmetry.infer.network import VIEWS, InferenceError, Network, is_in_place, operator_name
from learned_opt.symmetry.infer.operators import RULES
from learned_opt.symmetry.infer.operators.stacks import on_stack
from learned_opt.symmetry.infer.trees import Atom, Exponent, Tree, Unit, each, normal

logger = logging.getLogger(__name__)

PASSES = 40
_METADATA_ONLY = {
    "new_zeros",
    "new_ones",
    "zeros_like",
    "ones_like",
    "new_full",
    "full_like",
    "new_empty",
    "empty_like",
}


class Propagation(Engine):
    """Labels of a model's tensors, by passes over its graph until nothing changes.

    Args:
        networks: the same model, exported as it was called in one or several ways: what is found holds in all of them.
    """

    def __init__(self, *networks: Network) -> None:
        super().__init__()
        self.networks = networks
        self.tensors = {n: t for network in networks for n, t in network.tensors.items()}
        self.axes: dict[str, list[Tree]] = {}
        self.unknown: Counter[str] = Counter()
        self._profiles: dict[Node, Profile] = {}
        self._constants: dict[Node, Any] = {}
        self._expansions = Expansions()
        self.written_out = False  # by operators that no rule covers
        self._reset()
        for _ in range(PASSES):
            before, stacks = self.changes, len(self.stacked)
            self._pass()
            if len(self.stacked) > stacks:
                self._reset()
            elif self.changes == before:
                return
        raise InferenceError(
            f"the labels of {type(self).__name__} do not settle in {PASSES} passes: please report this"
        )

    def _reset(self) -> None:
        """Start again (with what is known of stacks)."""
        self._atoms, self.roles = {}, {}
        self.axes = {n: [Unit(Atom(k)) if k != 1 else self.atom(1) for k in t.shape] for n, t in self.tensors.items()}
        for name in {n for network in self.networks for n in network.overlapping}:
            for axis in self.axes[name]:
                self.restrict(axis, "shares memory with another tensor")

    def tensor(self, name: str) -> Value:
        """A tensor of the network, each leaf of its axes with an exponent of its own."""
        axes = []
        for i, axis in enumerate(self.axes[name]):
            count = iter(range(10**9))

            def leaf(u: Unit, i: int = i, count: Any = count) -> Unit:
                v = (name, i, next(count))
                return Unit(u.atom, Exponent(((v, 1),), frozenset([v])), frozenset([(name, i)]))

            axes.append(each(normal(axis), leaf))
        return Value(tuple(axes), weight=True)

    def _pass(self) -> None:
        self.begin_pass()
        self.unknown = Counter()
        self.read: set[str] = set()
        self.moved: set[Node] = set()  # nodes that depend on the network's tensors
        state = {n: self.tensor(n) for n in self.tensors}
        for value in state.values():
            self.note(value)
        for k, network in enumerate(self.networks):
            self._pass_over(network, state, f"{k}:" if k else "")

    def _pass_over(self, network: Network, state: dict[str, Value], prefix: str) -> None:
        env: dict[Node, Any] = {}
        for node in network.graph.graph.nodes:
            if node.op == "placeholder":
                self.begin(prefix + node.name, node.meta.get("val"))
                held = network.placeholders[node.name]
                if isinstance(held, str):
                    env[node] = state[held]
                    self.moved.add(node)
                    self.read |= {held} if node.users else set()
                elif isinstance(held, Tensor):
                    env[node] = held
                else:
                    env[node] = self._like(node.meta.get("val"), "input")
        result = self._run(network.graph, env, prefix)
        counted = network.program.graph_signature.output_specs
        for value, spec in zip(result, counted, strict=True):
            if spec.kind == OutputKind.USER_OUTPUT:
                self._output(value)

    def _output(self, value: Any) -> None:
        for v in value.pieces if isinstance(value, Stack) else [value]:
            if isinstance(v, Value):
                for axis in v.axes:
                    self.unscaled(axis)
                    self.restrict(axis, "output", scaleless=False)

    # -- one graph
    def _run(self, graph: GraphModule, env: dict[Node, Any], prefix: str) -> Sequence[Any]:
        nodes = list(graph.graph.nodes)
        aliases = _Aliases(nodes)
        for node in nodes:
            if node.op == "get_attr":
                held = getattr(graph, node.target)
                env[node] = held
            elif node.op == "call_function":
                env[node] = self._call(node, env, prefix)
                aliases.after(self, node, env)
            elif node.op == "output":
                out = node.args[0]
                values = map_arg(out, lambda a: env[a])
                return list(values) if isinstance(values, (list, tuple)) else [values]
        raise AssertionError("a graph without output")

    def _call(self, node: Node, env: dict[Node, Any], prefix: str) -> Any:
        name = operator_name(node.target)
        self.begin(prefix + node.name, node.meta.get("val"))
        self.results = {u.args[1] for u in node.users if u.users and operator_name(u.target) == "getitem"}
        inputs = [env[a] for a in node.all_input_nodes]
        moved = any(a in self.moved for a in node.all_input_nodes) and name not in _METADATA_ONLY
        if moved:
            self.moved.add(node)
        if any(isinstance(i, GraphModule) for i in inputs):
            return self._call_graph(node, env, prefix)
        if not any(map(_holds_value, inputs)):
            return self._evaluate(node, env)
        if name in _METADATA_ONLY:
            return self._filled(node, name)
        if name == "getitem":
            source, index = node.args
            return env[cast(Node, source)][index]
        if name.startswith("_assert") or name.startswith("sym_"):
            return None
        self.given_as = map_arg(node.args, lambda a: a.meta.get("val"))
        args = map_arg(node.args, lambda a: self._symbolic(a, env))
        kwargs = map_arg(node.kwargs, lambda a: self._symbolic(a, env))
        try:
            result = self._apply(name[:-1] if is_in_place(name) else name, args, kwargs)
        except Exception as error:  # of a rule that does not cover these arguments, and does not say so
            unknown = isinstance(error, UnknownOperator)
            if not unknown:
                logger.warning("the rule of %s failed", node.target, exc_info=error)
            elif moved and (graph := self._expansions.of(node, any(isinstance(i, Tensor) for i in inputs))) is not None:
                return self._expanded(node, graph, env, prefix)
            self.written_out = self.written_out or "out" in kwargs
            if moved:
                reason = f"{node.target}: " if unknown else f"{node.target}: {type(error).__name__}: "
                self.unknown[f"{node.target}" if str(error) == name else f"{reason}{error}"] += 1
            result = self._give_up(name, args, kwargs, moved)
        return self._fit(name, result, args, kwargs, moved)

    def _expanded(self, node: Node, graph: GraphModule, env: dict[Node, Any], prefix: str) -> Any:
        """What an operator without rule does, by the operators that it is made of."""
        holders = [n for n in graph.graph.nodes if n.op == "placeholder"]
        given = {h: env[a] for h, a in zip(holders, node.all_input_nodes, strict=True)}
        for h, a in zip(holders, node.all_input_nodes, strict=True):  # nodes that are alike share the graph
            (self.moved.add if a in self.moved else self.moved.discard)(h)
        result = list(self._run(graph, given, f"{prefix}{node.name}/"))
        return result if isinstance(node.meta.get("val"), (list, tuple)) else result[0]

    def _apply(self, name: str, args: Any, kwargs: Any) -> Any:
        if args and isinstance(args[0], Stack):
            result = on_stack(self, name, args[0], args[1:], kwargs)
            if result is not None:
                return result
        rule = RULES.get(name)
        if rule is None or "out" in kwargs:  # which writes into another tensor: no rule covers that
            raise UnknownOperator(name)
        return rule(self, *_collapsed(self, args), **_collapsed(self, kwargs))

    def _fit(self, name: str, result: Any, args: Any, kwargs: Any, moved: bool) -> Any:
        """A rule whose result has another shape than the operator's is a fault of ours: claim nothing."""
        metas = self.meta if isinstance(self.meta, (list, tuple)) else [self.meta]
        values = result if isinstance(result, list) else [result]
        for value, meta in zip(values, metas, strict=False):
            if isinstance(value, (Value, Stack)) and isinstance(meta, Tensor):
                if value.shape != [int(n) for n in meta.shape]:
                    self.unknown[f"{name}: result of shape {list(meta.shape)}, read as {value.shape}"] += 1
                    return self._give_up(name, args, kwargs, moved)
                if moved:
                    for v in value.pieces if isinstance(value, Stack) else [value]:
                        self.note(v)
        return result

    def _give_up(self, name: str, args: Any, kwargs: Any, moved: bool) -> Any:
        """Fix all that goes in and all that comes out."""
        if moved:
            self.kill([list(args), list(kwargs.values())], f"operator {name}")
        return self._like(self.meta, f"operator {name}")

    def _like(self, meta: Any, why: str) -> Any:
        if isinstance(meta, Tensor):
            return self.given([int(n) for n in meta.shape], why)
        if isinstance(meta, (list, tuple)):
            return [self._like(m, why) for m in meta]
        return meta

    # -- constants
    def _evaluate(self, node: Node, env: dict[Node, Any]) -> Any:
        """A node that depends on no input and no tensor: its value (computed once). What is drawn has none."""
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return self._like(self.meta, "noise")
        if node not in self._constants:
            args: Any = map_arg(node.args, lambda n: env[n])
            kwargs: Any = map_arg(node.kwargs, lambda n: env[n])
            try:
                with torch.no_grad():
                    self._constants[node] = cast(Callable[..., Any], node.target)(*args, **kwargs)
            except Exception as error:
                logger.debug("constant %s: %s", node.name, error)
                self._constants[node] = None
        found = self._constants[node]
        return self._like(self.meta, "a constant") if found is None else found

    def _filled(self, node: Node, name: str) -> Any:
        if node not in self._constants:
            fill = {"new_full": 2, "full_like": 1}.get(name)
            value: Any = node.args[fill] if fill is not None else float("ones" in name)
            meta = node.meta["val"]
            self._constants[node] = torch.full(tuple(meta.shape), value, dtype=meta.dtype)
        return self._constants[node]

    def _symbolic(self, node: Node, env: dict[Node, Any]) -> Any:
        """A node's value as an argument of a rule: constants by what matters of them."""
        value = env[node]
        if not isinstance(value, Tensor):
            return value
        if node not in self._profiles:
            self._profiles[node] = Profile.of(value)
        return self.constant(self._profiles[node])

    # -- graphs within the graph
    def _call_graph(self, node: Node, env: dict[Node, Any], prefix: str) -> Any:
        """Regions such as ``torch.no_grad()``: the same as if they were inlined."""
        graphs = ((i, env[a]) for i, a in enumerate(node.args) if isinstance(a, Node))
        at, inner = next((i, g) for i, g in graphs if isinstance(g, GraphModule))
        operands = node.args[at + 1 :]
        name = operator_name(node.target)
        if name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            self.unknown[name] += 1
            return self._give_up(name, [env[a] for a in operands if isinstance(a, Node)], {}, True)
        holders = [n for n in inner.graph.nodes if n.op == "placeholder"]
        given = {h: env[a] if isinstance(a, Node) else a for h, a in zip(holders, operands, strict=True)}
        self.moved |= {h for h, a in zip(holders, operands, strict=True) if a in self.moved}
        return list(self._run(inner, given, f"{prefix}{node.name}/"))


class _Aliases:
    """In-place operators: the result takes the place of the argument; other views of it can no longer be read."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.order = {n: i for i, n in enumerate(nodes)}
        self.base: dict[Node, Node] = {}
        self.family: dict[Node, list[Node]] = {}

    def after(self, t: Propagation, node: Node, env: dict[Node, Any]) -> None:
        """Note what ``node`` is a view of; if it works in place, put its result where it belongs."""
        if not node.args or not isinstance(node.args[0], Node):
            return
        name, source = operator_name(node.target), node.args[0]
        base = self.base.get(source, source)
        if name in VIEWS or is_in_place(name):
            self.base[node] = base
            self.family.setdefault(base, [base]).append(node)
        if not is_in_place(name) or isinstance(env[source], Tensor) and isinstance(env[node], Tensor):
            return  # constants are changed in place by their evaluation
        members = self.family.get(base, [base])
        read_later = [m for m in members if m is not node and any(self.order[u] > self.order[node] for u in m.users)]
        if source in read_later:
            env[source] = env[node]
            t.moved |= {source} if node in t.moved else set()
            read_later.remove(source)
        if read_later:  # views of what was changed under them
            if node in t.moved:
                t.written_out = True
                t.unknown["a view of a tensor that is changed in place"] += 1
            values = [env[m] for m in read_later] + [env[node]]
            t.kill([v for v in values if not isinstance(v, Tensor)], "a view of a tensor changed in place")
            for m in read_later:
                t.begin(f"{node.name}:{m.name}", m.meta.get("val"))
                env[m] = t._like(m.meta.get("val"), "a view of a tensor changed in place")


def _holds_value(x: Any) -> bool:
    if isinstance(x, (list, tuple)):
        return any(map(_holds_value, x))
    return isinstance(x, (Value, Stack))


def _collapsed(t: Engine, x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _collapsed(t, v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_collapsed(t, v) for v in x]
    return t.collapse(x)

"""From a model to its graph, and propagation of labels through it.

``torch.export`` gives ATen operators at the level at which they were written (linear, layer_norm, attention), which is
the level of our rules; no decomposition is needed, except for operators that no rule knows, which get a second chance
in their decomposed form. In-place operators are read as functions whose result takes the place of their argument.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from learned_opt.symmetry.infer.engine import Engine, Profile, Stack, UnknownOperator, Value
from learned_opt.symmetry.infer.operators import RULES
from learned_opt.symmetry.infer.operators.stacks import on_stack
from learned_opt.symmetry.infer.quiet import silent
from learned_opt.symmetry.infer.trees import Atom, Exponent, Tree, Unit, each, normal
from learned_opt.symmetry.labels import STATISTICS, SymmetryError

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
_VIEWS = {
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "select", "slice", "unsqueeze", "squeeze",
    "expand", "split", "split_with_sizes", "chunk", "unbind", "alias", "detach", "narrow", "movedim", "contiguous",
    "to", "getitem", "view_as", "unfold", "mT", "numpy_T", "expand_as", "lift_fresh",
}  # fmt: skip
_MULTIPLICATIONS = ("linear", "conv", "mm", "addmm", "matmul")
_BATCH_NORMS = ("batch_norm", "cudnn_batch_norm", "native_batch_norm", "_native_batch_norm_legit")


class InferenceError(SymmetryError):
    """The symmetry of a model cannot be inferred."""


# ------------------------------------------------------------------------------------------- export
class _Selected(nn.Module):
    """A model of which only selected outputs count."""

    def __init__(self, model: nn.Module, outputs: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs
        self.training = model.training  # of this module alone: those of the model stay as they are

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.outputs(self.model(*args, **kwargs))


def without_cache(output: Any) -> Any:
    """What counts of a model's output by default: all of it, except the key-value cache of a language model.

    A cache is known by its class (``DynamicCache``), wherever it is, or as tensors by its old key. Other objects that
    are no tensors are not dropped: what they hold may be the output (a dataclass), which must not be forgotten.
    """
    if isinstance(output, Mapping):
        output = {k: v for k, v in output.items() if k != "past_key_values" and v is not None}
    return pytree.tree_map(lambda x: None if _is_cache(x) else x, output, is_leaf=_is_cache)


def _is_cache(x: Any) -> bool:
    return any(c.__name__.endswith("Cache") for c in type(x).__mro__)


def export(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    outputs: Callable[[Any], Any] | None = None,
) -> ExportedProgram:
    """The model's graph, in its present mode. The model is not changed.

    Raises:
        InferenceError: torch.export cannot trace the model, or the model raises on these inputs.
    """
    wrapped = _Selected(model, outputs or without_cache)
    try:
        with torch.enable_grad(), silent():
            return torch.export.export(wrapped, tuple(args), dict(kwargs), strict=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise InferenceError(
            f"{type(model).__name__} cannot be exported with these inputs, so that its symmetry cannot be inferred:"
            f" {type(error).__name__}: {first}\nIf the inputs are right (it must run with them), the model has python"
            " control flow that depends on data, or operators that torch.export does not trace. Write the symmetry by"
            " hand (docs/symmetry.md), or use learned_opt.independent(dict(model.named_parameters()))."
        ) from error


def operator_name(target: Any) -> str:
    """Name of an operator without namespace and overload."""
    if hasattr(target, "overloadpacket"):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


# ------------------------------------------------------------------------------------- the network
class Network:
    """An exported model: its graph, and the tensors that a group element moves.

    Attributes:
        tensors: parameters and running statistics by their first name in the model.
        placeholders: for every placeholder of the graph the name of its tensor, or the constant that it holds, or
            None for an input of the model.
    """

    def __init__(self, model: nn.Module, program: ExportedProgram) -> None:
        self.program, self.graph = program, program.graph_module
        named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        first: dict[Any, str] = {}
        for name, tensor in named.items():
            first.setdefault(_storage_key(tensor), name)
        specs = {s.arg.name: s for s in program.graph_signature.input_specs if hasattr(s.arg, "name")}
        written = set(program.graph_signature.buffers_to_mutate.values())  # where the graph is functional
        mutated = _mutated(self.graph) | {n for n, s in specs.items() if s.target in written}
        changed = _statistics(self.graph, specs, mutated)
        self.tensors: dict[str, Tensor] = {}
        self.placeholders: dict[str, str | Tensor | None] = {}
        for node in self.graph.graph.nodes:
            if node.op != "placeholder":
                continue
            spec = specs.get(node.name)
            target = (spec.target or "").removeprefix("model.") if spec is not None else ""
            if spec is not None and (spec.kind == InputKind.PARAMETER or node.name in changed):
                name = first[_storage_key(named[target])]
                self.tensors[name] = named[target]
                self.placeholders[node.name] = name
            elif spec is not None and spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                value = named.get(target)
                value = program.constants.get(spec.target) if value is None else value
                held = value is not None and value.device.type != "meta" and node.name not in mutated
                self.placeholders[node.name] = value.detach().clone() if held else None  # graphs may write into it
            else:
                self.placeholders[node.name] = None
        order = {n: i for i, n in enumerate(named)}
        self.tensors = dict(sorted(self.tensors.items(), key=lambda item: order[item[0]]))
        self.overlapping = _overlapping(self.tensors)

    def operations(self) -> float:
        """Multiplications of linear maps and convolutions with weights in one forward pass (an estimate)."""
        total = 0.0
        for node in self.graph.graph.nodes:
            held = [self.placeholders.get(a.name) for a in node.all_input_nodes if a.op == "placeholder"]
            matrices = [self.tensors[n] for n in held if isinstance(n, str) and self.tensors[n].ndim > 1]
            meta = node.meta.get("val")
            if matrices and isinstance(meta, Tensor) and operator_name(node.target).startswith(_MULTIPLICATIONS):
                total += meta.numel() * max(m.numel() / m.shape[0] for m in matrices)
        return total


def _storage_key(t: Tensor) -> Any:
    return (t.data_ptr(), tuple(t.shape), t.stride()) if t.device.type != "meta" and t.data_ptr() else id(t)


def _overlapping(tensors: Mapping[str, Tensor]) -> set[str]:
    """Tensors that share memory with another one of another shape: nothing can be said of them."""
    owners: dict[int, list[str]] = {}
    for name, t in tensors.items():
        if t.device.type != "meta" and t.untyped_storage().data_ptr():
            owners.setdefault(t.untyped_storage().data_ptr(), []).append(name)
    # parameters flattened into one buffer share storage without overlap
    found: set[str] = set()
    for names in owners.values():
        furthest, owner = 0, ""
        for name in sorted(names, key=lambda n: tensors[n].storage_offset()):
            t = tensors[name]
            end = int(t.storage_offset()) + 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            if owner and t.storage_offset() < furthest:
                found |= {owner, name}
            if end > furthest:
                furthest, owner = end, name
    return found


def _statistics(graph: GraphModule, specs: Mapping[str, Any], mutated: Set[str]) -> set[str]:
    """Placeholders of running means and variances: what a batch norm reads, and what is called so.

    They are no constants, though a new network's look like some (0 and 1): training will have changed them.
    """
    found = set()
    for node in _all_nodes(graph):
        spec = specs.get(node.name)
        if node.op == "placeholder" and spec is not None and spec.kind == InputKind.BUFFER and spec.persistent:
            called_so = spec.target.rpartition(".")[2] in STATISTICS and node.meta["val"].is_floating_point()
            found |= {node.name} if called_so and node.name not in mutated else set()
        if node.op == "call_function" and operator_name(node.target).startswith(_BATCH_NORMS):
            found |= {
                a.name
                for a in node.args[1:]
                if isinstance(a, Node) and a.name in specs and specs[a.name].kind == InputKind.BUFFER
            }
    return found


def _mutated(graph: GraphModule) -> set[str]:
    """Placeholders that the graph writes into: what they hold now is not a constant."""
    found = set()
    for node in graph.graph.nodes:
        if node.op == "call_function" and is_in_place(operator_name(node.target)) and isinstance(node.args[0], Node):
            base: Any = node.args[0]
            while base.op == "call_function" and operator_name(base.target) in _VIEWS:
                base = base.args[0]
            found.add(base.name)
    return found


def _all_nodes(graph: GraphModule) -> list[Node]:
    return [n for m in graph.modules() if isinstance(m, GraphModule) for n in m.graph.nodes]


def is_in_place(name: str) -> bool:
    """``add_`` is, ``__and__`` is not."""
    return name.endswith("_") and not name.endswith("__")


# -------------------------------------------------------------------------------------- propagation
class Propagation(Engine):
    """Labels of a network's tensors, by passes over its graph until nothing changes."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.axes: dict[str, list[Tree]] = {}
        self.unknown: Counter[str] = Counter()
        self._profiles: dict[Node, Profile] = {}
        self._constants: dict[Node, Any] = {}
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
        self.axes = {
            n: [Unit(Atom(k)) if k != 1 else self.atom(1) for k in t.shape] for n, t in self.network.tensors.items()
        }
        for name in self.network.overlapping:
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
        env: dict[Node, Any] = {}
        state = {n: self.tensor(n) for n in self.network.tensors}
        for value in state.values():
            self.note(value)
        for node in self.network.graph.graph.nodes:
            if node.op == "placeholder":
                self.begin(node.name, node.meta.get("val"))
                held = self.network.placeholders[node.name]
                if isinstance(held, str):
                    env[node] = state[held]
                    self.moved.add(node)
                    self.read |= {held} if node.users else set()
                elif isinstance(held, Tensor):
                    env[node] = held
                else:
                    env[node] = self._like(node.meta.get("val"), "input")
        result = self._run(self.network.graph, env, "")
        counted = self.network.program.graph_signature.output_specs
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
                env[node] = self._call(graph, node, env, prefix)
                aliases.after(self, node, env)
            elif node.op == "output":
                out = node.args[0]
                values = map_arg(out, lambda a: env[a])
                return list(values) if isinstance(values, (list, tuple)) else [values]
        raise AssertionError("a graph without output")

    def _call(self, graph: GraphModule, node: Node, env: dict[Node, Any], prefix: str) -> Any:
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
        args = map_arg(node.args, lambda a: self._symbolic(a, env))
        kwargs = map_arg(node.kwargs, lambda a: self._symbolic(a, env))
        try:
            result = self._apply(name[:-1] if is_in_place(name) else name, args, kwargs)
        except Exception as error:  # of a rule that does not cover these arguments, and does not say so
            reason = "" if isinstance(error, UnknownOperator) else f"{type(error).__name__}: "
            if reason:
                logger.warning("the rule of %s failed", node.target, exc_info=error)
            if moved:
                self.unknown[f"{node.target}" if str(error) == name else f"{node.target}: {reason}{error}"] += 1
            result = self._give_up(name, args, kwargs, moved)
        return self._fit(name, result, args, kwargs, moved)

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
        if name in _VIEWS or is_in_place(name):
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

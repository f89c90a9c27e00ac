"""Is the graph that was analysed what ran? Its outputs, and the gradients that it gives, against those of training.

The graph is run on the recorded inputs, with the buffers, the random states and the autocast of the recorded call. If
it does not return what the call returned, another function was called (``forward`` was replaced, a branch taken
elsewhere). If the gradients of the parameters are no sum of what the recorded calls send back, the parameters have
other uses: a penalty on weights, a second method, features that a hook takes out.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from learned_opt.calls import Call, sample
from learned_opt.symmetry.infer.network import InferenceError, Network, has_data, operator_name
from learned_opt.symmetry.infer.recurrence import DIFFERENTIABLE

logger = logging.getLogger(__name__)
EXACT, ROUNDED, COARSE = 1e-4, 1e-2, 0.1  # relative: the same kernels; compiled or in half precision; gradients in half
NEGLIGIBLE = 1e-4  # of the largest gradients: others are rounding errors (a bias before a normalisation)


class NotReplayed(Exception):
    """The graph calls another one (a loop, a branch) in a way that is not followed: the call is not compared."""


class _Replay:
    """Runs an exported network with its own parameters, on the inputs of one call."""

    def __init__(self, network: Network, call: Call) -> None:
        self.network, self.call = network, call
        self.parameters = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in network.tensors.items()}

    def outputs(self, *, differentiable: bool) -> list[Any]:
        """The leaves of what the call returned."""
        signature = self.network.program.graph_signature
        example: Any = self.network.program.example_inputs or ((), {})
        kwargs = {k: self.call.kwargs[k] for k in example[1]}
        given = iter(pytree.tree_leaves((self.call.args, kwargs)))
        specs = {s.arg.name: s for s in signature.input_specs if hasattr(s.arg, "name")}
        held = {s.arg.name: next(given) for s in signature.input_specs if s.kind == InputKind.USER_INPUT}
        env: dict[Node, Any] = {}
        for node in self.network.graph.graph.nodes:
            if node.op == "placeholder":
                value = held[node.name] if node.name in held else self._own(node.name, specs[node.name])
                kept = isinstance(value, Tensor) and not value.requires_grad and value.layout == torch.strided
                env[node] = value.detach().clone() if kept else value
        with torch.set_grad_enabled(differentiable), self.call.precision():
            result = _run(self.network.graph, env)
        return [r for r, s in zip(result, signature.output_specs, strict=True) if s.kind == OutputKind.USER_OUTPUT]

    def _own(self, name: str, spec: Any) -> Any:
        """A parameter, a buffer as it was, or a constant."""
        program, held = self.network.program, self.network.placeholders[name]
        target = (spec.target or "").removeprefix("model.")
        if target in self.call.buffers:
            return self.call.buffers[target]
        if isinstance(held, str):
            return self.parameters[held]
        for source in (program.constants, program.state_dict):
            if spec.target in source:
                return source[spec.target]
        return held


def _run(graph: GraphModule, env: dict[Node, Any]) -> list[Any]:
    """Node after node, each value let go after its last use."""
    last: dict[Node, list[Node]] = {}
    seen: set[Node] = set()
    for node in reversed(graph.graph.nodes):
        for a in node.all_input_nodes:
            if a not in seen:
                seen.add(a)
                last.setdefault(node, []).append(a)
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            env[node] = getattr(graph, node.target)
        elif node.op == "call_function":
            env[node] = _call(node, env)
        elif node.op == "output":
            values = map_arg(node.args[0], lambda a: env[a])
            return list(values) if isinstance(values, (list, tuple)) else [values]
        for a in last.get(node, []):
            del env[a]
    raise AssertionError("a graph without output")


_REGIONS: Mapping[str, Callable[..., AbstractContextManager[Any]]] = {
    "wrap_with_set_grad_enabled": torch.set_grad_enabled,
    "wrap_with_autocast": lambda device, dtype, enabled, cache: torch.autocast(device, dtype, enabled, cache),
}


def _call(node: Node, env: dict[Node, Any]) -> Any:
    name = operator_name(node.target)
    target: Any = node.target
    args: Any = map_arg(node.args, lambda a: env[a])
    kwargs: Any = map_arg(node.kwargs, lambda a: env[a])
    if name.startswith("_assert"):
        return None
    at = next((i for i, a in enumerate(args) if isinstance(a, GraphModule)), None)
    if at is None:
        return DIFFERENTIABLE.get(name, target)(*args, **kwargs)
    if name not in _REGIONS:
        raise NotReplayed(f"a graph in {name}")
    holders = [n for n in args[at].graph.nodes if n.op == "placeholder"]
    given = dict(zip(holders, args[at + 1 :], strict=True))
    with _REGIONS[name](*args[:at]):
        return _run(args[at], given)


def is_noisy(network: Network) -> bool:
    """Whether the graph draws random numbers."""
    graphs = (m for m in network.graph.modules() if isinstance(m, GraphModule))
    targets = (n.target for m in graphs for n in m.graph.nodes if n.op == "call_function")
    return any(torch.Tag.nondeterministic_seeded in getattr(t, "tags", ()) for t in targets)


def compare(networks: Sequence[tuple[Network, Sequence[Call]]]) -> tuple[list[str], bool]:
    """Compare each network with the calls that it was exported for.

    Returns:
        Notes on outputs that could not be compared; and whether the gradients were.

    Raises:
        InferenceError: what ran is something else than what was exported, or is not all that was trained.
        Penalised: there is a penalty on the weights too.
    """
    notes: list[str] = []
    for network, calls in networks:
        for call in calls:
            notes += _compare_outputs(network, call)
    calls = [c for _, cs in networks for c in cs]
    if not notes and calls and all(c.explains and c.complete for c in calls) and calls[0].gradients:
        try:
            return notes, _compare_gradients(networks, calls)
        except (InferenceError, Penalised):
            raise
        except Exception as error:  # a node that is not differentiable in this form, say
            logger.debug("gradients of %s are not compared: %s", type(calls[0].module).__name__, error)
    return list(dict.fromkeys(notes)), False


def _compare_outputs(network: Network, call: Call) -> list[str]:
    name = type(call.module).__name__
    if call.noise is None or call.outputs is None or not all(map(has_data, network.tensors.values())):
        return [f"not compared with the call of {name} that was trained"]
    if call.compiled and is_noisy(network):
        return [f"not compared with the call of {name} that was trained: it is compiled, and draws at random"]
    try:
        with call.noise.again(call.module):
            leaves = _Replay(network, call).outputs(differentiable=False)
    except Exception as error:
        logger.debug("replay of %s", name, exc_info=error)
        return [f"not compared with the call of {name} that was trained ({type(error).__name__})"]
    found = [sample(x) if isinstance(x, Tensor) else None for x in leaves]
    shapes = [tuple(x.shape) for x in leaves if isinstance(x, Tensor)]
    if shapes != call.shapes or len(found) != len(call.outputs):
        raise InferenceError(f"the call of {name} that was trained returned something else than its export does")
    tolerance = ROUNDED if call.autocast or call.compiled or _is_half(leaves) else EXACT
    for ours, theirs in zip(found, call.outputs, strict=True):
        if ours is not None and theirs is not None and not _close(ours, theirs, tolerance):
            raise InferenceError(
                f"the call of {name} that was trained did not return what its export returns: another function ran"
                " (a method was replaced for the call, it branches on what export does not see, or its inputs changed"
                " since)"
            )
    return []


def _is_half(leaves: Sequence[Any]) -> bool:
    return any(isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) for x in leaves)


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    ours, theirs = ours.cpu(), theirs.cpu()
    finite = ours.isfinite() & theirs.isfinite()
    if not torch.equal(ours.isfinite(), theirs.isfinite()):
        return False
    difference, size = (ours - theirs)[finite].abs(), theirs[finite].abs()
    return not difference.numel() or bool(difference.max() <= tolerance * size.max() + 1e-12)


# ------------------------------------------------------------------------------------------ gradients
def _compare_gradients(networks: Sequence[tuple[Network, Sequence[Call]]], calls: Sequence[Call]) -> bool:
    """The gradients of the parameters are a sum of those that the calls send back, each times a number.

    The numbers are 1 by rights; they are left open, because gradients may have been scaled, or set to zero in between.
    False where there is nothing to compare.
    """
    module, gradients = calls[0].module, calls[0].gradients
    named = {id(p): n for n, p in module.named_parameters(remove_duplicate=False)}
    first = {id(p): n for n, p in module.named_parameters()}
    wanted = {first[i]: g.cpu() for i, g in gradients.items() if i in named and i in first}
    wanted = {n: g for n, g in wanted.items() if bool(g.isfinite().all())}
    if not wanted:
        return False
    sent = [_sent(network, call, list(wanted)) for network, cs in networks for call in cs]
    sizes = {n: _rms(g) for n, g in wanted.items()}
    floor = NEGLIGIBLE * max([*sizes.values(), *(_rms(s[n]) for s in sent for n in s)], default=0.0)
    if not floor:
        return False
    tolerance = COARSE if _any_half(module) else ROUNDED
    if not _unexplained(wanted, sent, floor, tolerance):
        return True
    parameters = {n: sample(p).cpu() for n, p in module.named_parameters() if n in wanted}
    wrong = _unexplained(wanted, sent, floor, tolerance, parameters)
    kind = type(module).__name__
    if wrong:
        raise InferenceError(
            f"the gradients of {', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''} are not those of the recorded"
            f" calls of {kind} alone: the parameters are used in another way too (a penalty on weights, another method,"
            " what a hook takes out, tensors computed from them), or its backward pass is not that of its forward pass"
        )
    raise Penalised(f"the loss of {kind} has a penalty on its weights: no positive scale leaves it alone")


class Penalised(Exception):
    """The gradients have a share that is a function of each weight: permutations and signs hold, scales do not."""


def _any_half(module: Any) -> bool:
    return any(p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters())


def _sent(network: Network, call: Call, names: Sequence[str]) -> dict[str, Tensor]:
    """Samples of what the call's output gradients give for the parameters."""
    assert call.noise is not None
    replay = _Replay(network, call)
    with torch.enable_grad():
        with call.noise.again(call.module):
            leaves = replay.outputs(differentiable=True)
        pairs = [(leaves[i], g) for i, g in call.output_grads.items()]
        pairs = [(y, g) for y, g in pairs if isinstance(y, Tensor) and y.requires_grad]
        held = {n: replay.parameters[n] for n in names if n in replay.parameters}
        if not pairs or not held:
            return {}
        ys, gs = zip(*pairs, strict=True)
        found = torch.autograd.grad(ys, list(held.values()), gs, allow_unused=True)
    return {n: sample(g).cpu() for n, g in zip(held, found, strict=True) if g is not None}


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def _unexplained(
    wanted: Mapping[str, Tensor],
    sent: Sequence[Mapping[str, Tensor]],
    floor: float,
    tolerance: float,
    parameters: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Tensors whose gradient is no such sum; with ``parameters`` up to multiples of the weights and of their signs."""
    rows, columns = {}, {}
    for name, g in wanted.items():
        unit = _rms(g) + floor
        mine = torch.stack([s.get(name, torch.zeros_like(g)) for s in sent], -1) / unit
        both = torch.cat([(g / unit)[:, None], mine], -1)
        if parameters is not None and g.numel() > 2:
            p = parameters[name]
            basis = torch.linalg.qr(torch.stack([p, p.sign()], -1)).Q
            both = both - basis @ (basis.mT @ both)
        rows[name], columns[name] = both[:, 0], both[:, 1:]
    a, b = torch.cat(list(columns.values())), torch.cat(list(rows.values()))
    factors = torch.linalg.lstsq(a, b[:, None], driver="gelsd").solution[:, 0]
    return [n for n in wanted if _rms(rows[n] - columns[n] @ factors) > tolerance]

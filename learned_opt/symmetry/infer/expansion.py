"""An operator that no rule knows, as a graph of simpler ones: a second chance for each by itself.

Decomposing the whole program would do the same, and take longer than everything else.
"""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from learned_opt.symmetry.infer.network import is_in_place, operator_name
from learned_opt.symmetry.infer.operators import RULES

logger = logging.getLogger(__name__)


@cache
def _table() -> dict[Any, Any]:
    """Decompositions of the operators without rule."""
    table = torch._decomp.core_aten_decompositions()
    return {op: f for op, f in table.items() if operator_name(op) not in RULES}


class Expansions:
    """Expands nodes of graphs; nodes that are alike share their expansion, unless they are given constants."""

    def __init__(self) -> None:
        self._known: dict[Any, GraphModule | None] = {}

    def of(self, node: Node, own: bool) -> GraphModule | None:
        """A graph with ``node.all_input_nodes`` as its placeholders, or None if there is none that is simpler.

        With ``own`` it is of this node alone.
        """
        target = _functional(node.target)
        if target is None or "out" in node.kwargs:
            return None
        metas: list[Any] = [a.meta.get("val") for a in node.all_input_nodes]
        if not all(isinstance(m, Tensor) for m in metas):
            return None
        order = {a: i for i, a in enumerate(node.all_input_nodes)}
        where = map_arg((node.args, node.kwargs), lambda a: _Place(order[a]))
        key = target, repr(where), tuple((tuple(m.shape), m.dtype, m.stride()) for m in metas), own and node
        if key not in self._known:
            self._known[key] = _expanded(target, where, metas, node)
        return self._known[key]


class _Place(int):
    """The place of a tensor among the inputs."""


def _functional(target: Any) -> Any:
    """An operator that does not write into its argument."""
    name = operator_name(target)
    if not is_in_place(name):
        return target
    packet = getattr(getattr(torch.ops, target.namespace), name[:-1], None) if hasattr(target, "namespace") else None
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _expanded(target: Any, where: Any, metas: list[Tensor], node: Node) -> GraphModule | None:
    def f(*tensors: Tensor) -> Any:
        args, kwargs = pytree.tree_map(lambda p: tensors[p] if isinstance(p, _Place) else p, where)
        return target(*args, **kwargs)

    mode = getattr(metas[0], "fake_mode", None)
    if mode is None:
        return None
    try:
        with torch.no_grad(), mode:
            plain = [torch.empty_strided(m.shape, m.stride(), dtype=m.dtype, device=m.device) for m in metas]
            graph = make_fx(f, decomposition_table=_table())(*plain)
    except Exception as error:
        logger.debug("no expansion of %s: %s", node.target, error)
        return None
    calls = [n for n in graph.graph.nodes if n.op == "call_function"]
    if any(operator_name(n.target) == operator_name(target) for n in calls):
        return None
    return graph
